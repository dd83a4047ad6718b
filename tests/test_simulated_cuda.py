"""What a step computes on a GPU, as far as a machine without one can tell: dtypes, kernels, memory.

The simulated device runs in a process of its own, because it must be there before torch is.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from simulated_cuda import device

from benchmarks.simulated_memory import simulate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not device.has_compiler(), reason="needs a C++ compiler"),
]

COUNTED = """
import device
device.load(device.build())
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
        device.load(device.build())


DTYPES = [
    {"precision": "fp32"},
    {"precision": "bf16"},
    {"precision": "fp16"},
    {"quantize": "int8"},
    {"quantize": "nf4", "precision": "fp16"},
    {"tune": "full"},
]


@pytest.fixture(scope="module")
def dtypes():
    cases = [{"model": "tiny", "positions": 320, "clips": 2} | case for case in DTYPES]
    return [figures["dtypes"] for figures in simulate(cases)]


@pytest.mark.parametrize("at", range(len(DTYPES)), ids=[str(case) for case in DTYPES])
def test_products_are_in_the_precision_asked_for_and_sums_in_float32(dtypes, at):
    half = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[
        DTYPES[at].get("precision", "bf16")
    ]
    found = dtypes[at]
    for layer in ("q_proj", "cross k_proj", "fc1", "fc2"):
        assert found[layer].endswith(f"-> {half}"), (layer, found)
    if "quantize" in DTYPES[at]:
        assert found["fc1"] == found["cross k_proj"] == f"{half} -> {half}", "inputs are cast"
    assert found["decoder layer_norm"].endswith("-> float32")
    assert (found["loss"], found["gradient"]) == ("float32", "float32")
