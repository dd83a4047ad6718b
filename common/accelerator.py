"""The Accelerator of a run: opened, speaking with one voice, agreeing, and closed.

`accelerate launch` chooses the engine: nothing, DDP, DeepSpeed or FSDP2.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
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
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from common import gpu
from common.cli import UserError
from common.memory import prefer_expandable_segments

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
        timeout_minutes: how long a process waits for the other processes before it gives up.

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


def _asks(engine: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"


def say(accelerator: Accelerator, text: str) -> None:
    """Print in the first process of the run; Accelerate's own `print` does so on each machine."""
    if accelerator.is_main_process:
        print(text, flush=True)


def least(accelerator: Accelerator, value: float) -> float:
    """The least of a number over all processes, which all must call.

    Batches are planned from it: processes that plan from different numbers lose clips or hang.
    """
    own = torch.tensor([value], dtype=torch.float64, device=accelerator.device)
    return accelerator.gather(own).min().item()


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
        for mesh in (item for item in gc.get_objects() if type(item) is DeviceMesh):
            mesh._pg_registry.clear()
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            from deepspeed.utils import groups

            groups._WORLD_GROUP = None  # its copy of the group of all; nothing public frees it
    accelerator.end_training()


@contextmanager
def explain_lost_contact(timeout_minutes: float) -> Iterator[None]:
    """Turn what a backend says of a lost process into one line."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in LOST_CONTACT):
            raise
        raise UserError(
            "--collective_timeout: another process of this run ended, or did not answer for "
            f"{timeout_minutes:g} minutes; its own message is above or on its machine: run the "
            "same command to resume from the last checkpoint"
        ) from error
