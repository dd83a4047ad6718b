"""DDP, DeepSpeed and FSDP, each as two real processes: the training of one process, to rounding."""

import json
import math
from pathlib import Path

import launch
import pytest
import torch
from safetensors.torch import load_file
from short_run import AUGMENTED, records, small_options, train
from transformers import WhisperForConditionalGeneration

import eval_wer

ENGINES = {
    "cpu": "ddp",
    "deepspeed_zero1": "zero1",
    "deepspeed_zero2": "zero2",
    "deepspeed_zero3": "zero3",
    "deepspeed_zero3_offload": "zero3",
    "fsdp2": "fsdp2",
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def options(checkpoint, prepared, folder):
    """Shuffled clips, 3 a step so that the ranks' shares differ, several pieces each; all drawn."""
    more = {"global_batch_size": 3, "max_batch_seconds": 5.0, "eval_every": 3, "save_every": 2}
    more |= AUGMENTED | {"max_grad_norm": 0.5}
    return small_options(checkpoint, prepared, folder, **more)


@pytest.fixture(scope="module")
def one(options, folder):
    """The same with one process."""
    own = options | {"output_dir": str(folder / "one")}
    train(own)
    return own


@pytest.fixture(scope="module")
def one_full(options, folder):
    own = options | FULL | {"output_dir": str(folder / "one_full")}
    train(own)
    return own


FULL = {"tune": "full", "learning_rate": 1e-3}


def run_two(options, config, **more):
    """Train as two processes with a config; what train.json says."""
    own = options | {"output_dir": f"{options['output_dir']}_{config}_{len(more)}"} | more
    done = launch.run("train_lora.py", own, processes=2, config=config)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(Path(own["output_dir"], "train.json").read_text())
    assert (told["processes"], told["engine"]) == (2, ENGINES[config])
    return own


def assert_same(expected, got, name, tolerance):
    for key in ("loss", "eval_loss", "grad_norm"):
        wanted, found = records(expected, key), records(got, key)
        assert wanted.keys() == found.keys()
        worst = max(abs(found[step] / wanted[step] - 1) for step in wanted)
        assert worst < tolerance, f"{key} differs by {worst}"
    assert records(expected, "wer_raw") == records(got, "wer_raw")
    file = f"{name}/adapter_model.safetensors" if name == "adapter" else f"{name}/model.safetensors"
    wanted = load_file(Path(expected["output_dir"], file))
    found = load_file(Path(got["output_dir"], file))
    assert wanted.keys() == found.keys()
    for key, value in wanted.items():
        difference = (found[key] - value).abs().max().item()
        assert difference < 1e-3, f"{key} differs by {difference}"


@pytest.mark.parametrize("config", ENGINES)
def test_two_processes_under_any_engine_train_as_one(options, one, config):
    assert_same(one, run_two(options, config), "adapter", 1e-4)


@pytest.mark.parametrize("config", ["cpu", "deepspeed_zero2", "deepspeed_zero3", "fsdp2"])
def test_full_fine_tuning_under_any_engine_is_that_of_one_process(options, one_full, config):
    assert_same(one_full, run_two(options, config, **FULL), "model", 1e-4)


HALF = ["deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "fsdp2"]


@pytest.mark.parametrize("config", HALF)
def test_half_precision_is_close_to_single_and_not_the_same(options, one_full, config):
    own = run_two(options, config, **FULL, precision="bf16", eval_every=100)
    expected, got = records(one_full, "loss"), records(own, "loss")
    differences = [abs(got[step] / expected[step] - 1) for step in expected]
    assert 1e-6 < max(differences) < 0.03, differences


@pytest.mark.parametrize(("config", "quantize"), [("cpu", "nf4"), ("deepspeed_zero2", "int8")])
def test_a_quantised_base_trains_under_engines_that_hold_it_whole(options, config, quantize):
    own = run_two(options, config, quantize=quantize, max_steps=3, resume="never")
    assert all(math.isfinite(loss) for loss in records(own, "loss").values())


@pytest.mark.parametrize("config", ["deepspeed_zero3", "fsdp2"])
def test_a_quantised_base_is_refused_with_the_reason_where_weights_are_cut(options, config):
    done = launch.run("train_lora.py", options | {"quantize": "nf4"}, processes=2, config=config)
    assert done.returncode
    assert "error: --quantize nf4: " in done.stderr
    assert "take DDP, ZeRO-1 or ZeRO-2" in done.stderr


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (("deepspeed_zero3", 2), ("cpu", 1)),
        (("fsdp2", 2), ("deepspeed_zero2", 2)),
        (("cpu", 1), ("fsdp2", 2)),
        (("cpu", 4), ("cpu", 2)),
        (("cpu", 1), ("deepspeed_zero3", 3)),  # parts are padded: 3 does not divide what is trained
    ],
)
def test_a_run_goes_on_with_other_processes_and_another_engine(options, one, folder, first, then):
    """Stopped by a signal in the second of 6 steps."""
    own = options | {"output_dir": str(folder / f"from_{first}_to_{then}")}
    for (config, processes), stops in ((first, True), (then, False)):
        script = "tests/stop_after.py" if stops else "train_lora.py"
        done = launch.run(script, own, processes=processes, config=config)
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("stopped by SIGTERM after step 2" in done.stdout) == stops, done.stdout
    assert "resumed at step 2" in done.stdout
    assert_same(one, own, "adapter", 1e-4)


@pytest.mark.parametrize(
    ("script", "config"),
    [
        ("train_lora", "cpu"),
        ("train_lora", "deepspeed_zero2"),
        ("train_lora", "fsdp2"),
        ("eval_wer", "cpu"),
    ],
)
def test_no_thread_of_gloo_outlives_the_interpreter(options, folder, config, script):
    """One that lets a tensor go after it ends the process with SIGSEGV or SIGABRT."""
    own = options | {"output_dir": str(folder / f"threads_{script}_{config}"), "max_steps": 1}
    if script == "eval_wer":
        own = {name: own[name] for name in ("model", "data_dir", "output_dir", "num_workers")}
        own["panels"] = False
    words = launch.command("tests/threads_at_exit.py", own, processes=2, config=config)
    words.insert(words.index("tests/threads_at_exit.py") + 1, script)
    done = launch.finish(words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("threads of gloo at exit: []") == 2, done.stdout


def test_a_whole_model_is_saved_as_plain_transformers_loads_it_and_is_scored(one_full, tmp_path):
    saved = f"{one_full['output_dir']}/model"
    tuned = WhisperForConditionalGeneration.from_pretrained(saved, dtype=torch.float32)
    base = WhisperForConditionalGeneration.from_pretrained(one_full["model"], dtype=torch.float32)
    moved = dict(tuned.named_parameters())
    for name, weight in base.named_parameters():
        fixed = name == "model.encoder.embed_positions.weight"
        assert torch.equal(moved[name], weight) == fixed, name
    eval_wer.main(
        eval_wer.Config(
            model=saved, data_dir=one_full["data_dir"], output_dir=str(tmp_path / "wer"),
            split="validation", num_workers=0, panels=False,
        )
    )  # fmt: skip
    scored = json.loads((tmp_path / "wer" / "wer.json").read_text(encoding="utf-8"))
    last = records(one_full, "wer_raw")[one_full["max_steps"]]
    assert scored["base"]["normalisers"]["raw"]["wer"] == last


def test_a_frozen_encoder_stays_as_it_is_and_the_decoder_learns(options, folder):
    own = options | FULL | {"tune": "encoder_frozen", "output_dir": str(folder / "frozen")}
    train(own)
    saved = WhisperForConditionalGeneration.from_pretrained(f"{own['output_dir']}/model")
    base = WhisperForConditionalGeneration.from_pretrained(own["model"])
    moved = dict(saved.named_parameters())
    for name, weight in base.named_parameters():
        assert torch.equal(moved[name], weight) == name.startswith("model.encoder."), name
    plain = dict.fromkeys(AUGMENTED, 0)
    cached = own | plain | {"cache_encoder": True, "output_dir": str(folder / "cached")}
    train(cached)
    assert math.isfinite(records(cached, "loss")[own["max_steps"]])
