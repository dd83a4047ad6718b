"""Checkpoints: the adapter, the optimizer and the position, never the frozen base.

A checkpoint is a folder `step-00000120` that appears at once, complete: it is written under another
name, flushed to the disk and renamed. Random numbers need no state of their own: they are drawn
anew at every step from seed, step and rank, so seed and position are that state.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from common import whisper
from common.cli import UserError
from common.files import new_folder, write_json

ADAPTER, OPTIMIZER, STATE = "adapter.safetensors", "optimizer.safetensors", "state.json"


def save(
    folder: Path,
    *,
    step: int,
    model: whisper.PeftModel,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> None:
    """Write `folder/step-...` and delete all but the newest `keep` once it is complete.

    Args:
        state: all else that a resumed run needs, as JSON.
    """
    with new_folder(folder / f"step-{step:08d}") as partial:
        save_file(whisper.adapter_tensors(model), partial / ADAPTER)
        moments = {
            f"{index}.{name}": value.cpu().contiguous()
            for index, values in optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }
        save_file(moments, partial / OPTIMIZER)
        write_json(partial / STATE, {"step": step} | state)
    for old in complete(folder)[:-keep]:
        shutil.rmtree(old)


def complete(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest first."""
    found = [path.parent for path in folder.glob(f"step-*/{STATE}")]
    return sorted(path for path in found if not path.suffix)


def find(folder: Path, identity: dict[str, Any]) -> Path | None:
    """The newest complete checkpoint in `folder`, if any.

    Args:
        identity: what a resumed run must share with the interrupted one: options by name, and for
            `data_dir` a digest of its preprocess.json.

    Raises:
        UserError: naming the options that differ.
    """
    found = complete(folder)
    if not found:
        return None
    before = read_state(found[-1])["identity"]
    changed = [
        f"--{name} {value} (was {before.get(name)})"
        for name, value in identity.items()
        if value != before.get(name)
    ]
    if changed:
        raise UserError(
            f"--output_dir {folder.parent}: holds a run with other options: {', '.join(changed)}: "
            "restore them, give another folder or --resume never"
        )
    return found[-1]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as `state`, and the step."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def restore(checkpoint: Path, model: whisper.PeftModel, optimizer: torch.optim.Optimizer) -> None:
    """Put the adapter's weights and the optimizer's moments back in place."""
    whisper.set_adapter_tensors(model, load_file(checkpoint / ADAPTER))
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(checkpoint / OPTIMIZER).items():
        index, name = key.split(".", 1)
        moments.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def save_adapter(folder: Path, model: whisper.PeftModel, made: dict[str, Any]) -> None:
    """Write the adapter as plain PEFT loads it, with `made` (its recipe) beside it."""
    with new_folder(folder) as partial:
        model.save_pretrained(partial)
        (partial / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        write_json(partial / "recipe.json", made)
