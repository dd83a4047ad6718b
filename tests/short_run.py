"""Train on the tiny corpus in this process, and read what the run left."""

import json
from pathlib import Path
from typing import Any

import train_lora

SMALL = {
    "max_steps": 6,
    "global_batch_size": 4,
    "log_every": 1,
    "lora_rank": 4,
    "lora_alpha": 8,
    "num_workers": 0,
    "memory_gib": 4.0,  # not what other processes of the machine leave
}
AUGMENTED = {  # all that is drawn for clips
    "nospeech_share": 0.4,
    "speed": 0.1,
    "spec_augment": True,
}


def small_options(
    checkpoint: Path, prepared: Path, tmp_path: Path, **more: object
) -> dict[str, Any]:
    """Options of a short run into `tmp_path / "run"`."""
    folders = {"model": checkpoint, "data_dir": prepared, "output_dir": tmp_path / "run"}
    return {name: str(path) for name, path in folders.items()} | SMALL | more


def train(options: dict[str, Any]) -> None:
    train_lora.main(train_lora.Config(**options))


def records(options: dict[str, Any], key: str) -> dict[int, float]:
    """A figure of metrics.jsonl by step."""
    text = Path(options["output_dir"], "metrics.jsonl").read_text(encoding="utf-8")
    return {one["step"]: one[key] for one in map(json.loads, text.splitlines()) if key in one}
