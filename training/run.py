"""A run: what it is made of, how it starts or resumes, and how it ends."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common import memory
from common.accelerator import say
from common.collator import SpeechCollator
from common.files import write_json
from training import engine
from training import output as outputs
from training.data import Data
from training.encoder_cache import EncoderCache, load_or_fill
from training.journal import Journal, open_journal
from training.meter import Meter
from training.occasions import Every, occasions
from training.output import Output
from training.plan import TrainPlan
from training.step import TrainState
from training.validation import Validation, evaluate, rehearse


@dataclass(frozen=True)
class Run:
    """What a run is made of, besides its options."""

    state: TrainState
    data: Data
    validation: Validation | None
    collate: SpeechCollator
    plan: TrainPlan
    total_steps: int
    every: Every
    output: Output
    reload: Callable[[], torch.nn.Module]  # loads the model anew, for engines that shard it


def start(run: Run, resumed_from: str, saved: dict[str, Any]) -> tuple[Journal, Meter]:
    """Resume from a checkpoint and make up for its evaluation, or rehearse what may fail later.

    Args:
        resumed_from, saved: folder ("" for none) and state, as `checkpoint.agree` gives them.
    """
    accelerator, done = run.state.accelerator, saved["step"]
    if accelerator.is_main_process and not resumed_from:
        shutil.rmtree(run.output.checkpoints, ignore_errors=True)
    accelerator.wait_for_everyone()
    journal = open_journal(
        accelerator, run.output.folder, done=done, total=run.total_steps,
        evaluated=saved["evaluated"],
    )  # fmt: skip
    meter = Meter(torch.zeros((), device=accelerator.device))
    if not resumed_from:
        if run.validation is None:
            say(accelerator, "no validation split: no validation loss, no adapter_best")
        else:
            rehearse(run.validation, run.state)
        return journal, meter
    outputs.restore(Path(resumed_from), saved, run.state, meter)
    run.output.without_better = saved.get("without_better", 0)
    say(accelerator, f"resumed at step {done} from {resumed_from}")
    due = occasions(done, run.total_steps, run.every)
    if due.last:
        outputs.save_model(run.output, run.state, done)
    if due.evaluate and not saved["evaluated"]:  # stopped before
        evaluate(due, done, run.validation, run.state, run.output, journal)
    if run.output.exhausted and not due.last:
        outputs.save_model(run.output, run.state, done)
    return journal, meter


def cache_outputs(
    run: Run, cache_dir: str, *, dtype: torch.dtype, num_workers: int
) -> EncoderCache:
    """The outputs of a frozen encoder for all training clips.

    Args:
        cache_dir: "" is a folder within the run's.
    """
    output, plan = run.output, run.plan
    identity = {
        "model": output.source,
        "base_probe": output.provenance["base_probe"],
        "data_dir": output.identity["data_dir"],
    }
    return load_or_fill(
        Path(cache_dir or output.folder / "encoder_cache"), identity, run.state, run.reload,
        run.data.train, run.collate, window_mode=plan.window_mode, dtype=dtype,
        batch_seconds=plan.max_batch_seconds, num_workers=num_workers,
    )  # fmt: skip


def finish(
    run: Run,
    meter: Meter,
    journal: Journal,
    done: int,
    reason: str,
    *,
    started: float,
    cache: EncoderCache | None,
) -> None:
    """Say how a run ended, and write train.json if it is complete.

    Args:
        done: steps.
        reason: that it was asked to stop for, if it was.
        started: by the performance counter.
    """
    output, accelerator = run.output, run.state.accelerator
    if done < run.total_steps and not output.exhausted:
        saved = f"stopped by {reason} after step {done}, saved"
        say(accelerator, f"{saved}: run the same command to resume")
        return
    ended_by = f"--patience {output.patience}" if output.exhausted else ""
    if ended_by:
        say(accelerator, f"ended by {ended_by} after step {done}: no better model since")
    figures = {
        "steps": done,
        "ended_by": ended_by,
        "wall_seconds": time.perf_counter() - started,
        "first_step_seconds": meter.first_step_seconds,
        "encoder_cache_seconds": cache and cache.seconds,
        "peak_memory_gib": memory.peak_memory_gib(),
        "processes": accelerator.num_processes,
        "engine": engine.name(accelerator),
        "skipped_steps": meter.skipped,
        "criterion": output.criterion,
        "best": output.best,
        "last": journal.last,
    }
    if accelerator.is_main_process:
        write_json(output.folder / "train.json", figures | output.provenance)
    say(accelerator, f"{output.kind} in {output.folder}, figures in train.json")
