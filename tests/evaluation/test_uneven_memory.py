"""Processes that see different free memory plan the same batches, from the least of all."""

import launch
import pytest
from short_run import records, small_options, train

import eval_wer

pytestmark = pytest.mark.slow


def run_uneven(script, options, monkeypatch):
    monkeypatch.setenv("SCRIPT", script)
    done = launch.run("tests/uneven_memory.py", options, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_training_and_its_encoder_cache_are_those_of_one_process(
    checkpoint, prepared, tmp_path, monkeypatch
):
    more = {"cache_encoder": True, "lora_scope": "decoder", "eval_every": 3, "memory_gib": 0.0}
    options = small_options(checkpoint, prepared, tmp_path, **more)
    out = run_uneven("train_lora", options, monkeypatch)
    assert "micro-batches of 7 s of window" in out
    one = options | {"output_dir": str(tmp_path / "one"), "max_batch_seconds": 7.0}
    train(one)
    for key in ("loss", "eval_loss"):
        expected, got = records(one, key), records(options, key)
        assert expected.keys() == got.keys()
        worst = max(abs(got[step] / expected[step] - 1) for step in expected)
        assert worst < 1e-4, f"{key} differs by {worst}"
    assert records(one, "wer_raw") == records(options, "wer_raw")


def test_an_evaluation_keeps_every_clip(checkpoint, prepared, tmp_path, monkeypatch):
    options = {
        "model": str(checkpoint), "data_dir": str(prepared), "num_workers": 0,
        "output_dir": str(tmp_path / "two"), "panels": False,
    }  # fmt: skip
    run_uneven("eval_wer", options, monkeypatch)
    one = options | {"output_dir": str(tmp_path / "one")}
    eval_wer.main(eval_wer.Config(**one))
    texts = [(tmp_path / name / "predictions.jsonl").read_text() for name in ("one", "two")]
    assert texts[0] == texts[1]
