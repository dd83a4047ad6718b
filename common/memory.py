"""Memory of a training step and of a decoded batch: measured at its peak, by formula before.

Legend: E, D layers of encoder and decoder, C encoder positions, S label tokens, w width.
"""

import os
import resource
from dataclasses import dataclass

import torch
from transformers import WhisperConfig

from common.batching import FULL_CONTEXT, POSITIONS_PER_SECOND
from common.loss import ROWS_ON_CPU, ROWS_ON_GPU

USED_SHARE = 0.9  # of the device's free memory; the rest is for fragmentation
CPU_SECONDS = 30.0  # on a CPU larger micro-batches are slower: they leave the caches
CPU_CACHED_SECONDS = 240.0  # without an encoder to run they are not
GPU_SECONDS = 480.0  # above it a GPU gains nothing
CAP_MARGIN = 1.25  # of a clip's cap over the tokens that its duration can hold
TOKENS_PER_SECOND = 24  # of labels, at most: Devanagari, read fast
LIBRARIES_GIB = 0.55  # Python, torch, transformers and their like in a process on a CPU
# What an allocator takes over what lives. CPU: glibc's, measured over 1 to 8 clips and two widths.
# GPU: torch's caching one, an estimate.
ALLOCATOR = {"cpu": 1.585, "cuda": 1.15}
# Tensors of width w that a LoRA step keeps for its backward pass, with q_proj and v_proj adapted:
# counted with torch's hooks for saved tensors.
# Layer of the encoder, a position: both normalisations' inputs, two inputs of the adapters, query,
# key, value, the attention's output, and four for the feed-forward layer.
KEPT_ENCODER = 12
KEPT_CROSS = 3  # layer of the decoder, an encoder position: key, value, the adapter's input
KEPT_DECODER = 16  # layer of the decoder, a token
# The same where all weights are trained: one input for query, key and value together, and the
# feed-forward layer's inputs as well. Counted by reading, not measured.
KEPT_ENCODER_FULL, KEPT_CROSS_FULL, KEPT_DECODER_FULL = 16, 2, 20
DECODE_SECONDS = 960.0  # of window decoded at once; above it nothing is gained
DECODE_SHARE = 0.5  # of the free memory, for keys and values; the rest is for what passes
PASSING = 24  # tensors of width w that one layer's backward pass holds at once, a position


@dataclass(frozen=True)
class Weights:
    """Bytes that do not depend on the batch."""

    base: int  # as held: quantised, half or single precision
    trainable: int  # parameters, not bytes; float32 with gradient and AdamW's two moments

    @property
    def bytes(self) -> int:
        return self.base + 16 * self.trainable


def peak_memory_gib() -> float:
    """GiB: of the GPU's allocator where there is one, else of the process's resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def device_memory_gib(device: torch.device, num_processes: int) -> float:
    """GiB that a process may use: of its free GPU memory, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] * USED_SHARE / 2**30
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages * USED_SHARE / 2**30 / num_processes


def predict_gib(
    config: WhisperConfig,
    weights: Weights,
    *,
    seconds: float,
    bytes_per_value: int,
    device: str,
    checkpointing: bool = False,
    encoder_cached: bool = False,
    full: bool = False,
    tokens_per_second: float = TOKENS_PER_SECOND,
) -> float:
    """Peak GiB of a training step over `seconds` of window in one micro-batch.

    Args:
        bytes_per_value: of activations, 4 in float32 and 2 in half precision.
        device: "cpu" or "cuda".
        checkpointing: each layer keeps its input only and is computed again.
        encoder_cached: the encoder does not run.
        full: all weights are trained, not an adapter.
        tokens_per_second: of labels.
    """
    positions = seconds * POSITIONS_PER_SECOND
    tokens = seconds * tokens_per_second
    width, dec = config.d_model, config.decoder_layers
    enc = 0 if encoder_cached else config.encoder_layers
    of_encoder, of_cross, of_decoder = KEPT_ENCODER, KEPT_CROSS, KEPT_DECODER
    if full:
        of_encoder, of_cross, of_decoder = KEPT_ENCODER_FULL, KEPT_CROSS_FULL, KEPT_DECODER_FULL
    if checkpointing:
        kept = enc * positions + dec * tokens + (of_encoder + of_cross) * positions
    else:
        kept = (enc * of_encoder + dec * of_cross) * positions + dec * of_decoder * tokens
    activations = (kept + PASSING * positions) * width * bytes_per_value * ALLOCATOR[device]
    rows = min(ROWS_ON_CPU if device == "cpu" else ROWS_ON_GPU, tokens)
    logits = 2 * rows * config.vocab_size * 4
    libraries = LIBRARIES_GIB if device == "cpu" else 0.0
    return (weights.bytes + activations + logits) / 2**30 + libraries


@dataclass(frozen=True)
class MemoryPlan:
    """How a device is used."""

    max_batch_seconds: float
    checkpointing: bool
    predicted_gib: float


def plan_memory(
    config: WhisperConfig,
    weights: Weights,
    *,
    memory_gib: float,
    bytes_per_value: int,
    device: str,
    checkpointing: bool = False,
    encoder_cached: bool = False,
    full: bool = False,
) -> MemoryPlan:
    """The largest useful micro-batch whose predicted peak stays within `memory_gib`.

    Whole windows of 30 seconds are counted, halving from what the kind of device gains from;
    gradient checkpointing is a last resort, for devices that hold not even one clip without it.

    Raises:
        ValueError: not even that fits.
    """
    one_clip = FULL_CONTEXT / POSITIONS_PER_SECOND
    for checkpointed in sorted({checkpointing, True}):
        seconds = GPU_SECONDS
        if device == "cpu":
            seconds = CPU_CACHED_SECONDS if encoder_cached else CPU_SECONDS
        while seconds >= one_clip:
            predicted = predict_gib(
                config, weights, seconds=seconds, bytes_per_value=bytes_per_value, device=device,
                checkpointing=checkpointed, encoder_cached=encoder_cached, full=full,
            )  # fmt: skip
            if predicted <= memory_gib:
                return MemoryPlan(seconds, checkpointed, predicted)
            seconds /= 2
    raise ValueError(f"one clip takes {predicted:.1f} GiB of the {memory_gib:.1f} GiB given")


def plan_decoding(
    config: WhisperConfig, *, memory_gib: float, bytes_per_value: int, num_beams: int = 1
) -> float:
    """Seconds of window that may be decoded at once: large batches stream the weights less often.

    What a batch holds are the decoder's keys and values, of encoder positions and of tokens.
    """
    kept = POSITIONS_PER_SECOND + TOKENS_PER_SECOND * CAP_MARGIN  # a second
    per_second = 2 * config.decoder_layers * config.d_model * bytes_per_value * kept * num_beams
    return min(DECODE_SECONDS, memory_gib * DECODE_SHARE * 2**30 / per_second)
