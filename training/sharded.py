"""Whole tensors of a run whose processes hold parts: read out of shards, and put back into them.

ZeRO-1 and ZeRO-2 cut a master copy of the trained weights and AdamW's moments, ZeRO-3 and FSDP2 the
weights as well. All processes must call.
"""

from collections.abc import Callable

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

WEIGHTS = "weights"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, for every trained parameter


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name; to be asked anew after `prepare`."""
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    """A parameter as float32 on its device, at full precision where a master copy is trained."""
    if parameter.requires_grad and _in_zero(parameter):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    if hasattr(parameter, "ds_id"):  # ZeRO-3, frozen
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone().float()
    return full_tensor(parameter.detach()).float()


def moment(
    optimizer: torch.optim.Optimizer, name: str, parameter: torch.nn.Parameter
) -> torch.Tensor:
    """One of the MOMENTS of a trained parameter."""
    if _in_zero(parameter):
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, name)
    return full_tensor(optimizer.state[parameter][name])


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
    inner = torch_optimizer(optimizer)
    first = next(iter(inner.state.values()), {"step": 0.0})  # all count the same
    return float(first["step"])


def _in_zero(parameter: torch.nn.Parameter) -> bool:
    """Whether DeepSpeed cuts a parameter (ZeRO-3) or its master copy (ZeRO-1, ZeRO-2)."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of FSDP2 gathered from its shards; any other as it is."""
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


def torch_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
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
    zero, inner = optimizer.optimizer, torch_optimizer(optimizer)
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
