"""Faked /opt/ml folders, and nodes of a job that run the container's entry as their process 1."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import container
import launch
import psutil
import pytest

from benchmarks import machines

ENTRY = launch.ROOT / "jobs" / "entry.py"
HOSTS = ("algo-1", "algo-2")


def make_ml(
    folder: Path,
    options: dict[str, Any],
    channels: dict[str, Path],
    *,
    host: str = "algo-1",
    hosts: tuple[str, ...] = ("algo-1",),
    instance_type: str = "ml.m5.xlarge",
) -> Path:
    """What SageMaker lays out for a node before the container starts."""
    config = folder / "input" / "config"
    config.mkdir(parents=True)
    for name in ("model", "checkpoints", "output/data"):
        (folder / name).mkdir(parents=True)
    for name, source in channels.items():
        if source.is_dir():
            shutil.copytree(source, folder / "input" / "data" / name)
        else:
            (folder / "input" / "data" / name).mkdir(parents=True)
            shutil.copy(source, folder / "input" / "data" / name)
    write = {
        "hyperparameters": {key: str(value) for key, value in options.items()},
        "resourceconfig": {
            "current_host": host,
            "current_instance_type": instance_type,
            "hosts": list(reversed(hosts)),  # SageMaker promises no order
            "network_interface_name": "eth0",
        },
        "inputdataconfig": {name: {"TrainingInputMode": "File"} for name in channels},
    }
    for name, content in write.items():
        (config / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def start_node(
    ml: Path,
    *arguments: str,
    node: int | None = None,
    command: tuple[str, ...] = (),
    **variables: str,
) -> subprocess.Popen:
    """Start the entry as process 1 on a faked /opt/ml; skips without root.

    Args:
        arguments: of the entry.
        node: which of the two machines it is on; `None` is this one.
        command: instead of the entry.
    """
    if os.geteuid():
        pytest.skip("needs root to mount a faked /opt/ml")
    Path("/opt/ml").mkdir(parents=True, exist_ok=True)
    scratch = tempfile.mkdtemp()  # short: names of sockets lie in it
    words = [sys.executable, container.__file__, str(ml)]
    words += command or (sys.executable, str(ENTRY), *(arguments or ("train",)))
    if node is not None:
        words = machines.on_machine(node, words)
    environment = launch.environment() | {"TMPDIR": scratch, "CUDA_VISIBLE_DEVICES": ""}
    node = launch.start(words, env=environment | variables)
    node.scratch = scratch
    return node


def process_1(node: subprocess.Popen) -> psutil.Process:
    """The entry."""
    (process,) = psutil.Process(node.pid).children()
    return process


def end(node: subprocess.Popen, seconds: float = 240.0) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a node."""
    try:
        out, err = node.communicate(timeout=seconds)
    finally:
        shutil.rmtree(node.scratch)
    return node.returncode, out, err


class Uploader:
    """SageMaker's copying of a folder to S3, as a thread: markers come and go beside the files.

    `FILE.sagemaker-uploading` is there while FILE is read, `FILE.sagemaker-uploaded` afterwards;
    what is called `*.sagemaker-ignore` is left alone, unless the uploader is `careless`.
    """

    def __init__(self, folder: Path, *, seconds: float, careless: bool = False) -> None:
        self.folder, self.seconds, self.careless = folder, seconds, careless
        self.copied: dict[str, bytes] = {}  # S3
        self.uploads = 0
        self.end = threading.Event()
        self.thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Uploader":
        self.thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.end.set()
        self.thread.join()

    def _run(self) -> None:
        while not self.end.is_set():
            for place, _, names in os.walk(self.folder):
                for path in (Path(place, name) for name in names):
                    if not self._is_left_alone(path):
                        with contextlib.suppress(FileNotFoundError):  # renamed or removed
                            self._upload(path)
            self.end.wait(0.001)

    def _is_left_alone(self, path: Path) -> bool:
        relative = str(path.relative_to(self.folder))
        is_marker = path.name.endswith((".sagemaker-uploading", ".sagemaker-uploaded"))
        return is_marker or (".sagemaker-ignore" in relative and not self.careless)

    def _upload(self, path: Path) -> None:
        uploading = path.with_name(path.name + ".sagemaker-uploading")
        uploading.touch()
        try:
            content = path.read_bytes()
            self.end.wait(self.seconds)
            self.copied[str(path.relative_to(self.folder))] = content
            self.uploads += 1
            path.with_name(path.name + ".sagemaker-uploaded").touch()
        finally:
            uploading.unlink(missing_ok=True)
