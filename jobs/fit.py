"""Whether an instance type can run a job at all, as far as that is known before it is paid for."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.instances import GPU_OF, num_gpus

if TYPE_CHECKING:  # imports torch, which `status` does not need
    from common.memory import Step, Weights

OLDEST_CAPABILITY = 7.5  # of GPUs that torch's wheels for CUDA 13, as in the image, are built for
CPU_PARAMETERS = 500e6  # a larger model is not trained or scored on CPUs in a job's time
BYTES_OF_BASE = {"int8": 1.1, "nf4": 0.6}  # a parameter, with embeddings in half: an estimate
LARGER = ("ml.g5.2xlarge", "ml.g6e.2xlarge", "ml.p4d.24xlarge", "ml.p5.4xlarge")


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
    """Size of `openai/whisper-SIZE`, or of the model in a folder; `None`: unknown."""
    file = Path(model, "config.json")
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        width, enc, dec = config["d_model"], config["encoder_layers"], config["decoder_layers"]
        matrices = 12 * enc + 16 * dec  # of width x width
        return Shape(width, enc, dec, matrices * width**2 + config.get("vocab_size", 0) * width)
    name = model.removeprefix("openai/whisper-")
    if name == model:
        return None
    for ending in (".en", "-v2", "-v3"):
        name = name.removesuffix(ending)
    return SHAPES.get(name.removeprefix("large-v3-"))


def estimate_weights(shape: Shape, step: "Step", lora_rank: int) -> "Weights":
    """The weights that train_lora.py would count in the loaded model."""
    from common.memory import Weights

    if step.tune == "lora":
        attentions = shape.encoder_layers + 2 * shape.decoder_layers
        trainable = attentions * len(step.lora_targets) * 2 * shape.width * lora_rank
        bytes_each = BYTES_OF_BASE.get(step.quantize, step.bytes_per_value)
        return Weights(base=int(bytes_each * shape.parameters), trainable=trainable)
    frozen = 0
    if step.tune == "encoder_frozen":
        frozen = 12 * shape.encoder_layers * shape.width**2
    return Weights(base=4 * frozen, trainable=int(shape.parameters) - frozen)


def memory_problem(gpu_gib: float, shape: Shape, step: "Step", lora_rank: int) -> str | None:
    """Why a training step of one clip does not fit, by train_lora.py's own estimate.

    Args:
        gpu_gib: memory of an empty GPU.
    """
    from transformers import WhisperConfig

    from common.memory import USED_SHARE, plan_memory

    config = WhisperConfig(
        d_model=shape.width,
        encoder_layers=shape.encoder_layers,
        decoder_layers=shape.decoder_layers,
        encoder_ffn_dim=4 * shape.width,
        decoder_ffn_dim=4 * shape.width,
        vocab_size=51_866,
    )
    weights = estimate_weights(shape, step, lora_rank)
    try:
        plan_memory(config, weights, step, memory_gib=gpu_gib * USED_SHARE)
    except ValueError as error:
        return str(error)
    return None


def unfit(instance_type: str, model: str, step: "Step | None", lora_rank: int = 0) -> str | None:
    """Why an instance type cannot run a job, and which can; `None` if nothing is known against it.

    Args:
        model: name or folder of the base; empty: unknown.
        step: what a training step computes; `None`: its memory is not estimated.
    """
    family = instance_type.split(".")[1] if "." in instance_type else ""
    option, shape = f"--instance_type {instance_type}:", shape_of(model)
    if family.startswith(("trn", "inf", "p6e")):
        chip = "an Arm CPU" if family.startswith("p6e") else "AWS's own chips instead of GPUs"
        return f"{option} has {chip}, for which the image is not built: give ml.g5.2xlarge"
    if num_gpus(instance_type) == 0 and shape and shape.parameters > CPU_PARAMETERS:
        return (
            f"{option} has no GPU, and {model} has {shape.parameters / 1e6:,.0f} million "
            "parameters: give ml.g5.2xlarge"
        )
    gpu = GPU_OF.get(family)
    if gpu is None:
        return None
    if gpu.capability < OLDEST_CAPABILITY:
        return (
            f"{option} its {gpu.name} (compute capability {gpu.capability}) is older than torch "
            f"for CUDA 13 can use, {OLDEST_CAPABILITY}: give ml.g4dn.xlarge or ml.g5.2xlarge"
        )
    if step is None or shape is None:
        return None
    problem = memory_problem(gpu.gib, shape, step, lora_rank)
    if problem is None:
        return None
    remedy = larger_instance(gpu.gib, shape, step, lora_rank)
    other = "quantize nf4" if step.tune == "lora" else "tune lora"
    return (
        f"{option} {model} with --train.tune {step.tune} does not fit its {gpu.name}: "
        f"{problem}: {remedy}, or --train.{other}"
    )


def larger_instance(gpu_gib: float, shape: Shape, step: "Step", lora_rank: int) -> str:
    """The first of LARGER whose GPU has more than `gpu_gib` and fits the step, as a remedy."""
    for name in LARGER:
        gib = GPU_OF[name.split(".")[1]].gib
        if gib > gpu_gib and memory_problem(gib, shape, step, lora_rank) is None:
            return f"give {name}"
    return "take a smaller --train.model"
