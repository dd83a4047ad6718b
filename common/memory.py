"""Memory of a training step and of a decoded batch: measured at its peak, by formula before.

The formula counts what torch keeps from the forward pass for the backward one. It was derived by
reading and checked on a CPU (tests/common/test_memory.py) and on a simulated GPU
(`python -m benchmarks.simulated_memory`).

Legend: C encoder positions, T label tokens, D width, V vocabulary.
"""

import contextlib
import os
import resource
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from transformers import WhisperConfig

from common import audio
from common.whisper import ENCODED_SAMPLES
from common.windows import FULL_WINDOW, POSITIONS_PER_SECOND

# Of the device's free memory. The rest is for what is not torch's: workspaces of cuBLAS and cuDNN,
# NCCL's buffers, kernels that are loaded late.
USED_SHARE = 0.9
CPU_SECONDS = 30.0  # on a CPU larger micro-batches are slower: they leave the caches
CPU_CACHED_SECONDS = 240.0  # without an encoder to run they are not
GPU_SECONDS = 480.0  # larger micro-batches are no faster on a GPU
CAP_MARGIN = 1.25  # of a clip's cap over the tokens that its duration can hold
TOKENS_PER_SECOND = 24  # of labels, at most: Devanagari, read fast
LIBRARIES_GIB = 0.55  # Python, torch, transformers and their like in a process on a CPU
# What an allocator takes over what lives.
# CPU: glibc's, measured over 1 to 8 clips and two widths.
# CUDA: torch's rounds to 512 bytes, and blocks above 1 MiB to 2 MiB, nothing for tensors of this
# size; what is left is blocks that were freed and fit nothing. With expandable segments, which
# `prefer_expandable_segments` asks for, neighbours join. 5 % is an allowance, never measured.
ALLOCATOR = {"cpu": 1.585, "cuda": 1.05}
CPU_PASSING = 24  # values / D a position that pass on a CPU, measured with the factor above
ADAMW_BYTES = 16  # a trained parameter: float32 weight, gradient and AdamW's two moments
FLOAT = 4  # bytes of float32
# Rows of logits that the loss computes at once. CPU: 26 MB, which the allocator reuses instead of
# returning; GPU: large enough to fill it, 425 MB.
LOGIT_ROWS = {"cpu": 128, "cuda": 2048}
SHORTEST_WINDOW = 2.56  # seconds: a clip of one second and the silence after it
DECODE_SECONDS = 960.0  # of window per batch; larger batches are no faster


@dataclass(frozen=True)
class Weights:
    """What is held whatever the batch."""

    base: int  # bytes of what is not trained, as held: quantised, half or single precision
    trainable: int  # parameters, not bytes; float32 with gradient and AdamW's two moments
    in_buckets: bool = False  # DDP holds the gradients a second time, to exchange them

    @property
    def bytes(self) -> int:
        per_parameter = ADAMW_BYTES + FLOAT * self.in_buckets
        return self.base + per_parameter * self.trainable


def count_weights(model: torch.nn.Module, *, in_buckets: bool = False) -> Weights:
    """The weights of a model, and the scales of those in 4 bits, which are no parameters."""
    base, trainable = 0, 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            trainable += parameter.numel()
            continue
        base += parameter.numel() * parameter.element_size()
        scales = getattr(parameter, "quant_state", None)
        if scales is not None:
            base += scales.absmax.numel() * scales.absmax.element_size()
    return Weights(base, trainable, in_buckets)


@dataclass(frozen=True)
class Step:
    """What a training step computes, as far as its memory depends on it."""

    device: str  # "cpu" or "cuda"
    bytes_per_value: int  # of a product: 4 in float32, 2 in half precision
    lora_targets: tuple[str, ...]  # as --lora_targets, and so on
    tune: str = "lora"
    lora_scope: str = "all"
    quantize: str = "none"
    checkpointing: bool = False  # each layer keeps its input only and is computed again
    encoder_cached: bool = False  # the encoder does not run

    def layers_with_graph(self, config: WhisperConfig) -> int:
        """Layers of the encoder that a gradient passes."""
        if self.encoder_cached or self.tune == "encoder_frozen":
            return 0
        if self.tune == "full" or self.lora_scope == "all":
            return config.encoder_layers
        return 0 if self.lora_scope == "decoder" else int(self.lora_scope.removeprefix("top_"))


@dataclass(frozen=True)
class Kept:
    """Bytes that one layer keeps for its backward pass, divided by D."""

    encoder: float  # a position
    cross: float  # layer of the decoder, a position of the encoder
    decoder: float  # a token


def kept_by_layer(config: WhisperConfig, step: Step) -> Kept:
    """Count what one layer keeps.

    A LayerNorm keeps its input in float32, under autocast too. Attention keeps query, key, value
    and result, GELU its input. A linear layer keeps its input where its weight is trained, an
    adapter always, a copy of its own behind its dropout. bitsandbytes' 8-bit product keeps its
    input though nothing of it is trained; the 4-bit one does not. Under autocast each layer whose
    weight is trained casts, and keeps, what a LayerNorm returns for itself; in float32 they share
    it, and below an adapter it is cast once (`training/lora.py`).
    """
    value, wide = step.bytes_per_value, config.encoder_ffn_dim / config.d_model
    adapted = step.lora_targets if step.tune == "lora" else ()
    keeps_inputs = step.tune != "lora" or step.quantize == "int8"
    shared = value == FLOAT or step.tune == "lora"

    def inputs(of_norm: tuple[str, ...], **others: float) -> float:
        """Values / D kept as inputs of layers that read one LayerNorm, and of others."""
        sizes = dict.fromkeys(of_norm, 1.0) | others
        kept = sum(size for name, size in sizes.items() if name in adapted)
        if keeps_inputs:
            kept += (1 if shared else len(of_norm)) + sum(others.values())
        return kept

    own = inputs(("q_proj", "k_proj", "v_proj"), out_proj=1.0)
    other = inputs(("q_proj",), out_proj=1.0)
    feed_forward = inputs(("fc1",), fc2=wide)
    states = inputs(("k_proj", "v_proj")) - (keeps_inputs and shared)  # all layers share them
    return Kept(
        encoder=2 * FLOAT + value * (4 + wide + own + feed_forward),
        cross=value * (2 + states),
        decoder=3 * FLOAT + value * (4 + 2 + wide + own + other + feed_forward),
    )


def prefer_expandable_segments() -> None:
    """Let torch's CUDA allocator grow its segments, unless the user has set it up otherwise.

    Batches of other shapes, a validation between steps and decoding free blocks that fit nothing
    else; in segments that grow, neighbours join. torch reads the variable at its first allocation
    on a GPU. Of its two names all versions read the first; 2.13 reads the second where the first is
    not set.
    """
    if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def peak_memory_gib() -> float:
    """GiB: of the GPU's allocator where there is one, else of the process's resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def reset_peak() -> None:
    """Begin anew with `peak_memory_gib`; where a system cannot reset a process's, it stays."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # Linux: man 5 proc


def held_gib(device: torch.device) -> float:
    """GiB that this process holds now: tensors on a GPU, or resident memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


def device_memory_gib(device: torch.device, num_processes: int) -> float:
    """GiB that this process may take besides what it holds: of its GPU, or its share of a machine.

    What torch's allocator has freed but kept is free for this process alone.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + kept) * USED_SHARE / 2**30
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages * USED_SHARE / 2**30 / num_processes


def predict_gib(
    config: WhisperConfig,
    weights: Weights,
    step: Step,
    *,
    seconds: float,
    tokens_per_second: float = TOKENS_PER_SECOND,
) -> float:
    """Peak GiB of a training step over `seconds` of window in one micro-batch.

    The peak is in the encoder's last layer, at the loss, or in the backward pass of the encoder's
    last layer, whichever is highest.

    Args:
        tokens_per_second: of labels.
    """
    positions = seconds * POSITIONS_PER_SECOND
    tokens = seconds * tokens_per_second
    width, value, kept = config.d_model, step.bytes_per_value, kept_by_layer(config, step)
    wide, layers = config.encoder_ffn_dim / width, step.layers_with_graph(config)
    half_stream = value < FLOAT and step.tune == "lora" and step.quantize == "none"
    stream = 2 if half_stream else FLOAT  # between layers; embeddings in float32 make it that

    # An encoder layer's own: the stream, and input and result of GELU or their gradients.
    passing = 2 * stream + 2 * value * wide
    if step.quantize == "int8":
        passing += 6 * wide  # the product as int32, and again as float16
    states = FLOAT + FLOAT  # the encoder's last LayerNorm: input and result
    # bitsandbytes' 8-bit product holds its input where checkpointing does not see it: what 2 or 3
    # LayerNorms and 1 or 2 attentions return, and GELU's result, stay.
    hidden = value * (3 + wide) if step.quantize == "int8" else 0.0
    hidden_decoder = value * (5 + wide) if step.quantize == "int8" else 0.0
    encoder = layers * (stream + hidden if step.checkpointing else kept.encoder)
    decoder = config.decoder_layers * (
        (stream + hidden_decoder) * tokens
        if step.checkpointing
        else kept.cross * positions + kept.decoder * tokens
    )
    again = kept.encoder if step.checkpointing and layers else 0.0
    if step.encoder_cached:
        passing, states = 0.0, value
    rows = min(LOGIT_ROWS[step.device], tokens)
    weight = width * config.vocab_size  # of the projection to the vocabulary, in numbers
    logits = rows * config.vocab_size * (FLOAT if stream == FLOAT else FLOAT + 2)
    if step.tune != "lora":  # the gradient of the projection, and its product with the loss scale
        logits = FLOAT * weight + max(logits, FLOAT * weight)
    activations = max(
        positions * width * (encoder + again + max(passing, states)),
        positions * width * (encoder + states) + width * decoder + logits,
    )
    if step.device == "cpu":  # freed memory is not reused by the next allocation
        passing = CPU_PASSING * value
        activations = positions * width * (encoder + again + passing) + width * decoder + logits
    copies = weights.trainable if step.tune == "lora" else weights.trainable - weight
    cast = value * copies if value < FLOAT else 0  # autocast's, of float32 weights
    libraries = LIBRARIES_GIB if step.device == "cpu" else 0.0
    transient = (activations + cast) * ALLOCATOR[step.device]
    return (weights.bytes + transient) / 2**30 + libraries


@dataclass(frozen=True)
class MemoryPlan:
    """The micro-batch that is used, and its predicted peak."""

    max_batch_seconds: float
    checkpointing: bool
    predicted_gib: float


def plan_memory(
    config: WhisperConfig, weights: Weights, step: Step, *, memory_gib: float
) -> MemoryPlan:
    """The largest useful micro-batch whose predicted peak stays within `memory_gib`.

    Whole windows of 30 seconds are counted, halving from what the kind of device gains from;
    gradient checkpointing is a last resort, for devices that hold not even one clip without it.

    Args:
        memory_gib: that the process may hold, weights included.

    Raises:
        ValueError: not even that fits.
    """
    one_clip = FULL_WINDOW / POSITIONS_PER_SECOND
    for checkpointed in sorted({step.checkpointing, True}):
        seconds = GPU_SECONDS
        if step.device == "cpu":
            seconds = CPU_CACHED_SECONDS if step.encoder_cached else CPU_SECONDS
        tried = replace(step, checkpointing=checkpointed)
        while seconds >= one_clip:
            predicted = predict_gib(config, weights, tried, seconds=seconds)
            if predicted <= memory_gib:
                return MemoryPlan(seconds, checkpointed, predicted)
            seconds /= 2
    raise ValueError(f"one clip takes {predicted:.1f} GiB of the {memory_gib:.1f} GiB given")


def predict_decoding_gib(
    config: WhisperConfig,
    *,
    seconds: float,
    bytes_per_value: int,
    device: str,
    num_beams: int = 1,
    tokens_per_second: float = TOKENS_PER_SECOND * CAP_MARGIN,
    clips_per_second: float = 1 / SHORTEST_WINDOW,
) -> float:
    """Peak GiB of decoding `seconds` of window at once, besides the model's weights.

    Held are the encoder's output, and keys and values of the decoder's layers, of encoder positions
    and of tokens. What passes is counted at once, though it is not there at once: an encoder layer
    over ENCODED_SAMPLES, one layer's keys before they are laid out by heads, a step's scores in
    float32 and in the model's precision.

    Args:
        tokens_per_second: of window, for which there is room.
    """
    width, value = config.d_model, bytes_per_value
    tokens = POSITIONS_PER_SECOND + tokens_per_second  # with keys and values, a second
    per_second = 2 * config.decoder_layers * width * value * tokens
    per_second += 2 * value * width * POSITIONS_PER_SECOND  # the encoder's output, one layer's keys
    per_second += (FLOAT + value) * config.vocab_size * clips_per_second
    # The stream and what is added to it, a LayerNorm's result, GELU's input and result.
    layer = width * value * (3 + 2 * config.encoder_ffn_dim / width)
    encoder = layer * ENCODED_SAMPLES / audio.SAMPLES_PER_POSITION
    return (seconds * num_beams * per_second + encoder) * ALLOCATOR[device] / 2**30


def plan_decoding(
    config: WhisperConfig,
    *,
    memory_gib: float,
    bytes_per_value: int,
    num_beams: int = 1,
    device: str | None = None,
) -> float:
    """Seconds of window that may be decoded at once: large batches stream the weights less often.

    Args:
        memory_gib: that is free, besides the model's weights.
        device: "cpu" or "cuda"; `None` is the one there is.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = {"bytes_per_value": bytes_per_value, "device": device, "num_beams": num_beams}
    always = predict_decoding_gib(config, seconds=0.0, **options)
    per_second = predict_decoding_gib(config, seconds=1.0, **options) - always
    return min(DECODE_SECONDS, max(SHORTEST_WINDOW, (memory_gib - always) / per_second))
