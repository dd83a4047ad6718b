"""What a node of a job has: the addresses of the others, its driver, its GPUs."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common.cli import UserError
from jobs import instances
from jobs.contract import say

DEVICES = Path("/dev")
COMPAT = Path("/usr/local/cuda/compat")  # driver libraries of the base image, for its CUDA
DRIVER = Path("/proc/driver/nvidia/version")  # of the host
PROBE = "import torch; torch.cuda.init(); print(torch.cuda.device_count())"
HOSTS_SECONDS = 300.0  # that a node's name may take to resolve


def wait_for_names(hosts: Sequence[str], seconds: float = HOSTS_SECONDS) -> None:
    """Wait until the names of all nodes resolve: nodes start one after another.

    Raises:
        UserError: some do not within `seconds`.
    """
    deadline = time.monotonic() + seconds
    missing = list(hosts)
    while missing:
        missing = [host for host in missing if not _resolves(host)]
        if missing and time.monotonic() > deadline:
            raise UserError(f"no address of {', '.join(missing)} within {seconds:g} s: start again")
        if missing:
            time.sleep(0.5)


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def library_path(before: str, compat: Path = COMPAT, driver: Path = DRIVER) -> str:
    """LD_LIBRARY_PATH, with the image's driver libraries first if the host's driver is older.

    The entrypoint of AWS's base images, which ours replaces, does the same. If the host's driver is
    newer, the image's libraries would not start.
    """
    library = compat / "libcuda.so.1"
    if not library.exists() or not driver.is_file():
        return before
    images = re.fullmatch(r"libcuda\.so\.([\d.]+)", library.resolve().name)
    hosts = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", driver.read_text(encoding="utf-8"))
    if not images or not hosts or _version(hosts[1]) >= _version(images[1]):
        return before
    say(f"the host's driver {hosts[1]} is older than the image's {images[1]}, which comes first")
    return ":".join(filter(None, [str(compat), before]))


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def ask_cuda() -> tuple[int, str]:
    """Number of GPUs that CUDA starts on, and why there are none.

    A new process is asked, since LD_LIBRARY_PATH of this one was set too late for itself.
    """
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if done.returncode == 0:
        return int(done.stdout.split()[-1]), ""
    return 0, (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def find_gpus(instance_type: str) -> int:
    """Number of GPUs of this node.

    Raises:
        UserError: CUDA finds fewer than the instance has: training on the CPU would cost as much an
            hour, for days.
    """
    gpus, problem = ask_cuda()
    expected = instances.num_gpus(instance_type)
    if expected is None:
        expected = len([path for path in DEVICES.glob("nvidia*") if path.name[6:].isdigit()])
    if gpus >= expected or (gpus and "CUDA_VISIBLE_DEVICES" in os.environ):
        return gpus
    answer = f"CUDA finds {gpus}" if gpus else f"CUDA does not start ({problem or 'finds none'})"
    raise UserError(
        f"{instance_type} has {expected} GPUs, {answer}: the image's CUDA may be too new for the "
        "host's driver: build it on an older BASE_IMAGE; or the instance is faulty: start again"
    )
