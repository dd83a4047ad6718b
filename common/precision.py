"""Which floating-point numbers a run computes with: given by hand, or the device's best."""

import os
from typing import Literal

import torch

from common import gpu
from common.cli import UserError

Precision = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of GPUs that compute in bf16. Older ones emulate it, many times slower, and
# `torch.cuda.is_bf16_supported()` counts the emulation.
BF16_CAPABILITY = (8, 0)


def choose(precision: Precision) -> str:
    """The precision, "fp32", "bf16" or "fp16", that `--precision` means on this machine.

    "auto" takes what `accelerate launch --mixed_precision` asks for. The launcher's "no" is no
    request: it is also what it says when nobody was asked. Then the device decides: bf16 from
    compute capability 8.0 on, fp16 on older GPUs, fp32 on a CPU.

    Raises:
        UserError: the device has no such precision.
    """
    option, launcher = f"--precision {precision}", os.environ.get("ACCELERATE_MIXED_PRECISION")
    if precision == "auto" and launcher not in (None, "", "no"):
        precision, option = launcher, f"accelerate launch --mixed_precision {launcher}"
    capability = gpu.capability()
    if precision == "auto":
        if capability is None:
            return "fp32"
        return "bf16" if capability >= BF16_CAPABILITY else "fp16"
    if precision not in DTYPES:
        raise UserError(f"{option}: is not supported: give --precision fp32, bf16 or fp16")
    if precision == "fp16" and capability is None:
        raise UserError(f"{option}: needs a GPU: give --precision fp32 or bf16")
    if precision == "bf16" and capability is not None and capability < BF16_CAPABILITY:
        raise UserError(
            f"{option}: a GPU of compute capability {capability[0]}.{capability[1]} only emulates "
            "bf16, many times slower: give --precision fp16 or fp32"
        )
    return precision
