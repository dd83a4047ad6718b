"""The learning rate of each step."""

import math
from typing import Literal

import torch

Decay = Literal["linear", "cosine"]


def learning_rate(
    step: int, total_steps: int, *, peak: float, warmup_ratio: float, decay: Decay
) -> float:
    """Rate of the optimizer step after `step` steps: linear warm-up to `peak`, then decay to zero.

    >>> [learning_rate(i, 4, peak=1.0, warmup_ratio=0.5, decay="linear") for i in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    warmup_steps = math.ceil(warmup_ratio * total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return peak * (1 - progress if decay == "linear" else (1 + math.cos(math.pi * progress)) / 2)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give all parameters the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
