"""Checkpoints: what is trained, the optimizer and the position, never a frozen base.

A checkpoint is a folder `step-00000120` that appears at once, complete: it is written under another
name, flushed to the disk and renamed. Its tensors are whole, so any number of processes under any
engine can resume from it. Random numbers need no state of their own: they are drawn anew at every
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
from accelerate.utils import broadcast, broadcast_object_list
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file

from common import trained_on as trained_on_file
from common.accelerator import say
from common.cli import UserError
from common.files import IGNORED, new_folder, remove_folder, write_json
from training import lora, sharded

# Options that a resumed run may change: none of them changes what is computed, but for rounding.
FREE_ON_RESUME = {
    "output_dir", "resume", "num_workers", "log_every", "save_every", "eval_every", "wer_every",
    "keep_checkpoints", "max_batch_seconds", "memory_gib", "save_every_minutes", "max_minutes",
    "resume_changed", "collective_timeout", "cache_dir", "patience",
}  # fmt: skip
STATE = "state.json"
TENSORS = (sharded.WEIGHTS, *sharded.MOMENTS)  # a file of each


def identify(
    options: dict[str, Any], accelerator: Accelerator, report: dict[str, Any]
) -> dict[str, Any]:
    """What a resumed run must share with the interrupted one.

    Args:
        options: of the script, by name.
        report: preprocess.json of the data.
    """
    kept = {name: value for name, value in options.items() if name not in FREE_ON_RESUME}
    digest = hashlib.sha256(json.dumps(report).encode()).hexdigest()[:16]
    return kept | {"precision": accelerator.mixed_precision, "data_dir": digest}


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
    leader, parameters = accelerator.is_main_process, sharded.trained_parameters(model)
    gatherers = {kind: partial(sharded.moment, optimizer, kind) for kind in sharded.MOMENTS}
    gatherers[sharded.WEIGHTS] = sharded.whole
    with ExitStack() as stack:
        if leader:
            written = stack.enter_context(new_folder(folder / f"step-{step:08d}"))
        for kind in TENSORS:  # one after the other: a whole model's do not fit the memory at once
            tensors = _gather(accelerator, parameters, gatherers[kind])
            if leader:
                save_file(tensors, written / _file(kind))
        if leader:
            digests = {kind: _digest(written / _file(kind)) for kind in TENSORS}
            steps = sharded.steps_taken(optimizer)
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
        tensor = whole(parameter)
        if accelerator.is_main_process:
            tensors[name] = tensor.detach().cpu().contiguous()
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
        identity: as `identify` gives it.
        changed_too: resume although some of them differ.

    Raises:
        UserError: naming the options that differ.
    """
    warnings = []
    for newest in reversed(_folders(folder)):
        damage = _damage(newest)
        if damage:
            warnings.append(f"warning: {newest} is skipped: {damage}")
            continue
        before = read_state(newest)["identity"]
        changed = [
            f"--{name} {value} (was {before.get(name)})"
            for name, value in identity.items()
            if value != before.get(name, type(value)())  # an option that is newer was off: 0 or ""
        ]
        if changed and not changed_too:
            raise UserError(
                f"--output_dir {folder.parent}: holds a run with other options: "
                f"{', '.join(changed)}: restore them, give another folder, --resume never, or "
                "--resume_changed true to resume all the same"
            )
        if changed:
            warnings.append(f"warning: resumes with other options: {', '.join(changed)}")
        return newest, warnings
    return None, warnings


def agree(
    folder: Path, identity: dict[str, Any], accelerator: Accelerator, *, resume: str, changed: bool
) -> tuple[str, dict[str, Any]]:
    """The checkpoint to resume from ("" for none) and its state, as the first process finds them.

    All processes must call.

    Args:
        resume, changed: --resume and --resume_changed.
    """
    start = {"step": 0, "best": None, "loss": 0.0, "tokens": 0, "evaluated": True}
    answer: list[Any] = ["", start, ""]  # path, state, problem
    if accelerator.is_main_process and resume == "auto":
        try:
            newest, warnings = find(folder, identity, changed_too=changed)
            for warning in warnings:
                say(accelerator, warning)
            if newest is not None:
                answer[:2] = [str(newest), read_state(newest)]
        except UserError as error:
            answer[2] = str(error)
    path, state, problem = broadcast_object_list(answer)
    if problem:
        raise UserError(problem)
    return path, state


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
    parameters = sharded.trained_parameters(model)
    shapes = {name: list(_shape(parameter)) for name, parameter in parameters.items()}
    with ExitStack() as stack:
        files = {}
        if accelerator.is_main_process:
            files = {
                kind: stack.enter_context(safe_open(checkpoint / _file(kind), "pt"))
                for kind in TENSORS
            }
            weights = files[sharded.WEIGHTS]
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
            sharded.restore(optimizer, parameters, read, steps)


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty tensor


def save_model(
    folder: Path,
    accelerator: Accelerator,
    model: torch.nn.Module,
    source: str,
    made: dict[str, Any],
    trained_on: bytes,
) -> None:
    """Write the adapter, or the whole model, with its provenance and training clips beside it.

    All processes must call.
    """
    if isinstance(model, PeftModel):
        parameters = sharded.trained_parameters(model)
    else:
        parameters = dict(model.named_parameters())
    weights = _gather(accelerator, parameters, sharded.whole)
    if accelerator.is_main_process:
        with new_folder(folder) as written:
            lora.save(written, model, weights, source)
            write_json(written / "recipe.json", made)
            (written / trained_on_file.NAME).write_bytes(trained_on)
