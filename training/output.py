"""What a run leaves in its folder: checkpoints to resume from, the adapter, the best adapter."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training import checkpoint
from training.meter import Meter
from training.occasions import Occasions
from training.step import TrainState
from training.stop import Stop


@dataclass
class Output:
    """The folder of a run, and what is written beside its models and checkpoints."""

    folder: Path
    kind: str  # "adapter" or "model"
    source: str  # checkpoint of the base, whose tokenizer goes with a whole model
    provenance: dict[str, Any]  # beside each model: options as used, versions, base, window
    identity: dict[str, Any]  # in each checkpoint: what a resumed run must share
    trained_on: bytes  # beside each model: hashes of the training clips; empty but on rank 0
    keep_checkpoints: int
    best: dict[str, float] | None = None  # step and criterion of the best model so far
    criterion: str = "eval_loss"  # or "wer_raw": what the best model is chosen by
    patience: int = 0  # evaluations in a row without a better model that end the run; 0: none
    without_better: int = 0  # evaluations since the best model

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def exhausted(self) -> bool:
        """Whether the run ends here, because its validation has stopped improving."""
        return 0 < self.patience <= self.without_better


def save_model(output: Output, state: TrainState, step: int, name: str = "") -> None:
    """Write OUTPUT_DIR/adapter, adapter_best, model or model_best. All processes must call."""
    folder = output.folder / (f"{output.kind}_{name}" if name else output.kind)
    made = output.provenance | {"step": step, "criterion": output.criterion}
    checkpoint.save_model(
        folder, state.accelerator, state.model, output.source, made, output.trained_on
    )


def keep_best(output: Output, state: TrainState, step: int, value: float) -> None:
    """Write the model as the best one if its criterion is the lowest so far, else count.

    All processes must call, with the same value. A best model by another criterion, as of a run
    that resumes with another --wer_every, does not count.
    """
    if value < (output.best or {}).get(output.criterion, math.inf):
        output.best = {"step": step, output.criterion: value}
        output.without_better = 0
        save_model(output, state, step, "best")
    else:
        output.without_better += 1


def save_checkpoint(
    output: Output, state: TrainState, meter: Meter, stop: Stop, step: int, *, evaluated: bool
) -> None:
    """Write a checkpoint with the loss since the last log line. All processes must call.

    Args:
        evaluated: whether what is to be evaluated after this step has been.
    """
    start = time.monotonic()
    accelerator = state.accelerator
    scaler = accelerator.scaler
    checkpoint.save(
        output.checkpoints,
        accelerator,
        step=step,
        model=state.model,
        optimizer=state.optimizer,
        state={
            "identity": output.identity,
            "best": output.best,
            "without_better": output.without_better,
            "loss": accelerator.reduce(meter.loss.clone()).item(),
            "tokens": meter.tokens,
            "evaluated": evaluated,
            "scaler": None if scaler is None else scaler.state_dict(),
            "skipped": [meter.skipped, meter.skipped_in_row],
        },
        keep=output.keep_checkpoints,
    )
    stop.saved(time.monotonic() - start)


def save_undue(
    output: Output, state: TrainState, meter: Meter, stop: Stop, step: int, due: Occasions
) -> None:
    """Where --patience ends a run, write what its last step leaves and was not due after it."""
    if not due.save:
        save_checkpoint(output, state, meter, stop, step, evaluated=True)
    if not due.last:
        save_model(output, state, step)


def mark_evaluated(output: Output, state: TrainState, step: int) -> None:
    """Note in the checkpoint of a step, if there is one, that its evaluations are done."""
    if state.accelerator.is_main_process:
        checkpoint.update(
            output.checkpoints, step, evaluated=True, best=output.best,
            without_better=output.without_better,
        )  # fmt: skip


def restore(folder: Path, saved: dict[str, Any], state: TrainState, meter: Meter) -> None:
    """Continue from a checkpoint: weights, optimizer, loss scaler, and what the meter had counted.

    Args:
        folder: of the checkpoint.
        saved: its state, as `checkpoint.agree` gives it.
    """
    accelerator = state.accelerator
    checkpoint.restore(folder, accelerator, state.model, state.optimizer, saved["optimizer_steps"])
    if accelerator.scaler is not None and saved["scaler"]:  # there is none if it was not fp16
        accelerator.scaler.load_state_dict(saved["scaler"])
    meter.skipped, meter.skipped_in_row = saved.get("skipped", (0, 0))
    meter.loss += saved["loss"] if accelerator.is_main_process else 0.0
    meter.tokens = saved["tokens"]
