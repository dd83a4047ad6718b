"""Floating-point operations of Whisper by formula, and what this machine can do at most.

Legend: B clips, C encoder positions, S label tokens.
"""

import time
from dataclasses import dataclass

import torch
from transformers import WhisperConfig

GEMM_SIZE = 2048  # rows and columns of the square matrices whose product is timed
GEMM_REPEATS = 15
GEMM_SECONDS = 10.0  # no repeat is begun after it: a CPU without bf16 takes 25 s for a single one


@dataclass(frozen=True)
class Work:
    """Operations of one clip's forward pass, a multiply-add counted as two."""

    linear: float  # products with weights
    attention: float  # products of activations


def forward(config: WhisperConfig, positions: int, tokens: int) -> Work:
    """Operations of the encoder over `positions` and the teacher-forced decoder over `tokens`.

    The terms are those of the architecture: a layer's four projections and two feed-forward
    products, both attentions, two convolutions, and the projection to the vocabulary.
    """
    width, c, s = config.d_model, positions, tokens
    enc, dec = config.encoder_layers, config.decoder_layers
    encoder = (8 + 4 * config.encoder_ffn_dim / width) * enc * c * width**2
    convolutions = 2 * 2 * c * 3 * config.num_mel_bins * width + 2 * c * 3 * width**2
    decoder = (12 + 4 * config.decoder_ffn_dim / width) * dec * s * width**2
    cross = 4 * dec * c * width**2  # keys and values of the encoder's output
    vocabulary = 2 * s * width * config.vocab_size
    attention = 4 * width * (enc * c**2 + dec * (s**2 + s * c))
    return Work(encoder + convolutions + decoder + cross + vocabulary, attention)


def lora_step(config: WhisperConfig, positions: int, tokens: int) -> float:
    """Operations a clip costs in training: forward, and backward without gradients of weights.

    A frozen product costs as much again backward; attention, whose operands both need a gradient
    and which is computed again, two and a half times.
    """
    work = forward(config, positions, tokens)
    return 2 * work.linear + 3.5 * work.attention


def gemm_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of the best of several square matrix products."""
    a = torch.randn(GEMM_SIZE, GEMM_SIZE, dtype=dtype, device=device)
    b = torch.randn(GEMM_SIZE, GEMM_SIZE, dtype=dtype, device=device)
    best, began = float("inf"), time.perf_counter()
    for _ in range(GEMM_REPEATS):
        start = time.perf_counter()
        if start - began > GEMM_SECONDS:
            break
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * GEMM_SIZE**3 / best
