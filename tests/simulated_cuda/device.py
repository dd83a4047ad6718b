"""A CUDA device that computes nothing: dtypes, live memory and kernels of a step, on any machine.

torch's FakeTensorMode runs every operation on shapes and dtypes alone. A CPU build of torch lacks
CUDA's device guard, without which autocast and autograd do not work on "cuda" tensors; `guard.cpp`
is one. It must be loaded before torch is imported, so whoever wants a simulation starts a process
of its own (`run.py`).

What it does not know: fragmentation, the CUDA context, workspaces of cuBLAS and cuDNN, time.
"""

import collections
import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BLOCK = 512  # bytes that CUDA's caching allocator rounds a tensor up to
COMPILER = "c++"
# Operations that return a view, an uninitialised tensor or a number: no kernel is launched.
NO_KERNEL = {
    "_local_scalar_dense", "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach",
    "device", "empty", "empty_like", "empty_strided", "expand", "lift_fresh", "new_empty",
    "new_empty_strided", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t",
    "transpose", "unbind", "unfold", "unsqueeze", "view", "view_as_real",
}  # fmt: skip


def torch_libraries() -> Path:
    """The folder of torch's libraries, found without importing it."""
    return Path(importlib.util.find_spec("torch").submodule_search_locations[0]) / "lib"


def is_cuda_build() -> bool:
    """Whether torch brings its own CUDA device, which needs a GPU and no `guard.cpp`."""
    return (torch_libraries() / "libtorch_cuda.so").exists()


def what_is_missing() -> str:
    """What the simulation lacks on this machine, or ""; imports torch where it is a CUDA build."""
    if is_cuda_build():
        import torch

        return "" if torch.cuda.is_available() else "a CPU build of torch, or a GPU"
    return "" if shutil.which(COMPILER) else "a C++ compiler"


def build() -> Path:
    """Compile `guard.cpp` against the installed torch, once for each version of both."""
    source = Path(__file__).with_name("guard.cpp")
    lib = torch_libraries()
    key = source.read_bytes() + importlib.metadata.version("torch").encode()
    folder = Path(tempfile.gettempdir()) / f"simulated_cuda_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user")
    library = folder / f"guard_{hashlib.sha256(key).hexdigest()[:16]}.so"
    if library.is_file():
        return library
    made = library.with_suffix(f".{os.getpid()}.tmp")
    include = lib.parent / "include"
    command = [COMPILER, "-O1", "-shared", "-fPIC", "-std=c++20", "-D_GLIBCXX_USE_CXX11_ABI=1"]
    command += [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}", str(source)]
    command += ["-o", str(made), f"-L{lib}", "-lc10", "-ltorch_cpu"]
    subprocess.run(command, check=True)
    made.replace(library)
    return library


def load() -> None:
    """Register the device; torch is imported here, for the first time in this process.

    Raises:
        RuntimeError: torch is there already, or something is missing on this machine.
    """
    if "torch" in sys.modules:
        raise RuntimeError("the simulated device must be loaded before torch is imported")
    if missing := what_is_missing():
        raise RuntimeError(f"the simulated device needs {missing}")
    if not is_cuda_build():
        names = (torch_libraries() / "libc10.so", torch_libraries() / "libtorch_cpu.so", build())
        for name in names:
            ctypes.CDLL(str(name), mode=ctypes.RTLD_GLOBAL)
    import torch
    from torch.cuda.amp import common

    common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.nn.functional.scaled_dot_product_attention = _attention
    torch.nn.Module._apply = _apply
    from transformers import masking_utils

    masking_utils.is_tracing = lambda *_: False  # what it does where tensors hold numbers


def _apply(module: Any, fn: Callable[..., Any], recurse: bool = True) -> Any:
    """`Module._apply`, which `to` is made of, with new parameters: torch would swap tensors, and
    cannot where a weak reference to one is held, as FakeTensorMode does.
    """
    import torch

    for child in module.children() if recurse else ():
        child._apply(fn)
    for name, one in module._parameters.items():
        if one is not None:
            with torch.no_grad():
                module._parameters[name] = torch.nn.Parameter(fn(one), one.requires_grad)
    for name, one in module._buffers.items():
        if one is not None:
            module._buffers[name] = fn(one)
    return module


def _attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """Attention as CUDA chooses it without a mask: flash in half precision, else efficient.

    torch cannot choose itself, because it asks the GPU what it is capable of.
    """
    import torch

    assert attn_mask is None and not dropout_p and not enable_gqa, "not simulated"
    if torch.is_autocast_enabled("cuda"):  # attention is one of autocast's half-precision ops
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = (one.to(dtype) for one in (query, key, value))
    aten = torch.ops.aten
    if query.dtype in (torch.float16, torch.bfloat16):
        return aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
    needs_sums = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, None, needs_sums, dropout_p, is_causal, scale=scale
    )[0]


# ------ what runs on it


def _kernels() -> dict[str, Callable[..., Any]]:
    """bitsandbytes' CUDA kernels as the tensors that they make, temporary ones included.

    From bitsandbytes 0.50, backends/cuda/ops.py and backends/default/ops.py. No feature is taken
    for an outlier of LLM.int8, whose number depends on values.
    """
    import torch
    from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl

    def int8_vectorwise_quant(a: Any, threshold: float = 0.0) -> tuple[Any, Any, Any]:
        stats = a.new_empty(a.numel() // a.shape[-1], dtype=torch.float32)
        out = torch.empty_like(a, dtype=torch.int8)
        if not threshold:
            return out, stats, None
        (a.abs() >= threshold).any()
        return out, stats, a.new_empty(0, dtype=torch.int64)

    def int8_mixed_scaled_mm(
        a: Any, ca: Any, cb: Any, sca: Any, scb: Any, outliers: Any = None, bias: Any = None
    ) -> tuple[Any, Any]:
        product = a.new_empty((*ca.shape[:-1], cb.shape[0]), dtype=torch.int32)
        out = torch.zeros_like(product, dtype=torch.float16)  # one kernel: dequantisation
        if bias is not None and bias.dtype != torch.float16:
            out.add_(bias)
        return out.to(a.dtype), a.new_empty(0)

    return {
        "int8_vectorwise_quant": int8_vectorwise_quant,
        "int8_mixed_scaled_mm": int8_mixed_scaled_mm,
        "gemm_4bit": _gemm_4bit_default_impl,
    }


def _scratch_bytes(name: str, args: tuple[Any, ...]) -> int:
    """Memory that a kernel takes for itself while it runs, which no operation shows.

    Flash attention's backward pass sums the gradient of the queries in float32.
    """
    if name == "_scaled_dot_product_flash_attention_backward":
        return 4 * args[1].numel()  # args: gradient, query, key, ...
    return 0


@contextlib.contextmanager
def simulation() -> Iterator[Any]:
    """Run what is within it on the simulated device; yields the meter of live bytes and kernels.

    Tensors and modules must be made within it, on the device "cuda".
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    kernels = _kernels()

    def on_device(tensor: torch.Tensor) -> bool:
        """`tensor.device` would be an operation again."""
        return getattr(tensor, "fake_device", tensor.device).type == "cuda"

    class Meter(TorchDispatchMode):
        """Counts what lives on the device: .live and .peak in bytes, .kernels, .ops by name."""

        def __init__(self) -> None:
            super().__init__()
            self.live = self.peak = self.kernels = 0
            self.ops: collections.Counter[str] = collections.Counter()
            self.sizes: dict[int, int] = {}  # of live storages

        def note(self, tensor: torch.Tensor) -> None:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self.sizes or not on_device(tensor):
                return
            self.sizes[key] = -(-storage.nbytes() // BLOCK) * BLOCK
            self.live += self.sizes[key]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.free, key)

        def free(self, key: int) -> None:
            self.live -= self.sizes.pop(key)

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
        ) -> Any:
            name = func._overloadpacket.__name__
            if name == "device" and len(args) == 1:
                return args[0].fake_device
            if name == "_local_scalar_dense":  # somebody waits for a number
                self.ops[name] += 1
                return args[0].dtype == torch.bool  # True, or 0
            if name in kernels:
                self.ops[name] += 1
                self.kernels += 1
                with self:  # count what it does, too
                    return kernels[name](*args, **(kwargs or {}))
            out = func(*args, **(kwargs or {}))
            tensors = [one for one in tree_leaves(out) if isinstance(one, torch.Tensor)]
            for one in tensors:
                self.note(one)
            self.peak = max(self.peak, self.live + _scratch_bytes(name, args))
            if any(map(on_device, tensors)) or not tensors:
                self.ops[name] += 1
                self.kernels += name not in NO_KERNEL
            return out

    meter = Meter()
    threads = torch.autograd.set_multithreading_enabled(False)
    with FakeTensorMode(allow_non_fake_inputs=True), threads, meter:
        yield meter
