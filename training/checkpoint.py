"""Checkpoints: what is trained, the optimizer and the position, never a frozen base.

A checkpoint is a folder `step-00000120` that appears at once, complete: it is written under another
name, flushed to the disk and renamed. Its tensors are whole, so any number of processes under any
engine can go on from it. Random numbers need no state of their own: they are drawn anew at every
step from seed, step and clip, so seed and position are that state.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from safetensors import safe_open
from safetensors.torch import save_file

from common import engine, whisper
from common.cli import UserError
from common.files import IGNORED, new_folder, remove_folder, write_json

STATE = "state.json"
TENSORS = (engine.WEIGHTS, *engine.MOMENTS)  # a file of each


def save(
    folder: Path,
    accelerator: Accelerator,
    *,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> None:
    """Write `folder/step-...` and delete all but the newest `keep` once it is complete.

    All processes must call: they gather their parts, and the first one writes.

    Args:
        state: all else that a resumed run needs, as JSON.
    """
    leader, parameters = accelerator.is_main_process, engine.trained_parameters(model)
    gatherers = {kind: partial(engine.moment, optimizer, kind) for kind in engine.MOMENTS}
    gatherers[engine.WEIGHTS] = engine.whole
    with ExitStack() as stack:
        if leader:
            written = stack.enter_context(new_folder(folder / f"step-{step:08d}"))
        for kind in TENSORS:  # one after the other: a whole model's do not fit the memory at once
            tensors = _gather(accelerator, parameters, gatherers[kind])
            if leader:
                save_file(tensors, written / _file(kind))
        if leader:
            digests = {kind: _digest(written / _file(kind)) for kind in TENSORS}
            steps = engine.steps_taken(optimizer)
            record = {"step": step, "optimizer_steps": steps, "sha256": digests} | state
            write_json(written / STATE, record)
    if leader:
        for old in [*_folders(folder)[:-keep], *folder.glob(f"step-*{IGNORED}")]:
            remove_folder(old)  # the latter are what a killed run had begun


def _gather(
    accelerator: Accelerator,
    parameters: dict[str, torch.nn.Parameter],
    whole: Callable[[torch.nn.Parameter], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """What `whole` gives of each parameter, on the first process's CPU; nothing on the others."""
    tensors = {}
    for name, parameter in parameters.items():
        found = whole(parameter)
        if accelerator.is_main_process:
            tensors[name] = found.detach().cpu().contiguous()
    return tensors


def _file(kind: str) -> str:
    return f"{kind}.safetensors"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folders(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and not path.suffix)


def _damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint; empty for a whole one."""
    try:
        digests = read_state(checkpoint)["sha256"]
        for kind in TENSORS:
            if _digest(checkpoint / _file(kind)) != digests[kind]:
                return f"{_file(kind)} is not as it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{STATE} cannot be read ({type(error).__name__})"
    return ""


def find(
    folder: Path, identity: dict[str, Any], *, changed_too: bool = False
) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in `folder`, if any, and warnings to be shown.

    Args:
        identity: what a resumed run must share with the interrupted one: options by name, and for
            `data_dir` a digest of its preprocess.json.
        changed_too: go on although some differ.

    Raises:
        UserError: naming the options that differ.
    """
    warnings = []
    for found in reversed(_folders(folder)):
        damage = _damage(found)
        if damage:
            warnings.append(f"warning: {found} is skipped: {damage}")
            continue
        before = read_state(found)["identity"]
        changed = [
            f"--{name} {value} (was {before.get(name)})"
            for name, value in identity.items()
            if value != before.get(name)
        ]
        if changed and not changed_too:
            raise UserError(
                f"--output_dir {folder.parent}: holds a run with other options: "
                f"{', '.join(changed)}: restore them, give another folder, --resume never, or "
                "--resume_changed true to go on all the same"
            )
        if changed:
            warnings.append(f"warning: goes on with other options: {', '.join(changed)}")
        return found, warnings
    return None, warnings


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as `state`, the step, and what the optimizer counts."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def update(folder: Path, step: int, **state: Any) -> None:
    """Change a part of the state of a step's checkpoint, where there is one."""
    file = folder / f"step-{step:08d}" / STATE
    if file.is_file():
        write_json(file, json.loads(file.read_text(encoding="utf-8")) | state)


def restore(
    checkpoint: Path,
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: float,
) -> None:
    """Put the trained weights and the optimizer's state back in place.

    The first process reads and tells the others: their machines need not see its files.

    Args:
        steps: `optimizer_steps` of the checkpoint's state.

    Raises:
        UserError: the checkpoint is of other parameters, as after --resume_changed true.
    """
    parameters = engine.trained_parameters(model)
    shapes = {name: list(_shape(one)) for name, one in parameters.items()}
    with ExitStack() as stack:
        files = {}
        if accelerator.is_main_process:
            files = {
                kind: stack.enter_context(safe_open(checkpoint / _file(kind), "pt"))
                for kind in TENSORS
            }
            weights = files[engine.WEIGHTS]
            if shapes != {name: weights.get_slice(name).get_shape() for name in weights.keys()}:  # noqa: SIM118
                raise UserError(
                    f"--resume_changed true: {checkpoint} holds other parameters than this run "
                    "trains: restore the options that choose them, or give --resume never"
                )

        def read(kind: str, name: str) -> torch.Tensor:
            if files:
                value = files[kind].get_tensor(name).to(accelerator.device)
            else:
                value = torch.empty(shapes[name], device=accelerator.device)
            return broadcast(value)

        with torch.no_grad():
            engine.restore(optimizer, parameters, read, steps)


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty tensor


def save_model(
    folder: Path,
    accelerator: Accelerator,
    model: torch.nn.Module,
    source: str,
    made: dict[str, Any],
) -> None:
    """Write the adapter, or the whole model, with `made` (its recipe) beside it.

    All processes must call.
    """
    if isinstance(model, whisper.PeftModel):
        parameters = engine.trained_parameters(model)
    else:
        parameters = dict(model.named_parameters())
    weights = _gather(accelerator, parameters, engine.whole)
    if accelerator.is_main_process:
        with new_folder(folder) as written:
            whisper.save(written, model, weights, source)
            write_json(written / "recipe.json", made)
