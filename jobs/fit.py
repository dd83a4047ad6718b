"""Whether an instance type can run a job at all: known before it is paid for, or not said."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.instances import GPU_OF, num_gpus
from jobs.request import Eval, Train, TrainingJob

OLDEST_CAPABILITY = 7.5  # of GPUs that torch's wheels for CUDA 13, as in the image, are built for
CPU_PARAMETERS = 500e6  # a larger model is not trained or scored on CPUs in a job's time
BYTES_OF_BASE = {"int8": 1.1, "nf4": 0.6}  # a parameter, with embeddings in half: an estimate


@dataclass(frozen=True)
class Shape:
    """A Whisper's size, from its config or, for OpenAI's, from the paper's table."""

    width: int
    encoder_layers: int
    decoder_layers: int
    parameters: float


SHAPES = {  # by the end of the name
    "tiny": Shape(384, 4, 4, 39e6),
    "base": Shape(512, 6, 6, 74e6),
    "small": Shape(768, 12, 12, 244e6),
    "medium": Shape(1024, 24, 24, 769e6),
    "large": Shape(1280, 32, 32, 1550e6),
    "turbo": Shape(1280, 32, 4, 809e6),
}


def shape_of(model: str) -> Shape | None:
    """Size of `openai/whisper-SIZE`, or of a folder's model; `None` where it is not known."""
    file = Path(model, "config.json")
    if file.is_file():
        said = json.loads(file.read_text(encoding="utf-8"))
        width, enc, dec = said["d_model"], said["encoder_layers"], said["decoder_layers"]
        layers = 12 * enc + 16 * dec  # matrices of width x width
        return Shape(width, enc, dec, layers * width**2 + said.get("vocab_size", 0) * width)
    name = model.removeprefix("openai/whisper-")
    if name == model:
        return None
    for ending in (".en", "-v2", "-v3"):
        name = name.removesuffix(ending)
    return SHAPES.get(name.removeprefix("large-v3-"))


def memory_problem(gpu_gib: float, options: Any, shape: Shape) -> str | None:
    """Why a training step of one clip does not fit, by train_lora.py's own estimate.

    Args:
        gpu_gib: memory of a GPU with nothing on it.
        options: of train_lora.py.
    """
    from transformers import WhisperConfig  # seconds; train_lora.py has it loaded already

    from common.memory import USED_SHARE, Step, Weights, plan_memory

    config = WhisperConfig(
        d_model=shape.width,
        encoder_layers=shape.encoder_layers,
        decoder_layers=shape.decoder_layers,
        encoder_ffn_dim=4 * shape.width,
        decoder_ffn_dim=4 * shape.width,
        vocab_size=51_866,
    )
    half = options.precision != "fp32"
    if options.tune == "lora":
        attentions = shape.encoder_layers + 2 * shape.decoder_layers
        matrices = attentions * len(options.lora_targets.split(","))
        trainable = matrices * 2 * shape.width * options.lora_rank
        held = BYTES_OF_BASE.get(options.quantize, 2 if half else 4)
        weights = Weights(base=int(held * shape.parameters), trainable=trainable)
    else:
        frozen = 0.0
        if options.tune == "encoder_frozen":
            frozen = 12 * shape.encoder_layers * shape.width**2
        weights = Weights(base=int(4 * frozen), trainable=int(shape.parameters - frozen))
    step = Step(
        device="cuda",
        bytes_per_value=2 if half else 4,
        tune=options.tune,
        lora_targets=tuple(options.lora_targets.split(",")),
        lora_scope=options.lora_scope,
        quantize=options.quantize,
        checkpointing=options.gradient_checkpointing,
        encoder_cached=options.cache_encoder,
    )
    try:
        plan_memory(config, weights, step, memory_gib=gpu_gib * USED_SHARE)
    except ValueError as error:
        return str(error)
    return None


def unfit(job: TrainingJob, options: Any) -> str | None:
    """Why the instance type cannot run the job, and what can; `None` where nothing is known."""
    family = job.instance_type.split(".")[1] if "." in job.instance_type else ""
    told = f"--instance_type {job.instance_type}:"
    if family.startswith(("trn", "inf", "p6e")):
        chip = "an Arm CPU" if family.startswith("p6e") else "AWS's own chips instead of GPUs"
        return f"{told} has {chip}, for which the image is not built: give ml.g5.2xlarge"
    shape = shape_of(getattr(options, "model", "")) if not job.model_s3 else None
    if num_gpus(job.instance_type) == 0 and shape and shape.parameters > CPU_PARAMETERS:
        return (
            f"{told} has no GPU, and {options.model} has {shape.parameters / 1e6:,.0f} million "
            "parameters: give ml.g5.2xlarge"
        )
    gpu = GPU_OF.get(family)
    if gpu is None:
        return None
    if gpu.capability < OLDEST_CAPABILITY:
        return (
            f"{told} its {gpu.name} (compute capability {gpu.capability}) is older than torch for "
            f"CUDA 13 can use, {OLDEST_CAPABILITY}: give ml.g4dn.xlarge or ml.g5.2xlarge"
        )
    if isinstance(job, Eval) or shape is None or "zero3" in job.accelerate_config:
        return None
    assert isinstance(job, Train)
    problem = memory_problem(gpu.gib, options, shape)
    if problem is None:
        return None
    larger = [
        other
        for other in ("g5.2xlarge", "g6e.2xlarge", "p4d.24xlarge", "p5.4xlarge")
        if GPU_OF[other.split(".")[0]].gib > gpu.gib
        and memory_problem(GPU_OF[other.split(".")[0]].gib, options, shape) is None
    ]
    other = "quantize nf4" if options.tune == "lora" else "tune lora"
    remedy = f"give ml.{larger[0]}" if larger else "take a smaller --train.model"
    return (
        f"{told} {options.model} with --train.tune {options.tune} does not fit its {gpu.name}: "
        f"{problem}: {remedy}, or --train.{other}"
    )
