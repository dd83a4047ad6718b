"""What a step computes on a GPU, as far as a machine without one can tell: dtypes, kernels, memory.

The simulated device runs in a process of its own, because it must be there before torch is.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from simulated_cuda import device

from benchmarks import simulated_memory
from benchmarks.simulated_memory import simulate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(device.what_is_missing()), reason=f"needs {device.what_is_missing()}"),
]

COUNTED = """
import device
device.load()
import torch
with device.simulation() as meter:
    a = torch.ones(1000, 1001, device="cuda", requires_grad=True)
    assert meter.live == meter.peak == 4_004_352, "rounded up to blocks of 512 bytes"
    view = a.t()
    assert meter.live == 4_004_352 and meter.kernels == 1, "a view takes neither"
    with torch.autocast("cuda", torch.float16):
        b = torch.nn.functional.linear(a, a)
        c = torch.nn.functional.layer_norm(b, (1000,))
    assert (b.dtype, c.dtype, str(c.device)) == (torch.float16, torch.float32, "cuda:0")
    c.sum().backward()
    assert a.grad.dtype == torch.float32
    before = meter.live
    del b, c, view
    assert meter.live <= before - 6_000_000 and meter.peak >= before, "freed, and remembered"
    half = torch.ones(1, 2, 64, 64, dtype=torch.bfloat16, device="cuda")
    torch.nn.functional.scaled_dot_product_attention(half, half, half)
    assert meter.ops["_scaled_dot_product_flash_attention"] == 1
    assert torch.ones(4, device="cuda").tolist() == [0, 0, 0, 0], "there are no numbers"
print("counted")
"""


def test_the_device_counts_live_bytes_and_knows_autocasts_dtypes():
    folder = Path(device.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", COUNTED], cwd=folder, capture_output=True, text=True
    )
    assert done.stdout == "counted\n", done.stdout + done.stderr


def test_the_device_is_loaded_before_torch_or_not_at_all():
    with pytest.raises(RuntimeError, match="before torch is imported"):
        device.load()


HALVES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
KINDS = [
    *({"precision": name} for name in HALVES),
    {"quantize": "int8"}, {"quantize": "nf4", "precision": "fp16"}, {"tune": "full"},
]  # fmt: skip
TINY = {"model": "tiny of few layers", "positions": 320, "clips": 2}


@pytest.fixture(scope="module")
def simulated():
    """Figures of KINDS and of `cases`, from one process."""
    return list(simulate([*(TINY | kind for kind in KINDS), *cases()]))


def test_products_are_in_the_precision_asked_for_and_sums_in_float32(simulated):
    for kind, figures in zip(KINDS, simulated[: len(KINDS)], strict=True):
        half, found = HALVES[kind.get("precision", "bf16")], figures["dtypes"]
        for layer in ("q_proj", "cross k_proj", "fc1", "fc2"):
            assert found[layer].endswith(f"-> {half}"), (kind, layer, found)
        if kind.get("tune") != "full":  # what a LayerNorm returns is cast once, below an adapter
            assert found["fc1"] == found["cross k_proj"] == f"{half} -> {half}", (kind, found)
        assert found["decoder layer_norm"].endswith("-> float32"), (kind, found)
        assert (found["loss"], found["gradient"]) == ("float32", "float32"), kind


def cases():
    """Real widths, each branch of the formula once."""
    four, short = simulated_memory.FOUR, simulated_memory.SHORT
    again = simulated_memory.AGAIN
    six = {"targets": simulated_memory.ALL_TARGETS}
    turbo = [four, again, {"tune": "full"} | four, {"tune": "full"} | again]
    trained = [
        six | short, six | again, {"quantize": "int8"} | four, {"quantize": "int8"} | again,
        {"quantize": "int8"} | six | four, {"quantize": "nf4"} | four, {"precision": "fp32"} | four,
        {"tune": "encoder_frozen"} | four, {"scope": "top_2"} | four, {"scope": "decoder"} | four,
        {"scope": "decoder"} | simulated_memory.CACHED,
    ]  # fmt: skip
    decoded = [{"decode": True} | batch for batch in simulated_memory.DECODED]
    named = [
        ("turbo of few layers", turbo), ("small of few layers", trained), ("small", decoded)
    ]  # fmt: skip
    return [{"model": model} | case for model, own in named for case in own]


def test_the_estimate_is_within_fifteen_per_cent_of_the_simulated_peak_and_hardly_below(simulated):
    assert len(simulated) == len(KINDS) + len(cases())
    for figures in simulated[len(KINDS) :]:
        estimate, peak = simulated_memory.estimate_gib(figures), figures["peak"] / 2**30
        told = {name: figures[name] for name in figures if name not in ("ops", "config", "dtypes")}
        assert 0.95 < estimate / peak < 1.15, f"{estimate:.2f} GiB by formula, {peak:.2f}: {told}"
