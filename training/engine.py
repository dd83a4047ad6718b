"""What DDP, DeepSpeed and FSDP2 each do differently in training.

ZeRO-1, ZeRO-2 and DDP hold the whole model in every process and ZeRO the optimizer in parts; ZeRO-3
and FSDP2 hold both in parts: sharded.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator, DistributedType
from torch.distributed.fsdp import FSDPModule

from common.cli import UserError
from training.sharded import full_tensor, torch_optimizer

EXCHANGED_VALUES = 8 * 2**20  # of a gradient at once: 32 MiB in float32


def name(accelerator: Accelerator) -> str:
    """ "none", "ddp", "zero1" to "zero3", "fsdp2"."""
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    if kind == DistributedType.FSDP:
        return f"fsdp{accelerator.state.fsdp_plugin.fsdp_version}"
    return "none" if kind == DistributedType.NO else "ddp"


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether no process holds the whole model."""
    return name(accelerator) in ("zero3", "fsdp2")


def check(accelerator: Accelerator, *, quantize: str, precision: str) -> None:
    """Refuse what an engine cannot do.

    Raises:
        UserError: naming the engine and the reason.
    """
    engine = name(accelerator)
    if engine == "fsdp1":
        raise UserError(
            "--config_file: fsdp_version 1 cannot hold trained and frozen weights together: "
            "take accelerate_configs/fsdp2.yaml"
        )
    if quantize != "none" and is_sharded(accelerator):
        raise UserError(
            f"--quantize {quantize}: {engine} cuts weights into pieces of float numbers, which "
            "packed 8- and 4-bit weights are not: take DDP, ZeRO-1 or ZeRO-2, which hold them whole"
        )
    if engine.startswith("zero") and precision == "fp16":
        raise UserError(
            "--precision fp16: DeepSpeed scales the loss by itself, which a resumed run could not "
            "repeat: give fp32, or bf16 on GPUs of compute capability 8.0 and newer, or take DDP"
        )


def prepare(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    max_grad_norm: float,
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Wrap model and optimizer for the engine."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": 1,  # of samples it never counts
            "gradient_clipping": max_grad_norm,
            "zero_force_ds_cpu_optimizer": False,  # torch's AdamW is fused on a CPU too
            "data_types": {"grad_accum_dtype": "fp32"},  # else bf16: small gradients are lost
        }
    return accelerator.prepare(model, optimizer)


def exchanges_last(accelerator: Accelerator) -> bool:
    """Whether processes do nothing together before `exchange`, so that a step can start again."""
    return name(accelerator) in ("none", "ddp")


def accumulating(
    accelerator: Accelerator, model: torch.nn.Module, *, last: bool
) -> AbstractContextManager:
    """Within it a backward pass adds to the gradient.

    DeepSpeed and FSDP exchange it in the `last` of a step, DDP in `exchange`.
    """
    accelerator.sync_gradients = last  # DeepSpeed steps in the backward pass where it is set
    is_own = last and name(accelerator) != "ddp"
    return nullcontext() if is_own else accelerator.no_sync(model)


def exchange(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> None:
    """Under DDP, average the gradients over the processes, EXCHANGED_VALUES at a time.

    DDP itself would exchange them within the last backward pass, which then could not fail on one
    process alone.
    """
    if name(accelerator) != "ddp":
        return
    parameters = (param for group in optimizer.param_groups for param in group["params"])
    gradients = [param.grad for param in parameters if param.grad is not None]
    while gradients:
        bucket, size = [], 0
        while gradients and size < EXCHANGED_VALUES:
            bucket.append(gradients.pop(0))
            size += bucket[-1].numel()
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        torch.distributed.all_reduce(flat)
        flat /= accelerator.num_processes
        parts = flat.split([gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def clear_gradient(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> None:
    """Drop the gradient, also one that is accumulated in part.

    Accelerate's `zero_grad` does nothing while `sync_gradients` is False: before a step's last
    piece.
    """
    accelerator.sync_gradients = True
    optimizer.zero_grad()


def reshard(model: torch.nn.Module) -> None:
    """Free the whole weights that FSDP keeps after a forward pass for a backward pass to come."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def clip_gradient(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, max_norm: float
) -> torch.Tensor:
    """Clip the gradient of a step, where DeepSpeed has not; its norm before, on the device."""
    parameters = [param for group in optimizer.param_groups for param in group["params"]]
    norm = accelerator.clip_grad_norm_(parameters, max_norm)
    return full_tensor(torch.as_tensor(norm).detach())


def hold_if_not_finite(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, norm: torch.Tensor
) -> None:
    """From the first gradient that is not finite on, let AdamW leave the weights as they are.

    `found_inf` is how torch's own GradScaler tells a fused optimizer, which reads the flag on the
    GPU and skips its update there: nothing waits for the GPU, unlike a test of the norm in Python.
    In fp16 the scaler sets it itself; DeepSpeed has updated the weights already.
    """
    if accelerator.scaler is not None or accelerator.distributed_type == DistributedType.DEEPSPEED:
        return
    inner = torch_optimizer(optimizer)
    bad = (~torch.isfinite(norm)).float()
    inner.found_inf = torch.maximum(getattr(inner, "found_inf", bad), bad)
