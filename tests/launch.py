"""Run a script as a user does, alone or as two processes that really talk to each other."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(
    script: str, options: dict[str, object], *, processes: int = 1
) -> subprocess.CompletedProcess:
    """Run `script --key value ...`; with 2 processes under `accelerate launch` and gloo."""
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable]
    if processes > 1:  # `--cpu --num_processes 2` would start one process without a word
        environment["ACCELERATE_USE_CPU"] = "true"
        launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
        command += [*launch, "--num_processes", str(processes), "--main_process_port", "0"]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return subprocess.run(
        [*command, script, *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )


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
