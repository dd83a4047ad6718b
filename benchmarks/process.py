"""Commands that are measured: where they write, their time and their tree's peak memory."""

import contextlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from common.cli import UserError

SAMPLE_SECONDS = 0.25
MAX_SAMPLING = 0.02  # of the time: to sum the pages of 5 GiB takes 0.1 s of a core
SHOWN_LINES = 20  # of a failed command's output


def new_output(output_dir: str) -> Path:
    """The whole path of `--output_dir`, where nothing may be yet."""
    output = Path(output_dir).resolve()
    if output.exists():
        raise UserError(f"--output_dir {output_dir}: exists: give a new folder")
    return output


@dataclass(frozen=True)
class Measured:
    """What a command cost."""

    seconds: float  # wall clock, start-up included
    cpu_seconds: float  # user and system, of the processes that it waited for as well
    peak_memory_gib: float  # proportional set size of the tree: pages shared are counted once


def run(words: Sequence[Any], log: Path, environment: Mapping[str, str] | None = None) -> Measured:
    """Run `words` with this Python, its output into `log`, `environment` set on top.

    Raises:
        RuntimeError: it failed; the message ends with its last lines.
    """
    start, cpu, peak = time.perf_counter(), ended_cpu_seconds(), 0
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, *map(str, words)]
        around = os.environ | dict(environment or {})
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=around)
        while process.poll() is None:
            before = time.process_time()
            peak = max(peak, tree_bytes(process.pid))
            cost = time.process_time() - before
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(SAMPLE_SECONDS, cost / MAX_SAMPLING))
    if process.returncode:
        last = "\n".join(log.read_text(encoding="utf-8").splitlines()[-SHOWN_LINES:])
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{last}")
    cpu_seconds = ended_cpu_seconds() - cpu
    return Measured(time.perf_counter() - start, cpu_seconds, peak / 2**30)


def ended_cpu_seconds() -> float:
    """CPU seconds of all commands of this process that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def tree_bytes(pid: int) -> int:
    """Proportional set size of a process and all below it, now."""
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    return sum(_bytes(process) for process in tree)


def _bytes(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0
