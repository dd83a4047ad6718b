"""What must be known of a GPU before it is computed on: whether torch can use it, and how."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from common.cli import OwnError, UserError

NO_GPUS = ("", "-1", "NoDevFiles")  # of CUDA_VISIBLE_DEVICES: GPUs are hidden on purpose
CUDNN_ATTENTION_CAPABILITY = (9, 0)  # Hopper; torch 2.11 and later try cuDNN first from here on


def check(devices: Path = Path("/dev")) -> None:
    """Refuse a GPU that is there and that torch cannot use: the CPU would take its place silently.

    Args:
        devices: folder of device files, where the NVIDIA driver has `nvidia0` and so on.

    Raises:
        UserError: with torch's own reason.
    """
    own = capability()
    if own is not None:
        _check_kernels(own, torch.cuda.get_arch_list())
        return
    if _gpus_are_hidden() or not any(devices.glob("nvidia[0-9]*")):
        return
    raise UserError(
        f"this machine's GPU cannot be used ({_reason()}): update its driver, or install a torch "
        "that its driver supports (https://pytorch.org/get-started/locally); CUDA_VISIBLE_DEVICES= "
        "before the command computes on the CPU"
    )


def capability() -> tuple[int, int] | None:
    """The compute capability of this process's GPU; `None` on a CPU.

    Raises:
        OwnError: this machine has fewer GPUs than processes.
    """
    if _gpus_are_hidden() or not torch.cuda.is_available():
        return None
    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= count:
        raise OwnError(
            f"--num_processes: process {index + 1} of this machine has no GPU, there are {count}: "
            "start one process per GPU"
        )
    return torch.cuda.get_device_capability(index)


def _gpus_are_hidden() -> bool:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible in NO_GPUS or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"


def _reason() -> str:
    """Why torch finds no GPU, in its own words."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).split(". ")[0].strip()
    return "torch finds none"


def _check_kernels(capability: tuple[int, int], built_for: Sequence[str]) -> None:
    """Refuse a GPU that this build of torch has no kernels for.

    Args:
        built_for: such as "sm_80", which runs on 8.0 and later 8.x, and "compute_90", which the
            driver compiles for 9.0 and anything newer.
    """
    if torch.version.hip is not None:  # AMD names its GPUs in another way
        return
    for name in built_for:
        kind, number = re.fullmatch(r"(\w+?)_(\d+)[af]?", name).groups()
        built = divmod(int(number), 10)
        if kind == "compute" and built <= capability:
            return
        if kind == "sm" and built[0] == capability[0] and built <= capability:
            return
    raise UserError(
        f"this machine's GPU has compute capability {capability[0]}.{capability[1]}, and torch "
        f"{torch.__version__} is built for {', '.join(built_for)}: install a torch that is "
        "built for it; CUDA_VISIBLE_DEVICES= before the command computes on the CPU"
    )


def set_up(precision: str) -> None:
    """Choose how a GPU computes; without one nothing changes."""
    own = capability()
    if own is None:
        return
    if own >= CUDNN_ATTENTION_CAPABILITY:
        # cuDNN plans anew for every shape of attention, for 0.4 to 1 s, and windows of natural
        # length make about one new shape a step. Flash attention plans nothing.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if precision == "fp32":  # torch's default rounds the inputs of convolutions to TF32
        torch.backends.cudnn.allow_tf32 = False
