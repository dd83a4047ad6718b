"""What the scripts wrote at commit cc58b33 still serves: data, an adapter, an interrupted run.

`data/before_the_rooms` was written there on 10 tones, with the checkpoint of `tiny.py`: `run` is a
run of 4 steps, of whose checkpoints only that of step 2 is kept.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eval_wer
import train_lora
from common import batching
from common.windows import DecodeMargin
from training import validation

WRITTEN = Path(__file__).parent / "data" / "before_the_rooms"


@pytest.fixture
def folder(checkpoint, tmp_path, monkeypatch):
    """A working folder as that run had it: paths are relative, and part of its identity."""
    shutil.copytree(WRITTEN, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint").symlink_to(checkpoint)
    monkeypatch.setattr(batching, "TRAIN_MARGIN", (32, 160))  # its windows were longer
    monkeypatch.setattr(validation, "TRAINED", DecodeMargin(margin=64, floor=0))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_interrupted_run_resumes_to_the_same_losses_and_the_same_adapter(folder):
    expected = load_file(folder / "run" / "adapter" / "adapter_model.safetensors")
    before = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    shutil.rmtree("run/adapter")
    train_lora.main(
        train_lora.Config(
            model="checkpoint",
            data_dir="prepared",
            output_dir="run",
            max_steps=4,
            global_batch_size=3,
            log_every=1,
            lora_rank=2,
            lora_alpha=4,
            lora_targets="q_proj,v_proj",  # the defaults of then
            nospeech_share=0.0,
            num_workers=0,
            eval_every=2,
            save_every=2,
            precision="fp32",
        )
    )
    adapter = load_file(folder / "run" / "adapter" / "adapter_model.safetensors")
    assert adapter.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(adapter[name], value, rtol=1e-4, atol=1e-6)
    after = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    added = {"wer_raw_low", "wer_raw_high"}  # since then
    assert [line.keys() - added for line in after] == [line.keys() for line in before]
    for key in ("loss", "grad_norm", "eval_loss", "wer_raw"):
        values = [[line[key] for line in lines if key in line] for lines in (before, after)]
        assert values[1] == pytest.approx(values[0], rel=1e-4), key


def test_its_adapter_is_scored_at_the_windows_of_its_own_record(folder):
    eval_wer.main(
        eval_wer.Config(
            model="checkpoint",
            adapter="run/adapter",
            data_dir="prepared",
            output_dir="wer",
            precision="fp32",
            num_workers=0,
            panels=False,
        )
    )
    adapter = json.loads((folder / "wer" / "wer.json").read_text())["adapter"]
    assert (adapter["clips"], adapter["window"]) == (2, "natural")
