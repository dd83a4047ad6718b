"""Training in fp16: overflows are skipped and counted. A real GradScaler and a real autocast to
float16, on the CPU, where accelerate itself offers neither.
"""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from short_run import records, small_options, train

import train_lora
from common import cli, precision
from training import step as steps


@pytest.fixture
def fp16(monkeypatch):
    """Give runs a scaler that begins at a chosen scale."""
    stock = train_lora.open_accelerator

    def with_scale(scale):
        def opened(**options):
            AcceleratorState._reset_state(reset_partial_state=True)  # as in a new process
            accelerator = stock(**options)
            if accelerator.mixed_precision == "fp16":
                accelerator.native_amp = True
                accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            return accelerator

        monkeypatch.setattr(train_lora, "open_accelerator", opened)

    monkeypatch.setattr(precision, "choose", lambda asked: "fp16" if asked == "auto" else asked)
    return with_scale


@pytest.fixture
def options(checkpoint, train_only, tmp_path):
    return small_options(checkpoint, train_only, tmp_path)


def figures(options):
    return json.loads(Path(options["output_dir"], "train.json").read_text(encoding="utf-8"))


def test_fp16_trains_close_to_fp32(options, fp16, prepared, tmp_path):
    options |= {"data_dir": str(prepared)}  # and validates
    fp16(2.0**10)
    train(options)
    plain = options | {"precision": "fp32", "output_dir": str(tmp_path / "fp32")}
    train(plain)
    assert figures(options)["config"]["precision"] == "fp16"
    assert figures(options)["skipped_steps"] == 0
    expected, got = records(plain, "loss"), records(options, "loss")
    assert 0 < max(abs(got[step] / expected[step] - 1) for step in expected) < 0.02


TOO_HIGH = 2.0**23  # a scale at which the first steps overflow, whatever the clips


def state(options, step):
    folder = Path(options["output_dir"], "checkpoints", f"step-{step:08d}")
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("log_every", [1, 4])
def test_steps_that_overflow_are_skipped_and_counted_and_training_goes_on(options, fp16, log_every):
    """Each overflow halves the scale, until gradients fit."""
    fp16(TOO_HIGH)
    own = options | {"log_every": log_every, "max_steps": 12, "save_every": 1}
    train(own | {"keep_checkpoints": 12})
    skipped = figures(own)["skipped_steps"]
    assert 1 < skipped < 8
    assert state(own, 12)["scaler"]["scale"] == TOO_HIGH / 2**skipped
    logged = range(log_every, 13, log_every)
    taken = {step: state(own, step)["optimizer_steps"] for step in logged}
    assert records(own, "skipped_steps") == {step: step - taken[step] for step in logged}
    losses = records(own, "loss")
    learnt = {step for step in logged if taken[step] > taken.get(step - log_every, 0)}
    assert set(losses) == learnt, "losses are of steps that were taken"
    assert records(own, "grad_norm").keys() == losses.keys()
    assert all(math.isfinite(loss) for loss in losses.values())


def test_a_run_whose_every_step_overflows_ends_with_the_clips(options, fp16, monkeypatch):
    fp16(2.0**10)
    stock = steps.batch_loss
    monkeypatch.setattr(steps, "batch_loss", lambda *a: stock(*a) * math.nan)
    with pytest.raises(cli.UserError, match=r"norm is nan in step 21 \(clips .*train_"):
        train(options | {"max_steps": 60, "save_every": 5})
    assert "loss" not in Path(options["output_dir"], "metrics.jsonl").read_text()


def test_counts_and_scale_survive_an_interruption(options, fp16, monkeypatch, tmp_path):
    fp16(TOO_HIGH)
    train(options | {"max_steps": 12})
    cut = options | {"output_dir": str(tmp_path / "cut"), "save_every": 1, "max_steps": 12}
    stock, begun = train_lora.train_step, itertools.count(1)

    def ends_in_the_third(*given):
        if next(begun) == 3:
            raise KeyboardInterrupt
        stock(*given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_lora, "train_step", ends_in_the_third)
        train(cut)
    fp16(2.0**40)  # of a new process; the checkpoint's scale takes its place
    train(cut)
    assert records(cut, "loss") == records(options, "loss")
    assert figures(cut)["skipped_steps"] == figures(options)["skipped_steps"] > 2


def test_a_run_in_another_precision_goes_on_in_fp16(options, fp16, capsys):
    """--resume_changed true from fp32: there is no scaler's state in the checkpoint."""
    fp16(2.0**10)
    train(options | {"precision": "fp32", "max_steps": 3})
    train(options | {"resume_changed": True})
    assert "--precision fp16 (was no)" in capsys.readouterr().out
    assert set(records(options, "loss")) == set(range(1, 7))
