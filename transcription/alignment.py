"""When each token was spoken: cross-attention, and dynamic time warping over it.

As in openai/whisper's `timing.py`, but at the window that the clip was decoded with, with the
logarithm of the attention, and without a median filter. The method and its constants were chosen on
other sentences and voices than those they are judged on. Heads that follow the speech are those of
the generation config, or are chosen on a few clips.

Legend: B clips, T tokens, C encoder positions (20 ms), H heads of width d, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from common.windows import POSITIONS_PER_SECOND

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration

ATTENTION_FLOOR = 3e-3  # below which attention does not count
# Attention moves on early: in the median by 15 to 20 ms in a Marathi adapter, by 7 in its base.
EARLY_SECONDS = 0.015
NUM_HEADS = 8  # that are chosen where a checkpoint names none
ROUNDS = 3  # of choosing heads and warping along them


@dataclass(frozen=True)
class Aligned:
    """The tokens of one clip in time."""

    starts: np.ndarray  # (T + 1,) seconds; the last is where the last token ends
    probabilities: np.ndarray  # (T,) that the model gives to each token


@dataclass(frozen=True)
class Text:
    """A clip and what was said in it."""

    prompt: Sequence[int]  # tokens before the text
    tokens: Sequence[int]  # of the text, without the end token
    positions: int  # encoder positions that hold the clip


@torch.inference_mode()
def align(
    model: WhisperForConditionalGeneration,
    states: torch.Tensor,
    texts: Sequence[Text],
    heads: Sequence[tuple[int, int]],
) -> list[Aligned]:
    """Align clips of one window with their texts.

    Args:
        states: (B, C, D) of the encoder.
        texts: (B).
        heads: (layer, head) pairs of cross-attention that follow the speech.
    """
    hidden, weights = _attend(model, states, texts, heads)
    aligned = []
    for text, own, attention in zip(texts, hidden, weights, strict=True):
        logits = model.proj_out(own[:-1]).float()  # (T, V)
        wanted = torch.tensor(list(text.tokens), device=logits.device, dtype=torch.long)
        chosen = logits.softmax(dim=-1).gather(1, wanted[:, None])[:, 0]
        starts = token_starts(attention) / POSITIONS_PER_SECOND
        starts[1:] = np.minimum(starts[1:] + EARLY_SECONDS, text.positions / POSITIONS_PER_SECOND)
        aligned.append(Aligned(starts, chosen.cpu().numpy()))
    return aligned


def _attend(
    model: WhisperForConditionalGeneration,
    states: torch.Tensor,
    texts: Sequence[Text],
    heads: Sequence[tuple[int, int]],
) -> tuple[list[torch.Tensor], list[np.ndarray]]:
    """Run the decoder over texts that are known.

    Returns:
        (B) of hidden states (T + 1, D) and of attention (H, T + 1, C), each row that of the
        position that predicts a token, the last one the end token.
    """
    end = model.generation_config.eos_token_id
    rows = [[*text.prompt, *text.tokens] for text in texts]
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [end] * (longest - len(row)) for row in rows], device=model.device)
    decoder = model.model.decoder
    with _projections(decoder, {layer for layer, _ in heads}) as projected:
        hidden = decoder(
            input_ids=tokens, encoder_hidden_states=states, use_cache=False
        ).last_hidden_state  # (B, T, D)
    owns, weights = [], []
    for clip, text in enumerate(texts):
        before = len(text.prompt) - 1  # the position that predicts the first token
        own = slice(before, before + len(text.tokens) + 1)
        scores = [
            _head_scores(decoder, projected, layer, head, clip)[own, : text.positions]
            for layer, head in heads
        ]
        owns.append(hidden[clip, own])
        weights.append(torch.stack(scores).float().softmax(dim=-1).cpu().numpy())
    return owns, weights


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

    As in openai/whisper, a position counts for a token by how far its attention there is above the
    mean of all tokens; here that of its logarithm.

    Args:
        weights: (H, T, C) attention of each head, a token and its positions in a row.
    """
    logs = np.log(weights + ATTENTION_FLOOR)
    return warp(-(logs - logs.mean(axis=1, keepdims=True)).mean(axis=0))


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


# ------ heads


def configured_heads(model: WhisperForConditionalGeneration) -> list[tuple[int, int]]:
    """The heads that a checkpoint names; none if it names none, or some that it does not have."""
    config = model.config
    heads = getattr(model.generation_config, "alignment_heads", None) or []
    are_there = all(
        0 <= layer < config.decoder_layers and 0 <= head < config.decoder_attention_heads
        for layer, head in heads
    )
    return [(layer, head) for layer, head in heads] if are_there else []


@torch.inference_mode()
def choose_heads(
    model: WhisperForConditionalGeneration, clips: Sequence[tuple[torch.Tensor, Text]]
) -> list[tuple[int, int]]:
    """The heads of the upper half of the decoder that follow the speech of some clips best.

    First those whose attention moves on most evenly with the tokens, then those with most attention
    on the path that is warped along all chosen heads.

    Args:
        clips: states (1, C, D) and text of each.
    """
    config = model.config
    heads = [
        (layer, head)
        for layer in range(config.decoder_layers // 2, config.decoder_layers)
        for head in range(config.decoder_attention_heads)
    ]
    weights = [_attend(model, states, [text], heads)[1][0] for states, text in clips]
    scores = sum(_evenness(own) for own in weights)
    for _ in range(ROUNDS):
        chosen = np.argsort(-scores, kind="stable")[:NUM_HEADS]
        scores = sum(_share_on_path(own, token_starts(own[chosen])) for own in weights)
    return [heads[index] for index in sorted(np.argsort(-scores, kind="stable")[:NUM_HEADS])]


def _evenness(weights: np.ndarray) -> np.ndarray:
    """The correlation (H,) of tokens and the mean positions that each head attends to."""
    centers = weights @ np.arange(weights.shape[-1])  # (H, T)
    tokens = np.arange(centers.shape[1]) - (centers.shape[1] - 1) / 2
    centers = centers - centers.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(centers, axis=1) * np.linalg.norm(tokens)
    return centers @ tokens / np.maximum(norms, 1e-10)


def _share_on_path(weights: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The share (H,) of attention that lies on the positions of its token, mean of all tokens."""
    ends = np.maximum(np.append(starts[1:], weights.shape[-1]), starts + 1)
    spans = enumerate(zip(starts, ends, strict=True))
    shares = [weights[:, token, start:end].sum(axis=-1) for token, (start, end) in spans]
    return np.mean(shares, axis=0)
