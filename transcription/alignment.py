"""When each token was spoken: cross-attention, and dynamic time warping over it.

As in openai/whisper's `timing.py`, but at the window that the clip was decoded with. Heads that
follow the speech are those of the generation config.

Legend: B clips, T tokens, C encoder positions (20 ms), H heads of width d, D width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import WhisperForConditionalGeneration

from common.windows import POSITIONS_PER_SECOND

MEDIAN_POSITIONS = 7  # of the median filter along time


@dataclass(frozen=True)
class Aligned:
    """The tokens of one clip in time."""

    starts: np.ndarray  # (T + 1,) seconds; the last is where the last token ends
    probabilities: np.ndarray  # (T,) that the model gives to each token


@torch.inference_mode()
def align(
    model: WhisperForConditionalGeneration,
    states: torch.Tensor,
    *,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    positions: Sequence[int],
    heads: Sequence[tuple[int, int]],
) -> list[Aligned]:
    """Align clips of one window with their tokens.

    Args:
        states: (B, C, D) of the encoder.
        prompts: (B) tokens before each text, of one length.
        texts: (B) tokens of each text, without the end token.
        positions: (B) encoder positions that hold the clip, at most C.
        heads: (layer, head) pairs of cross-attention that follow the speech.
    """
    end = model.generation_config.eos_token_id
    rows = [[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)]
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [end] * (longest - len(row)) for row in rows], device=model.device)
    decoder = model.model.decoder
    with _projections(decoder, {layer for layer, _ in heads}) as projected:
        hidden = decoder(
            input_ids=tokens, encoder_hidden_states=states, use_cache=False
        ).last_hidden_state  # (B, T, D)
    aligned = []
    for clip, (prompt, text, count) in enumerate(zip(prompts, texts, positions, strict=True)):
        before = len(prompt) - 1  # the position that predicts the first token
        own = slice(before, before + len(text) + 1)
        scores = torch.stack(
            [_head_scores(decoder, projected, layer, head, clip)[own, :count]
             for layer, head in heads]
        )  # fmt: skip
        starts = token_starts(scores.float().softmax(dim=-1).cpu().numpy())
        logits = model.proj_out(hidden[clip, own][:-1]).float()  # (T, V)
        wanted = torch.tensor(text, device=logits.device, dtype=torch.long)
        chosen = logits.softmax(dim=-1).gather(1, wanted[:, None])[:, 0]
        aligned.append(Aligned(starts / POSITIONS_PER_SECOND, chosen.cpu().numpy()))
    return aligned


def _head_scores(
    decoder: nn.Module, projected: dict[tuple[int, str], torch.Tensor], layer: int, head: int,
    clip: int,
) -> torch.Tensor:  # fmt: skip
    """Attention scores (T, C) of one head on one clip, before the softmax."""
    attention = decoder.layers[layer].encoder_attn
    own = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
    queries, keys = (projected[layer, name][clip, :, own] for name in ("q_proj", "k_proj"))
    return attention.scaling * queries @ keys.T


@contextmanager
def _projections(
    decoder: nn.Module, layers: set[int]
) -> Iterator[dict[tuple[int, str], torch.Tensor]]:
    """Queries (B, T, D) and keys (B, C, D) of cross-attention, by layer and name, as computed."""
    kept: dict[tuple[int, str], torch.Tensor] = {}

    def keep(key: tuple[int, str]) -> object:
        def hook(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
            kept[key] = output

        return hook

    hooks = [
        getattr(decoder.layers[layer].encoder_attn, name).register_forward_hook(keep((layer, name)))
        for layer in layers
        for name in ("q_proj", "k_proj")
    ]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def token_starts(weights: np.ndarray) -> np.ndarray:
    """The position (T,) at which each token starts.

    Args:
        weights: (H, T, C) attention of each head, a token and its positions in a row.
    """
    spread = weights.std(axis=1, keepdims=True)
    normed = (weights - weights.mean(axis=1, keepdims=True)) / np.maximum(spread, 1e-10)
    return warp(-_median_filter(normed).mean(axis=0))


def _median_filter(values: np.ndarray) -> np.ndarray:
    """The median of MEDIAN_POSITIONS positions around each, along the last axis."""
    pad = MEDIAN_POSITIONS // 2
    if values.shape[-1] <= pad:
        return values
    widths = [(0, 0)] * (values.ndim - 1) + [(pad, pad)]
    padded = np.pad(values, widths, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, MEDIAN_POSITIONS, axis=-1)
    return np.median(windows, axis=-1)


def warp(cost: np.ndarray) -> np.ndarray:
    """Dynamic time warping: the first column (T,) of each row on the cheapest monotone path.

    A row at a time: within a row, the cheapest way to column j comes down at some column k <= j and
    goes on to the right, so it is a running minimum of what it costs to come down, less the sum of
    the columns before.

    Args:
        cost: (T, C) of each row at each column.

    >>> warp(np.array([[0.0, 0.0, 9.0, 9.0], [9.0, 9.0, 0.0, 0.0]])).tolist()
    [0, 2]
    """
    rows, columns = cost.shape
    came_down = np.zeros((rows, columns), dtype=np.int64)  # column where the row was entered
    is_diagonal = np.zeros((rows, columns), dtype=bool)
    indices = np.arange(columns)
    total = np.cumsum(cost[0].astype(np.float64))
    for row in range(1, rows):
        diagonal = np.concatenate([[np.inf], total[:-1]])
        is_diagonal[row] = diagonal <= total
        entry = np.minimum(diagonal, total)
        sums = np.cumsum(cost[row].astype(np.float64))
        before = np.concatenate([[0.0], sums[:-1]])
        relative = entry - before
        best = np.minimum.accumulate(relative)
        came_down[row] = np.maximum.accumulate(np.where(relative <= best, indices, 0))
        total = best + sums
    starts = np.zeros(rows, dtype=np.int64)
    column = columns - 1
    for row in range(rows - 1, 0, -1):
        starts[row] = came_down[row, column]
        column = starts[row] - is_diagonal[row, starts[row]]
    return starts
