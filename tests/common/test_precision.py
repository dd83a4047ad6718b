"""Which precision a device gets, and which GPUs are refused; torch's answers are made up here."""

import json

import launch
import pytest
import torch
from short_run import small_options, train

from common import cli, gpu, precision
from training import engine


@pytest.fixture
def device(monkeypatch):
    """Let torch report a GPU of a compute capability, or none."""

    def report(capability, built_for=("sm_75", "sm_80", "sm_90", "sm_120", "compute_120")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(capability is not None))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)  # as a T4 says
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(built_for))

    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    for name in ("CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return report


@pytest.mark.parametrize("launcher", [None, "no"])
@pytest.mark.parametrize(
    ("capability", "expected"),
    [(None, "fp32"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((12, 0), "bf16")],
)
def test_auto_asks_the_device_and_the_launchers_no_is_no_request(
    device, monkeypatch, launcher, capability, expected
):
    device(capability)
    if launcher:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    assert precision.choose("auto") == expected


def test_what_the_launcher_asks_for_is_taken_and_an_option_goes_before_it(device, monkeypatch):
    device((8, 0))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert precision.choose("auto") == "fp16"
    assert precision.choose("fp32") == "fp32"


@pytest.mark.parametrize(
    ("capability", "option", "launcher", "message"),
    [
        ((7, 5), "bf16", "no", r"--precision bf16: a GPU of compute capability 7\.5 only emulates"),
        (
            (7, 5),
            "auto",
            "bf16",
            r"launch --mixed_precision bf16: a GPU of compute capability 7\.5",
        ),
        (None, "fp16", "no", "--precision fp16: needs a GPU: give --precision fp32 or bf16"),
        (None, "auto", "fp16", "accelerate launch --mixed_precision fp16: needs a GPU"),
        ((9, 0), "auto", "fp8", "accelerate launch --mixed_precision fp8: is not supported"),
    ],
)
def test_a_precision_that_the_device_lacks_is_one_line(
    device, monkeypatch, capability, option, launcher, message
):
    device(capability)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    with pytest.raises(cli.UserError, match=message) as error:
        precision.choose(option)
    assert "\n" not in str(error.value)


def test_deepspeed_on_a_gpu_without_bf16_is_one_line(monkeypatch):
    monkeypatch.setattr(engine, "name", lambda _: "zero2")
    with pytest.raises(cli.UserError, match=r"--precision fp16: DeepSpeed .* or take DDP"):
        engine.check(None, quantize="none", precision="fp16")


def test_a_run_says_and_records_what_it_used(checkpoint, prepared, tmp_path, capsys):
    options = small_options(checkpoint, prepared, tmp_path, max_steps=1, eval_clips=1)
    train(options)
    assert "cpu, fp32, base none" in capsys.readouterr().out
    for name in ("train.json", "adapter/recipe.json"):
        used = json.loads((tmp_path / "run" / name).read_text(encoding="utf-8"))["config"]
        assert (used["precision"], used["max_batch_seconds"]) == ("fp32", 30.0), name
        assert used["global_batch_size"] == 4


# ------ GPUs


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((8, 9), ["sm_75", "sm_80", "sm_90"], True),  # an L4 runs what is built for 8.0
        ((7, 0), ["sm_75", "sm_80", "compute_90"], False),  # a V100, and CUDA 13's builds
        ((10, 3), ["sm_90a", "sm_100", "sm_120"], True),
        ((12, 1), ["sm_90", "compute_90"], True),  # the driver compiles for newer GPUs
        ((8, 0), ["sm_86"], False),
    ],
)
def test_a_gpu_that_torch_has_no_kernels_for_is_refused(device, capability, built_for, runs):
    device(capability, built_for)
    if runs:
        gpu.check()
        return
    with pytest.raises(cli.UserError, match="install a torch that is built for it"):
        gpu.check()


def test_a_gpu_that_torch_cannot_use_is_one_line_and_never_silently_the_cpu(
    device, monkeypatch, tmp_path
):
    device(None)
    gpu.check(tmp_path)  # no GPU at all: the CPU is what was meant
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    with pytest.raises(cli.UserError, match=r"torch .* is built without CUDA") as error:
        gpu.check(tmp_path)
    assert "\n" not in str(error.value) and "update its driver" in str(error.value)

    def old_driver():
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 12020). Please update your "
            "GPU driver by downloading and installing a new version from the URL"
        )

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", old_driver)
    with pytest.raises(cli.UserError, match=r"is too old \(found version 12020\)\): update its"):
        gpu.check(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    gpu.check(tmp_path)  # hidden on purpose


def test_a_process_without_a_gpu_of_its_own_says_so(device, monkeypatch):
    device((8, 0))
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(cli.OwnError, match="process 2 of this machine has no GPU, there are 1: "):
        precision.choose("auto")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert precision.choose("auto") == "fp32", "the launcher was asked for the CPU"


@pytest.mark.parametrize(
    ("capability", "cudnn"), [((8, 9), True), ((9, 0), False), ((12, 0), False)]
)
def test_attention_by_cudnn_is_off_where_it_would_come_first(device, capability, cudnn):
    before = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        device(capability)
        gpu.set_up("bf16")
        assert torch.backends.cuda.cudnn_sdp_enabled() == cudnn
        assert torch.backends.cudnn.allow_tf32 == before[1]
        gpu.set_up("fp32")
        assert not torch.backends.cudnn.allow_tf32, "float32 is float32 in convolutions, too"
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


OPEN = """
import os, sys
sys.path[:0] = ["tests", "."]
import torch
from common import cli
from common.accelerator import open_accelerator
rank = int(os.environ["RANK"])
try:
    open_accelerator(precision=("fp16", "bf16")[rank], timeout_minutes=1.0)
except cli.UserError as error:
    print(f"rank {rank}: {error}", flush=True)
"""


@pytest.mark.slow
def test_processes_whose_gpus_differ_in_precision_are_refused(tmp_path):
    script = tmp_path / "open.py"
    script.write_text(OPEN)
    done = launch.run(str(script), {}, processes=2)
    for rank in (0, 1):
        line = f"rank {rank}: --precision auto: the GPUs of this run differ, bf16 and fp16"
        assert line in done.stdout, done.stderr[-2000:]
