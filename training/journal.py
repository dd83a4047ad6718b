"""What a run reports while it trains: metrics.jsonl, TensorBoard, a line or a bar."""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from common.accelerator import say
from common.files import write_text
from common.memory import MemoryPlan
from training import engine
from training.meter import Meter
from training.plan import TrainPlan
from training.sharded import trained_parameters
from training.step import TrainState


@dataclass
class Journal:
    """The open places that records go to; rank 0 alone writes."""

    accelerator: Accelerator
    metrics: Path  # metrics.jsonl
    bar: tqdm
    last: dict[str, float] = field(default_factory=dict)  # newest value of every key


def open_journal(
    accelerator: Accelerator, folder: Path, *, done: int, total: int, evaluated: bool = True
) -> Journal:
    """Start or continue `folder/metrics.jsonl` and `folder/tensorboard` after `done` steps.

    What an interrupted run recorded beyond `done`, the run will record again; evaluations after
    step `done` as well, where it has them before it.
    """
    metrics, leader = folder / "metrics.jsonl", accelerator.is_main_process
    if leader:
        folder.mkdir(parents=True, exist_ok=True)
        _keep_until(metrics, done if done else -1, evaluated)
    accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": done + 1}})
    bar = tqdm(
        total=total,
        initial=done,
        desc="training",
        dynamic_ncols=True,
        disable=not (leader and sys.stderr.isatty()),
    )
    return Journal(accelerator, metrics, bar)


def _keep_until(metrics: Path, last_step: int, evaluated: bool) -> None:
    if not metrics.exists():
        return
    lines = metrics.read_text(encoding="utf-8").split("\n")[:-1]  # a torn last line has no end
    kept = []
    for line in lines:
        record = json.loads(line)
        done_again = record["step"] == last_step and not evaluated and "loss" not in record
        if record["step"] <= last_step and not done_again:
            kept.append(line)
    write_text(metrics, "".join(f"{line}\n" for line in kept))


def announce(
    state: TrainState, plan: TrainPlan, fitted: MemoryPlan, *, total_steps: int, weights: str
) -> None:
    """Say what is about to be trained.

    Args:
        fitted: the micro-batch.
        weights: precision and quantisation.
    """
    accelerator = state.accelerator
    num_trainable = sum(param.numel() for param in trained_parameters(state.model).values())
    say(
        accelerator,
        f"{len(plan.seconds)} clips, {plan.seconds.sum() / 3600:.2f} hours; {total_steps} steps of "
        f"{plan.global_batch_size} clips on {accelerator.num_processes} processes "
        f"({engine.name(accelerator)}); {num_trainable:,} trainable parameters; "
        f"{accelerator.device.type}, {weights}\n"
        f"micro-batches of {fitted.max_batch_seconds:g} s of window, "
        f"{fitted.predicted_gib:.1f} GiB at most by formula"
        + (", gradient checkpointing" if fitted.checkpointing else ""),
    )


def log(journal: Journal, record: dict[str, float]) -> None:
    """One object in metrics.jsonl, one line of `key=value`, and TensorBoard.

    Args:
        record: `step`, and numbers under stable names.
    """
    journal.last |= record
    scalars = {key: value for key, value in record.items() if key != "step"}
    journal.accelerator.log(scalars, step=int(record["step"]))
    if not journal.accelerator.is_main_process:
        return
    with journal.metrics.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    journal.bar.write(" ".join(f"{key}={_short(value)}" for key, value in record.items()))


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.5g}"


def log_text(journal: Journal, name: str, text: str, step: int) -> None:
    """Show a text in TensorBoard."""
    if journal.accelerator.is_main_process:
        writer = journal.accelerator.get_tracker("tensorboard", unwrap=True)
        writer.add_text(name, text, step)


def log_rates(journal: Journal, meter: Meter, *, step: int, epoch: float, rate: float) -> None:
    """Log loss and speed since the last log line, and restart the meter. All processes must call.

    Args:
        rate: learning rate of the last step.
    """
    accelerator = journal.accelerator
    rates = meter.rates(accelerator.reduce(meter.loss).item(), rate)
    shown = f"{rates.get('loss', math.nan):.3f}"
    journal.bar.set_postfix(loss=shown, clips_s=f"{rates['clips_per_second']:.1f}")
    record = {"step": step, "epoch": epoch} | rates
    if accelerator.scaler is not None:
        record["skipped_steps"] = meter.skipped
    log(journal, record)
    meter.restart()
