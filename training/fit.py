"""The micro-batch of a run: given by hand, or the largest whose step fits in memory."""

import torch
from accelerate import Accelerator

from common import memory
from common.accelerator import least
from common.cli import UserError
from common.memory import MemoryPlan, Step
from training import engine


def fit_memory(
    accelerator: Accelerator,
    model: torch.nn.Module,
    step: Step,
    *,
    max_batch_seconds: float,
    memory_gib: float,
) -> MemoryPlan:
    """Plan the seconds of window in a micro-batch, and whether activations are computed twice.

    All processes must call: the least memory decides, or their pieces differ. Where engines shard
    weights or moments, each process is counted as if it held all of them.

    Args:
        step: what is computed; its device is that of the run.
        max_batch_seconds: given by hand; 0 plans them.
        memory_gib: of each process, the model included; 0 is what it holds and what is free.

    Raises:
        UserError: not one clip fits.
    """
    weights = memory.count_weights(model, in_buckets=engine.name(accelerator) == "ddp")
    free_gib = memory.device_memory_gib(accelerator.device, accelerator.num_processes)
    own_gib = memory.held_gib(accelerator.device) + free_gib
    memory_gib = memory_gib or least(accelerator, own_gib)
    if max_batch_seconds:
        predicted = memory.predict_gib(model.config, weights, step, seconds=max_batch_seconds)
        return MemoryPlan(max_batch_seconds, step.checkpointing, predicted)
    try:
        return memory.plan_memory(model.config, weights, step, memory_gib=memory_gib)
    except ValueError as error:
        raise UserError(
            f"--memory_gib {memory_gib:.1f}: {error}: take a smaller --model, --quantize nf4, or a "
            "device with more memory"
        ) from error
