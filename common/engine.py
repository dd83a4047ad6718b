"""What DDP, DeepSpeed and FSDP each want done differently; the rest of a run is the same for all.

`accelerate launch` chooses the engine. ZeRO-1, ZeRO-2 and DDP hold the whole model in every process
and ZeRO the optimizer in parts; ZeRO-3 and FSDP hold both in parts: sharded.
"""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    gather_object,
    is_deepspeed_available,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from common import gpu
from common.cli import UserError
from common.memory import prefer_expandable_segments

WEIGHTS = "weights"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, for every trained parameter
EXCHANGED_VALUES = 8 * 2**20  # of a gradient at once: 32 MiB in float32
# What torch's backends say when another process of the run has ended or does not answer.
LOST_CONTACT = (
    "Connection closed by peer", "Connection reset by peer", "Timed out", "timed out",
    "Broken pipe", "NCCL communicator was aborted", "remote process exited", "Watchdog caught",
)  # fmt: skip


def open_accelerator(
    *, precision: str, timeout_minutes: float, output: Path | None = None
) -> Accelerator:
    """The Accelerator of a run, on GPUs or, where there is none, on CPUs over gloo.

    Args:
        precision: "fp32", "bf16" or "fp16", as `common.precision.choose` gives it.
        output: where TensorBoard's records go, if they are wanted.
        timeout_minutes: that a process waits for the others before it gives up.

    Raises:
        UserError: a GPU that torch cannot use, or processes that chose different precisions.
    """
    prefer_expandable_segments()
    gpu.check()
    gpu.set_up(precision)
    has_gpu, several = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not has_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for more
    if _asks("FSDP") and is_deepspeed_available():
        # Accelerate imports it while it prepares for FSDP. Imported after the process group was
        # made, DeepSpeed has that group as a default argument and never frees it: see `close`.
        import deepspeed  # noqa: F401
    group = InitProcessGroupKwargs(
        backend=None if has_gpu or not several else "gloo",
        timeout=timedelta(minutes=timeout_minutes),
    )
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=None if output is None else "tensorboard",
        project_dir=output,
        cpu=not (has_gpu or _asks("DEEPSPEED")),
        kwargs_handlers=[group],
    )
    if accelerator.distributed_type == DistributedType.MULTI_CPU and _asks("FSDP"):
        # Accelerate shards on a CPU as well, but chooses it for GPUs only.
        accelerator.state.fsdp_plugin = plugin = FullyShardedDataParallelPlugin()
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    # Else transformers would cut weights while it reads them, under ZeRO-3, and cannot for Whisper.
    unset_hf_deepspeed_config()
    chosen = sorted(set(gather_object([precision])))
    if len(chosen) > 1:
        raise UserError(
            f"--precision auto: the GPUs of this run differ, {' and '.join(chosen)} were chosen: "
            "give --precision fp16 or fp32"
        )
    return accelerator


def least(accelerator: Accelerator, value: float) -> float:
    """The least of a number over all processes, which all must call.

    Batches are planned from it: processes that plan from different numbers lose clips or hang.
    """
    own = torch.tensor([value], dtype=torch.float64, device=accelerator.device)
    return accelerator.gather(own).min().item()


def say(accelerator: Accelerator, text: str) -> None:
    """Print in the first process of the run; accelerate's own `print` speaks on each machine."""
    if accelerator.is_main_process:
        print(text, flush=True)


def _asks(engine: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"


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
    parameters = (one for group in optimizer.param_groups for one in group["params"])
    gradients = [one.grad for one in parameters if one.grad is not None]
    while gradients:
        taken, size = [], 0
        while gradients and size < EXCHANGED_VALUES:
            taken.append(gradients.pop(0))
            size += taken[-1].numel()
        flat = torch.cat([one.flatten() for one in taken])
        torch.distributed.all_reduce(flat)
        flat /= accelerator.num_processes
        parts = flat.split([one.numel() for one in taken])
        for one, part in zip(taken, parts, strict=True):
            one.copy_(part.view_as(one))


def clear_gradient(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> None:
    """Drop the gradient, also one that is accumulated in part.

    Accelerate's `zero_grad` does nothing while `sync_gradients` is False: before a step's last
    piece.
    """
    accelerator.sync_gradients = True
    optimizer.zero_grad()


def share_out(model: torch.nn.Module) -> None:
    """Give whole weights back that FSDP keeps after a forward pass, for a backward one to come."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def clip_gradient(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, max_norm: float
) -> torch.Tensor:
    """Clip the gradient of a step, where DeepSpeed has not; its norm before, on the device."""
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    norm = accelerator.clip_grad_norm_(parameters, max_norm)
    return _full(torch.as_tensor(norm).detach())


def hold_if_not_finite(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, norm: torch.Tensor
) -> None:
    """From the first gradient that is not finite on, let AdamW leave the weights as they are.

    No GPU is waited for: fused AdamW reads the flag there. fp16's scaler has its own way, and
    DeepSpeed has stepped already.
    """
    if accelerator.scaler is not None or accelerator.distributed_type == DistributedType.DEEPSPEED:
        return
    inner = _torch_optimizer(optimizer)
    bad = (~torch.isfinite(norm)).float()
    inner.found_inf = torch.maximum(getattr(inner, "found_inf", bad), bad)


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name; to be asked anew after `prepare`."""
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


# ------ whole tensors of a run whose processes hold parts: all processes must call


def whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    """A parameter as float32 on its device, at full precision where a master copy is trained."""
    if parameter.requires_grad and _in_zero(parameter):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    if hasattr(parameter, "ds_id"):  # ZeRO-3, frozen
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone().float()
    return _full(parameter.detach()).float()


def moment(
    optimizer: torch.optim.Optimizer, name: str, parameter: torch.nn.Parameter
) -> torch.Tensor:
    """One of the MOMENTS of a trained parameter."""
    if _in_zero(parameter):
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, name)
    return _full(optimizer.state[parameter][name])


def restore(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, torch.nn.Parameter],
    read: Callable[[str, str], torch.Tensor],
    steps: float,
) -> None:
    """Put weights and AdamW's state back into a prepared run, whatever engine they come from.

    Args:
        read: gives the whole tensor of a kind ("weights" or one of the MOMENTS) and a name.
        steps: that the optimizer has taken.
    """
    if _in_zero(next(iter(parameters.values()))):
        _restore_zero(optimizer, parameters, read, steps)
        return
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        state["step"] = _count(steps, parameter)
        for kind in MOMENTS:
            state[kind] = torch.zeros_like(parameter)
            _fill(state[kind], read(kind, name))
        _fill(parameter.detach(), read(WEIGHTS, name))


def steps_taken(optimizer: torch.optim.Optimizer) -> float:
    """Steps that AdamW has taken, by its own count."""
    inner = _torch_optimizer(optimizer)
    first = next(iter(inner.state.values()), {"step": 0.0})  # all count the same
    return float(first["step"])


def _in_zero(parameter: torch.nn.Parameter) -> bool:
    """Whether DeepSpeed cuts a parameter (ZeRO-3) or its master copy (ZeRO-1, ZeRO-2)."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _fill(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a whole value into a tensor, or its part into a part."""
    if isinstance(tensor, DTensor):
        value = distribute_tensor(
            value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
        )
    tensor.copy_(value)


def _count(steps: float, parameter: torch.Tensor) -> torch.Tensor:
    """Steps as fused AdamW counts them, on the parameter's device."""
    return torch.tensor(steps, dtype=torch.float32, device=parameter.device)


def _torch_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The AdamW within accelerate's and DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _restore_zero(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, torch.nn.Parameter],
    read: Callable[[str, str], torch.Tensor],
    steps: float,
) -> None:
    zero, inner = optimizer.optimizer, _torch_optimizer(optimizer)
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO-3
        parts = zero.fp32_partitioned_groups_flat
    elif hasattr(zero, "fp32_groups_flat_partition"):  # ZeRO-1 in bf16
        parts = zero.fp32_groups_flat_partition
    else:
        parts = zero.single_partition_of_fp32_groups
    for part in parts:  # AdamW has no state before its first step
        inner.state[part] = {
            "step": _count(steps, part),
            **{kind: torch.zeros_like(part) for kind in MOMENTS},
        }
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()
    for name, parameter in parameters.items():
        value = read(WEIGHTS, name)
        _set_part(parameter, value.to(parts[0].device), None)
        _take_from_master(parameter, value)
        for kind in MOMENTS:
            _set_part(parameter, read(kind, name).to(parts[0].device), kind)


def _set_part(parameter: torch.nn.Parameter, value: torch.Tensor, kind: str | None) -> None:
    """Set this process's part of a master weight (`None`) or of one of the MOMENTS."""
    if not hasattr(parameter, "ds_id"):
        parameter.set_full_hp_param(value, kind)
        return
    size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
    part = value.flatten()[rank * size : (rank + 1) * size]
    padded = torch.nn.functional.pad(part, (0, size - len(part)))  # as ZeRO-3 pads the last part
    parameter._z3_optimizer.set_local_hp_param(padded, parameter, kind)


def _take_from_master(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Let the weights that the model computes with follow the master copy that was restored."""
    if not hasattr(parameter, "ds_id"):
        parameter.data.copy_(value)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(value)


# ------ the end of a run


def close(accelerator: Accelerator) -> None:
    """End a run that has written all: trackers, then every process group with its threads.

    All processes must call, and hold neither model nor optimizer any more.

    A thread of gloo may still hold a tensor of Python's when its group's work is done, and lets go
    of it a moment later. Where that moment comes after the interpreter's end, the process dies of
    SIGABRT or SIGSEGV (https://github.com/pytorch/pytorch/pull/179291). A group joins its threads
    when it is freed, so all groups are freed here, while the interpreter is whole. ZeRO-3 alone
    keeps its groups: DeepSpeed's parameters hold them, and its modules hold these.
    """
    accelerator.wait_for_everyone()
    accelerator.free_memory()  # DeepSpeed's engine, DDP's and FSDP's modules: they hold groups
    if accelerator.num_processes > 1:
        gc.collect()
        # DTensor's caches hold meshes, and a mesh its groups, up to the interpreter's end.
        for mesh in (one for one in gc.get_objects() if type(one) is DeviceMesh):
            mesh._pg_registry.clear()
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            from deepspeed.utils import groups

            groups._WORLD_GROUP = None  # its copy of the group of all; nothing public frees it
    accelerator.end_training()


# ------ when contact is lost


@contextmanager
def clear_errors(timeout_minutes: float) -> Iterator[None]:
    """Turn a backend's words for a lost process into one line."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in LOST_CONTACT):
            raise
        raise UserError(
            "--collective_timeout: another process of this run ended, or did not answer for "
            f"{timeout_minutes:g} minutes; what it said stands above or on its machine: start the "
            "run again to go on from its last checkpoint"
        ) from error
