"""When a run stops before its end: signals and time limits, agreed on by all processes.

The first SIGTERM or SIGINT asks for a stop after the step that is under way; the second ends the
process at once. Where STOPPED_BY_FILE is set, every process leaves the signal's name in that file:
whoever started it may be on a machine that got no signal, and the exit code is that of success.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType

import psutil
import torch
from accelerate import Accelerator

SAME_SIGNAL_SECONDS = 2.0  # a terminal and a launcher both pass on one Ctrl-C
SAVE_FACTOR = 2.0  # a save may take so many times as long as the longest so far
FIRST_SAVE_SECONDS = 5.0  # that are kept free for the first one


@dataclass
class Stop:
    """What asks for an end or a checkpoint, in this process."""

    max_seconds: float  # of the process's life; 0 has no limit
    save_every_seconds: float  # 0 saves by steps only
    group: torch.distributed.ProcessGroup | None = None  # of CPUs; no GPU is waited for
    signal_number: int = 0
    signal_at: float = 0.0
    started: float = field(default_factory=time.monotonic)  # a clock that never jumps
    saved_at: float = field(default_factory=time.monotonic)
    longest_step: float = 0.0
    longest_save: float = FIRST_SAVE_SECONDS

    def hear(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler."""
        now = time.monotonic()
        if self.signal_number and now - self.signal_at > SAME_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.signal_number:
            self.signal_number, self.signal_at = number, now

    def saved(self, seconds: float) -> None:
        """A checkpoint was just written, in so many seconds."""
        self.saved_at, self.longest_save = time.monotonic(), max(self.longest_save, seconds)

    def all(self, flag: bool) -> bool:
        """Whether all processes say so; each must ask."""
        if self.group is None:
            return flag
        agreed = torch.tensor(flag, dtype=torch.int32)
        torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MIN, group=self.group)
        return bool(agreed)

    def join(self, accelerator: Accelerator, timeout_minutes: float) -> None:
        """From here on all processes agree; each waits so many minutes for the others."""
        if accelerator.num_processes > 1:
            timeout = timedelta(minutes=timeout_minutes)
            self.group = torch.distributed.new_group(backend="gloo", timeout=timeout)

    def leave(self) -> None:
        """From here on each process is alone; the group can end."""
        self.group = None


@contextmanager
def listen(*, max_minutes: float, save_every_minutes: float) -> Iterator[Stop]:
    """Hear SIGTERM and SIGINT while the block runs."""
    stop = Stop(60 * max_minutes, 60 * save_every_minutes)
    stop.started -= max(0.0, time.time() - psutil.Process().create_time())
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, stop.hear) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def agree(stop: Stop, step_seconds: float) -> tuple[str, bool]:
    """After a step, the same on all processes: why to stop ("" to go on), whether to save.

    Args:
        step_seconds: that this process's step took.
    """
    now = time.monotonic()
    stop.longest_step = max(stop.longest_step, step_seconds)
    left = stop.max_seconds - (now - stop.started)
    needed = stop.longest_step + SAVE_FACTOR * stop.longest_save
    flags = torch.tensor(
        [
            stop.signal_number,
            stop.max_seconds > 0 and left < needed,
            0 < stop.save_every_seconds <= now - stop.saved_at,
        ],
        dtype=torch.int32,
    )
    if stop.group is not None:
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=stop.group)
    number, late, save = flags.tolist()
    if number:
        name = signal.Signals(number).name
        if note := os.environ.get("STOPPED_BY_FILE"):
            Path(note).write_text(name)
        return name, bool(save)
    return "--max_minutes" if late else "", bool(save)
