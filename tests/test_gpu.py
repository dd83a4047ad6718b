"""For a machine with a GPU: what a CPU cannot show of training and decoding on it.

    python -m pytest -p no:xdist tests/test_gpu.py -m gpu

At most ten minutes on one GPU, random weights, no Hub; a table of memory, kernels and times ends
it. The same functions run on a CPU with a tiny model, so that they are known to work.
"""

import dataclasses
import functools
import gc
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator
from short_run import AUGMENTED
from simulated_cuda.device import what_is_missing
from simulated_cuda.models import MODELS
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

import train_lora
from benchmarks import simulated_memory
from common import adapter as adapter_files
from common import audio, decoding, memory, precision, predictions, whisper
from common.batching import MicroBatch
from common.collator import IGNORED, label_positions, load_batches
from common.prepared import load_prepared
from training import augment, lora, tuning
from training.loss import SpeechLoss
from training.step import batch_loss, split_rows

GIB = 2**30
LARGE_NEEDS = 20 * GIB  # of GPU memory; below it whisper-small is tried
KINDS = ("fp32", "bf16", "fp16", "int8", "nf4")
STEPS = 6  # on one batch, after one that warms up
# What a prediction may be off: below, the estimate's own 5 %; above, its allowance.
LEAST_RATIO, MOST_RATIO = 0.9, 1.25
TABLE: list[str] = []

on_gpu = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")],
)


@pytest.fixture(params=[on_gpu, "cpu"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The GPU, and for a look at the tests themselves the CPU."""
    if request.param == "cpu":
        yield torch.device("cpu")
        return
    empty_gpu()
    yield torch.device("cuda", torch.cuda.current_device())
    empty_gpu()


def empty_gpu() -> None:
    """Give back the memory of an earlier test, whose model may be part of a cycle."""
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="module", autouse=True)
def table(request: pytest.FixtureRequest) -> Iterator[None]:
    """Print what was measured when all is done."""
    TABLE.clear()
    yield
    if TABLE:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print("\n" + "\n".join([heading(), *TABLE]))


@dataclass(frozen=True)
class Size:
    """A model and a batch for it."""

    model: str  # of MODELS; "" is the tiny checkpoint of all tests
    clips: int
    positions: int
    tokens: int


def size_for(device: torch.device) -> Size:
    """As large as the device takes, in seconds."""
    if device.type == "cpu":
        return Size("", 2, 160, 12)
    total = torch.cuda.get_device_properties(device).total_memory
    return Size("large-v2" if total > LARGE_NEEDS else "small", 4, 1500, 128)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of random checkpoints, by name; made where they are asked for."""
    return {"folder": tmp_path_factory.mktemp("checkpoints")}


def random_checkpoint(folder: Path, name: str, device: torch.device) -> Path:
    """A Whisper of real dimensions and random weights, in bfloat16."""
    path = folder / name
    if path.exists():
        return path
    torch.manual_seed(0)
    with device:
        model = WhisperForConditionalGeneration(WhisperConfig(**MODELS[name])).to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=50_258, eos_token_id=50_257, pad_token_id=50_257,
        no_timestamps_token_id=50_363, lang_to_id={"<|mr|>": 50_320},
        task_to_id={"transcribe": 50_359}, is_multilingual=True, suppress_tokens=[],
        begin_suppress_tokens=[], max_length=448,
    )  # fmt: skip
    model.save_pretrained(path)
    return path


def make_inputs(base: WhisperForConditionalGeneration, size: Size) -> dict[str, torch.Tensor]:
    """A batch as the collator gives it, of noise and one sentence."""
    generator = torch.Generator().manual_seed(0)
    most = min(base.config.vocab_size, 50_000)
    labels = torch.randint(3, min(most, 250), (1, size.tokens), generator=generator)
    labels = labels.expand(size.clips, -1).clone()
    if size.clips > 1:
        labels[1, size.tokens // 2 :] = IGNORED
    start = torch.full((size.clips, 1), base.config.decoder_start_token_id)
    given = torch.cat([start, labels[:, :-1].clamp(min=0)], dim=1)
    return {
        "waves": tiny.waves(size.clips, size.positions),
        "labels": labels,
        "decoder_input_ids": given,
        "label_positions": label_positions(labels),
        "clip_seeds": torch.arange(size.clips),
    }


@dataclass
class Trained:
    """A model that is ready to be trained, as train_lora.py makes it."""

    base: WhisperForConditionalGeneration
    model: torch.nn.Module  # with an adapter
    speech_loss: torch.nn.Module
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    step: memory.Step


def make_trained(path: Path, kind: str, device: torch.device) -> Trained:
    """Load a base, put an adapter on it as by default, and prepare both."""
    autocast = {"int8": "bf16", "nf4": "bf16"}.get(kind, kind)
    quantize = kind if kind in ("int8", "nf4") else "none"
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(autocast, autocast), cpu=device.type == "cpu"
    )
    held = precision.DTYPES[autocast]
    base = whisper.load_base(str(path), dtype=held, quantize=quantize, device=accelerator.device)
    config = train_lora.Config(precision=autocast, quantize=quantize)
    model = tuning.trainable_model(base, config.tuning())
    trainable = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=config.learning_rate, fused=True)
    speech_loss, optimizer = accelerator.prepare(SpeechLoss(model), optimizer)
    speech_loss.train()
    step = config.memory_step(device.type)
    return Trained(base, model, speech_loss, optimizer, accelerator, step)


def take_step(trained: Trained, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Forward, backward, clip, step: the loss of a token, on the device."""
    count = len(inputs["label_positions"])
    loss = batch_loss(trained.speech_loss, inputs) / count
    trained.accelerator.backward(loss)
    parameters = [one for one in trained.model.parameters() if one.requires_grad]
    trained.accelerator.clip_grad_norm_(parameters, 1.0)
    trained.optimizer.step()
    trained.optimizer.zero_grad()
    return loss.detach()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    """Since `reset_peak`; on a CPU of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return memory.peak_memory_gib()


def measure_steps(
    trained: Trained, inputs: dict[str, torch.Tensor], device: torch.device
) -> tuple[list[float], float, float]:
    """Losses of a warm-up step and STEPS more; seconds per step and peak GiB of the latter."""
    losses = [take_step(trained, inputs)]
    reset_peak(device)
    began = time.perf_counter()
    losses += [take_step(trained, inputs) for _ in range(STEPS)]
    synchronize(device)
    seconds, peak = (time.perf_counter() - began) / STEPS, peak_gib(device)
    return [float(loss) for loss in losses], seconds, peak


def estimate_gib(trained: Trained, size: Size) -> float:
    """Peak GiB of a step by the formula that sizes micro-batches."""
    seconds = size.clips * size.positions / 50
    return memory.predict_gib(
        trained.base.config, memory.count_weights(trained.model), trained.step, seconds=seconds,
        tokens_per_second=size.clips * size.tokens / seconds,
    )  # fmt: skip


def count_kernels(trained: Trained, inputs: dict[str, torch.Tensor], device: torch.device) -> int:
    """Kernels that a step launches, without copies and fills; 0 on a CPU."""
    if device.type == "cpu":
        take_step(trained, inputs)
        return 0
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        take_step(trained, inputs)
        torch.cuda.synchronize(device)
    events = (one for one in profile.events() if "cuda" in str(one.device_type).lower())
    return sum(not one.name.startswith(("Memcpy", "Memset")) for one in events)


@functools.cache
def simulated(size: Size, kinds: tuple[str, ...] = KINDS) -> dict[str, tuple[float, int]]:
    """Peak GiB and kernels of the same step on the simulated device, by kind; zeros without one."""
    batch = dataclasses.asdict(size) | {"targets": train_lora.Config.lora_targets}
    cases = [
        batch | ({"quantize": kind} if kind in ("int8", "nf4") else {"precision": kind})
        for kind in kinds
    ]
    try:
        done = list(simulated_memory.simulate(cases))
    except RuntimeError:
        return dict.fromkeys(kinds, (0.0, 0))
    figures = ((case["peak"] / GIB, case["kernels"]) for case in done)
    return dict(zip(kinds, figures, strict=True))


def heading() -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return (
        f"{name}, torch {torch.__version__}\n{'what':<34}{'peak GiB':>9}{'estimate':>9}"
        f"{'simulated':>10}{'kernels':>9}{'simulated':>10}{'s':>8}"
    )


def note(
    what: str, *, peak: float, estimate: float, seconds: float,
    kernels: int = 0, simulated_gib: float = 0.0, simulated_kernels: int = 0,
) -> None:  # fmt: skip
    """A line of the table."""
    TABLE.append(
        f"{what:<34}{peak:9.2f}{estimate:9.2f}{simulated_gib:10.2f}{kernels:9,}"
        f"{simulated_kernels:10,}{seconds:8.3f}"
    )


@pytest.mark.slow
def test_a_random_checkpoint_of_real_dimensions_loads_and_its_step_is_simulated(tmp_path):
    """What the tests on a GPU are made of, with the smallest of the models."""
    cpu, size = torch.device("cpu"), Size("tiny", 2, 160, 12)
    trained = make_trained(random_checkpoint(tmp_path, "tiny", cpu), "fp32", cpu)
    inputs = make_inputs(trained.base, size)
    assert 0 < take_step(trained, inputs).item() < 20
    trained.model.eval()
    with adapter_files.merged(trained.model) as merged:
        texts = decoding.decode(
            merged, inputs["waves"], windows=[160, 160], languages=["mr", "mr"],
            task="transcribe", caps=[3, 3],
        )  # fmt: skip
    assert [len(text.tokens) for text in texts] == [3, 3]
    gib, kernels = simulated(size, ("fp32",))["fp32"]
    if not what_is_missing():
        assert 0.1 < gib < 1 and kernels > 500


# ------ training and decoding in each precision


@pytest.mark.parametrize("kind", KINDS)
def test_each_precision_trains_and_decodes_within_the_estimate(
    device, kind, checkpoint, checkpoints
):
    if device.type == "cpu" and kind == "fp16":
        pytest.skip("fp16 needs a GPU")
    if kind == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no bf16")
    size = size_for(device)
    path = checkpoint
    if size.model:
        path = random_checkpoint(checkpoints["folder"], size.model, device)
    # A test that failed keeps its model.
    others = memory.held_gib(device) if device.type == "cuda" else 0.0
    trained = make_trained(path, kind, device)
    inputs = make_inputs(trained.base, size)

    losses, seconds, peak = measure_steps(trained, inputs, device)
    peak -= others
    assert all(0 < loss < 100 for loss in losses), losses
    assert losses[-1] < losses[0], f"one batch is learnt: {losses}"

    estimate = estimate_gib(trained, size)
    kernels = count_kernels(trained, inputs, device)
    gib, simulated_kernels = simulated(size)[kind] if size.model else (0.0, 0)
    note(
        f"{size.model or 'tiny'} {kind}, {size.clips} x {size.positions / 50:g} s", peak=peak,
        estimate=estimate, seconds=seconds, kernels=kernels, simulated_gib=gib,
        simulated_kernels=simulated_kernels,
    )  # fmt: skip
    if device.type == "cuda":
        assert LEAST_RATIO < estimate / peak < MOST_RATIO, f"{estimate:.2f} for {peak:.2f} GiB"

    trained.model.eval()
    with adapter_files.merged(trained.model) as merged:
        texts = decoding.decode(
            merged, inputs["waves"], windows=[size.positions] * size.clips,
            languages=["mr"] * size.clips, task="transcribe", caps=[8] * size.clips,
        )  # fmt: skip
    assert len(texts) == size.clips and all(len(text.tokens) <= 8 for text in texts)


def test_a_step_at_natural_windows_costs_less_than_at_padded_ones(device, checkpoint, checkpoints):
    """Clips of 5.9 s with 1.3 s of silence, the mean of Common Voice, beside 30 s.

    Of 16: a step of 8 waits for the launches of its kernels on a fast GPU, however short they are.
    """
    size = size_for(device)
    path = checkpoint
    if size.model:
        path = random_checkpoint(checkpoints["folder"], size.model, device)
    natural, clips = (360, 16) if size.model else (160, 2)
    others = memory.held_gib(device) if device.type == "cuda" else 0.0
    trained = make_trained(path, precision.choose("auto") if size.model else "fp32", device)
    seconds, peaks = {}, {}
    for window in (natural, 1500):
        batch = Size(size.model, clips, window, size.tokens // 2)
        inputs = make_inputs(trained.base, batch)
        _, seconds[window], peaks[window] = measure_steps(trained, inputs, device)
        note(
            f"{size.model or 'tiny'} step, {clips} x {window / 50:g} s",
            estimate=estimate_gib(trained, batch), peak=peaks[window] - others,
            seconds=seconds[window],
        )  # fmt: skip
    assert seconds[natural] < seconds[1500]
    if device.type == "cuda":
        assert peaks[natural] < peaks[1500]


def test_decoding_while_training_takes_no_more_than_was_planned(device, checkpoint, checkpoints):
    size = size_for(device)
    path = checkpoint
    if size.model:
        path = random_checkpoint(checkpoints["folder"], size.model, device)
    kind = "fp32" if device.type == "cpu" else "fp16"
    trained = make_trained(path, kind, device)
    take_step(trained, make_inputs(trained.base, size))  # AdamW's moments are there
    given = 3.0 if device.type == "cuda" else 0.02  # GiB
    value = trained.base.dtype.itemsize
    trained.model.eval()
    with adapter_files.merged(trained.model) as merged:
        planned = memory.plan_decoding(
            merged.config, memory_gib=given, bytes_per_value=value, device=device.type
        )
        clips = max(1, int(planned * 50 / size.positions))
        cap = min(int(size.positions / 50 * memory.TOKENS_PER_SECOND * memory.CAP_MARGIN), 440)
        held = memory.held_gib(device)
        reset_peak(device)
        began = time.perf_counter()
        texts = decoding.decode(
            merged, tiny.waves(clips, size.positions), windows=[size.positions] * clips,
            languages=["mr"] * clips, task="transcribe", caps=[cap] * clips,
        )  # fmt: skip
        synchronize(device)
    assert len(texts) == clips
    note(
        f"decode {clips} x {size.positions / 50:g} s, {kind}", estimate=held + given,
        peak=peak_gib(device), seconds=time.perf_counter() - began,
    )  # fmt: skip
    if device.type == "cuda":
        assert peak_gib(device) - held < given / LEAST_RATIO


# ------ fp16


def test_a_step_whose_gradient_overflows_in_fp16_is_skipped(device):
    """As accelerate's scaler does it: fused AdamW reads the flag on the device."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64).to(device)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40)
    before, changed = layer.weight.detach().clone(), []
    x = torch.randn(8, 64, device=device)
    for _ in range(40):
        with torch.autocast(device.type, torch.float16):
            loss = layer(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        changed.append(not torch.equal(layer.weight, before))
        assert changed[-1] or not torch.isfinite(norm), "skipped where it is not finite alone"
        before = layer.weight.detach().clone()
    assert not changed[0] and changed[-1], changed
    assert scaler.get_scale() < 2.0**40


# ------ memory that runs out


def gradient(trained: Trained, parts: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """Of the summed loss, over the parts of a batch."""
    trained.optimizer.zero_grad()
    for part in parts:
        batch_loss(trained.speech_loss, part).backward()
    return [one.grad.clone() for one in trained.model.parameters() if one.requires_grad]


def test_a_step_halved_after_memory_ran_out_has_the_same_gradient(device, checkpoint, checkpoints):
    size = size_for(device)
    path = random_checkpoint(checkpoints["folder"], "small", device) if size.model else checkpoint
    size = Size("small", 8, 1500, 128) if size.model else Size("", 4, 160, 12)
    trained = make_trained(path, "fp32", device)
    inputs = make_inputs(trained.base, size)
    gradient(trained, [inputs])
    held = memory.held_gib(device)
    reset_peak(device)
    whole = gradient(trained, [inputs])
    undo = limit_memory(trained, device, held, peak_gib(device))
    try:
        with pytest.raises(torch.OutOfMemoryError):
            gradient(trained, [inputs])
        trained.optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        halved = gradient(trained, list(split_rows(inputs, 2)))
    finally:
        undo()
    for one, other in zip(whole, halved, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


def limit_memory(trained: Trained, device: torch.device, held: float, peak: float):
    """Leave three quarters of what a whole batch takes; on a CPU say so by number of clips."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory / GIB
        torch.cuda.set_per_process_memory_fraction((held + 0.75 * (peak - held)) / total, device)
        return lambda: torch.cuda.set_per_process_memory_fraction(1.0, device)

    def refuse(_module, _given, options):
        if len(options["labels"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = trained.speech_loss.register_forward_pre_hook(refuse, with_kwargs=True)
    return hook.remove


# ------ what must not differ


def test_dropout_masks_are_those_of_the_cpu(device):
    drawn = []
    for place in (torch.device("cpu"), device):
        dropouts = [lora.FeatureDropout(0.05, width) for width in (1280, 5120, 1280)]
        lora.DropoutMasks(torch.nn.ModuleList(dropouts)).draw(
            torch.tensor([0, 5, 2**31, 2**32 - 1]).to(place)
        )
        drawn.append([dropout.mask.cpu() for dropout in dropouts])
    for expected, got in zip(*drawn, strict=True):
        assert torch.equal(got, expected)
        assert 0.03 < (expected == 0).float().mean() < 0.07


def test_features_and_their_masks_are_those_of_the_cpu(device):
    filters = whisper.mel_filters(80, torch.device("cpu"))
    waves = tiny.waves(3, 300).float() / 32_768
    expected = audio.log_mel(waves, filters)
    got = audio.log_mel(waves.to(device), filters.to(device))
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-3, atol=1e-3)
    masks = augment.spec_masks(range(3), np.array([1.0, 3.0, 6.0]), seed=0, step=0)
    wanted = augment.mask_features(expected, masks)
    masked = augment.mask_features(got, masks.to(device)).cpu()
    torch.testing.assert_close(masked, wanted, rtol=1e-3, atol=1e-3)


def test_batches_are_in_pinned_memory_where_there_is_a_gpu(device, prepared, base):
    rows = load_prepared(str(prepared))[0]["train"]
    batch = MicroBatch((0, 1), 256, 40)
    collate = predictions.collator_for(base)
    (inputs,) = load_batches(rows, [batch], collate, num_workers=0)
    assert inputs["waves"].is_pinned() == torch.cuda.is_available()
    moved = inputs["waves"].to(device, non_blocking=True)
    synchronize(device)
    assert torch.equal(moved.cpu(), inputs["waves"])


def test_auto_is_bf16_where_the_gpu_computes_it_itself(device, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if device.type == "cpu":
        assert (precision.choose("auto") == "fp32") == (not torch.cuda.is_available())
        return
    has_bf16 = torch.cuda.get_device_capability() >= (8, 0)  # Ampere
    assert precision.choose("auto") == ("bf16" if has_bf16 else "fp16")


@pytest.mark.slow
def test_a_whole_run_trains_and_scores(device, checkpoint, prepared, tmp_path):
    """train_lora.py from its command line to train.json, validation's word error rate included."""
    if device.type == "cpu" and torch.cuda.is_available():
        pytest.skip("train_lora.py takes the GPU")
    config = train_lora.Config(
        model=str(checkpoint), data_dir=str(prepared), output_dir=str(tmp_path / "run"),
        max_steps=3, global_batch_size=4, num_workers=0, log_every=1, wer_every=2, **AUGMENTED,
    )  # fmt: skip
    began = time.perf_counter()
    train_lora.main(config)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert "wer_raw" in lines and '"loss"' in lines
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    note(
        "tiny, train_lora.py, 3 steps", peak=memory.peak_memory_gib(), estimate=0.0,
        seconds=time.perf_counter() - began,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(pytest.main(["-p", "no:xdist", "-m", "gpu", __file__]))
