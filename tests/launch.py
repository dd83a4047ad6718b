"""Run a script as a user does, alone or as processes that really talk to each other."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import warm

ROOT = Path(__file__).resolve().parent.parent


def command(
    script: str, options: dict[str, object], *, processes: int = 1, config: str = "cpu"
) -> list[str]:
    """`script --key value ...`; with several processes under `accelerate launch` and a config."""
    words = [script, *(word for key, value in options.items() for word in (f"--{key}", str(value)))]
    if processes == 1:
        return [sys.executable, *words]
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", f"accelerate_configs/{config}.yaml", "--mixed_precision", "no"]
    return [*launch, "--num_processes", str(processes), "--main_process_port", "0", *words]


def start(words: list[str], **options: Any) -> subprocess.Popen:
    """Start a command from the project's folder, one thread a process, output kept."""
    keep = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    begin = subprocess.Popen if torch.cuda.is_available() else warm.start  # CUDA does not fork
    return begin(words, **{"cwd": ROOT, "env": environment()} | keep | options)


def environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(
    script: str, options: dict[str, object], *, processes: int = 1, config: str = "cpu"
) -> subprocess.CompletedProcess:
    """Run `script --key value ...` to its end; several processes really talk over gloo."""
    return finish(command(script, options, processes=processes, config=config))


def finish(words: list[str]) -> subprocess.CompletedProcess:
    """Run a command to its end."""
    process = start(words)
    out, err = process.communicate()
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def ranks(launcher: subprocess.Popen | psutil.Process) -> list[psutil.Process]:
    """The training processes under `accelerate launch`, not those that read audio for them."""
    children = psutil.Process(launcher.pid).children()
    started = [child for child in children if child.name() != warm.SERVER]
    return sorted(started, key=lambda child: child.pid)


def descendants(process: subprocess.Popen) -> list[psutil.Process]:
    """A process and all below it."""
    top = psutil.Process(process.pid)
    return [top, *top.children(recursive=True)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(there: Callable[[], bool], process: subprocess.Popen, seconds: float = 300.0) -> None:
    """Wait until `there()`; fails where the process ends or time runs out before."""
    deadline = time.monotonic() + seconds
    while not there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of `size` bytes (`400k`, `1m`) at a new folder; skips without root."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def read_only(folder: Path, place: Path) -> Iterator[Path]:
    """`folder` as a read-only file system at a new `place`; skips without root."""
    place.mkdir()
    bound = subprocess.run(["mount", "--bind", str(folder), str(place)], capture_output=True)
    if os.geteuid() or bound.returncode:
        pytest.skip("needs the right to mount")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(place)], check=True)
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)
