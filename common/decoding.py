"""Whisper's tokens of a batch of clips, greedily or with beams, each clip at its own window.

Greedy decoding has a loop of its own: clips of different windows go on together, keys and values
are written in place, and clips that have ended leave the batch. Its tokens are `generate`'s.

Legend: B clips, N samples, C encoder positions (20 ms), D width, T tokens,
H heads of width d, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache
from torch.nn.functional import scaled_dot_product_attention as attend
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutput

from common.audio import SAMPLES_PER_POSITION
from common.labels import MAX_LABELS, PROMPT_LENGTH, prompt_layout
from common.memory import CAP_MARGIN
from common.whisper import encode

if TYPE_CHECKING:  # loads for seconds what an export to CTranslate2 does not need
    from transformers import WhisperForConditionalGeneration
    from transformers.models.whisper.modeling_whisper import WhisperAttention

R = TypeVar("R")  # what is computed of a clip
# Keys and values (clips, H, C, d) of encoder states: by layer, then a pair for each window.
Cross = list[list[tuple[torch.Tensor, torch.Tensor]]]

SHRINK_AT = 0.8  # share of clips unfinished at which the finished ones leave the batch
# A text loops where a run of tokens repeats this often and is at least this long in all. Of 639
# Hindi transcripts none does (at most 3.2 repeats), while 9 of them exceed the compression ratio of
# 2.4 that Whisper's own decoding takes for a loop: Devanagari's bytes are alike.
LOOP_REPEATS = 4
LOOP_TOKENS = 12
CAP_EXTRA = 16  # tokens on top, for clips so short that a rate says little
# What a checkpoint's configuration may ask of `generate` and decoding here does not know: several
# texts, more than tokens, or second attempts by sampling, which need features.
ONE_TEXT = {
    "num_return_sequences": 1, "return_dict_in_generate": False, "output_scores": False,
    "output_logits": False, "output_attentions": False, "output_hidden_states": False,
    "compression_ratio_threshold": None, "logprob_threshold": None, "no_speech_threshold": None,
}  # fmt: skip


@dataclass(frozen=True)
class Decoded:
    """The text of one clip."""

    tokens: list[int]  # prompt and end token cut; as many as its cap if it hit that
    logprob: float | None  # mean over its tokens and the end token; None: beams, or not known
    no_speech: float | None = None  # probability that nobody speaks; None: not asked for


def token_cap(seconds: float, tokens_per_second: float) -> int:
    """Maximum number of new tokens of a clip: what its duration can hold, and a margin.

    Args:
        tokens_per_second: the rate that 99.9 % of the prepared clips stay below.
    """
    return min(
        math.ceil(seconds * tokens_per_second * CAP_MARGIN) + CAP_EXTRA,
        MAX_LABELS - PROMPT_LENGTH,
    )


def in_halves(compute: Callable[[slice], list[R]], clips: int) -> list[R]:
    """Results of a batch's clips; where it does not fit the GPU's memory, one half after the other.

    Args:
        compute: gives the results of some of the clips, which do not depend on the others.
    """

    def results(start: int, stop: int) -> list[R]:
        try:
            return compute(slice(start, stop))
        except torch.OutOfMemoryError:
            if stop - start == 1:
                raise
        clear_device_cache(garbage_collection=True)  # out of the handler, which holds the frames
        middle = start + (stop - start) // 2
        return results(start, middle) + results(middle, stop)

    return results(0, clips)


@torch.inference_mode()
def decode(
    model: WhisperForConditionalGeneration,
    waves: torch.Tensor,
    *,
    windows: Sequence[int],
    languages: Sequence[str] | None,
    task: str,
    caps: Sequence[int],
    num_beams: int = 1,
    timestamps: bool = False,
) -> list[Decoded]:
    """Transcribe a batch, greedily or with beams, in halves where memory does not hold it.

    The tokens of a clip do not depend on its batch.

    Args:
        waves: int16 (B, N); what lies after a clip's window is not looked at.
        windows: (B) encoder positions that each clip is given.
        languages: (B) codes; `None` for an English-only model, which takes neither them nor a task.
        caps: (B) most new tokens of each clip, so that one looping clip ends by itself.
        timestamps: greedily and with the timestamps that the model itself writes: unlike
            `generate`, nothing forces their order.

    Returns:
        (B) texts.
    """

    def part(rows: slice) -> list[Decoded]:
        return decode_encoded(
            model, encode_windows(model, waves[rows], windows[rows]),
            languages=None if languages is None else languages[rows], task=task,
            caps=caps[rows], num_beams=num_beams, timestamps=timestamps,
        )  # fmt: skip

    return in_halves(part, len(caps))


@torch.inference_mode()
def decode_encoded(
    model: WhisperForConditionalGeneration,
    encoded: list[tuple[list[int], torch.Tensor]],
    *,
    languages: Sequence[str] | None,
    task: str,
    caps: Sequence[int],
    num_beams: int = 1,
    timestamps: bool = False,
    cross: Cross | None = None,
) -> list[Decoded]:
    """Decode clips that `encode_windows` has encoded, all at once; else as `decode`.

    Args:
        cross: what `cross_states` gives, where it is known; greedy decoding empties it, so that
            memory is freed as clips end.
    """
    if timestamps or (num_beams == 1 and _is_plain_greedy(model.generation_config)):
        prompts = _prompts(model, languages, task, len(caps))
        if not timestamps:
            return _greedy(model, encoded, prompts, caps, cross=cross)
        no_timestamps = model.generation_config.no_timestamps_token_id
        return _greedy(model, encoded, prompts[:, :-1], caps, forbidden=[no_timestamps])
    texts = [Decoded([], None)] * len(caps)
    for rows, states in encoded:
        group_texts = _generate(
            model,
            states,
            languages=None if languages is None else [languages[row] for row in rows],
            task=task,
            caps=[caps[row] for row in rows],
            num_beams=num_beams,
        )
        for row, tokens in zip(rows, group_texts, strict=True):
            texts[row] = Decoded(tokens, None)
    return texts


def encode_windows(
    model: WhisperForConditionalGeneration, waves: torch.Tensor, windows: Sequence[int]
) -> list[tuple[list[int], torch.Tensor]]:
    """Encode clips of equal windows together: their rows, and their states (rows, C, D)."""
    return [
        (rows, encode(model, waves[rows, : window * SAMPLES_PER_POSITION]))
        for window, rows in group_windows(windows)
    ]


def group_windows(windows: Sequence[int]) -> list[tuple[int, list[int]]]:
    """The rows of each window, shortest window first.

    >>> group_windows([32, 64, 32])
    [(32, [0, 2]), (64, [1])]
    """
    return [
        (window, [row for row, own in enumerate(windows) if own == window])
        for window in sorted(set(windows))
    ]


def loops(tokens: Sequence[int]) -> bool:
    """Whether some tokens come again and again in a row, anywhere in a text.

    >>> loops([5, 7, 9] * 4), loops([5, 7, 9] * 3), loops([5] * 12), loops([5] * 11)
    (True, False, True, False)
    """
    for period in range(1, len(tokens) // LOOP_REPEATS + 1):
        wanted, same = max(LOOP_REPEATS * period, LOOP_TOKENS) - period, 0
        for token, before in zip(tokens[period:], tokens, strict=False):
            same = same + 1 if token == before else 0
            if same == wanted:
                return True
    return False


# ------ beams, and what only `generate` knows


class EndAtCap(LogitsProcessor):
    """Force the end token on each row once it has as many new tokens as its own cap."""

    def __init__(self, caps: torch.Tensor, prompt_length: int, end_token_id: int) -> None:
        self.caps = caps  # (B,)
        self.prompt_length = prompt_length
        self.end_token_id = end_token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Args: input_ids (B * beams, T) so far; scores (B * beams, vocabulary) of the next."""
        caps = self.caps.repeat_interleave(len(input_ids) // len(self.caps))
        at_cap = input_ids.shape[1] - self.prompt_length >= caps
        forced = torch.full_like(scores, -math.inf)
        forced[:, self.end_token_id] = 0.0
        return torch.where(at_cap[:, None], forced, scores)


def _generate(
    model: WhisperForConditionalGeneration,
    encoded: torch.Tensor,
    *,
    languages: Sequence[str] | None,
    task: str,
    caps: Sequence[int],
    num_beams: int,
) -> list[list[int]]:
    """The library's own decoding of clips of one window, (B, C, D)."""
    end = model.generation_config.eos_token_id
    prompt = {} if languages is None else {"language": list(languages), "task": task}
    prompt_length = len(prompt_layout(0, 0)) if languages is None else PROMPT_LENGTH
    with _one_text(model):
        tokens = model.generate(
            encoder_outputs=BaseModelOutput(encoded),
            return_timestamps=False,
            num_beams=num_beams,
            max_new_tokens=min(max(caps) + 1, MAX_LABELS - prompt_length),
            logits_processor=LogitsProcessorList(
                [EndAtCap(torch.tensor(caps, device=encoded.device), prompt_length, end)]
            ),
            **prompt,
        )
    return [row[: row.index(end)] if end in row else row for row in tokens.tolist()]


@contextmanager
def _one_text(model: WhisperForConditionalGeneration) -> Iterator[None]:
    """Let `generate` give a text for each clip and nothing else, whatever the checkpoint asks for.

    An option of None would not do: `generate` then takes the checkpoint's value.
    """
    kept = model.generation_config
    model.generation_config = copy.deepcopy(kept)
    for name, value in ONE_TEXT.items():
        setattr(model.generation_config, name, value)
    try:
        yield
    finally:
        model.generation_config = kept


def _is_plain_greedy(config: GenerationConfig) -> bool:
    """Whether a checkpoint asks for nothing that only `generate` knows."""
    if config.repetition_penalty not in (None, 1.0):
        return False
    return not any(
        (
            config.no_repeat_ngram_size,
            config.min_length,
            config.min_new_tokens,
            config.bad_words_ids,
            config.sequence_bias,
            config.exponential_decay_length_penalty,
        )
    )


# ------ greedy


def cross_states(
    model: WhisperForConditionalGeneration, encoded: list[tuple[list[int], torch.Tensor]]
) -> Cross:
    """Keys and values of clips that `encode_windows` has encoded."""
    return [
        [
            tuple(
                _heads(project(states), layer.encoder_attn).contiguous()
                for project in (layer.encoder_attn.k_proj, layer.encoder_attn.v_proj)
            )
            for _, states in encoded
        ]
        for layer in model.model.decoder.layers
    ]


@torch.inference_mode()
def start_probabilities(
    model: WhisperForConditionalGeneration,
    encoded: list[tuple[list[int], torch.Tensor]],
    cross: Cross | None = None,
) -> torch.Tensor:
    """Probabilities (B, V) of what follows the start token: a language, or that nobody speaks.

    Args:
        cross: what `cross_states` gives, where it is known.
    """
    caches = [_new_cache(own, 1) for own in cross or cross_states(model, encoded)]
    start = model.generation_config.decoder_start_token_id
    clips = [clip for group, _ in encoded for clip in group]
    tokens = torch.full((len(clips), 1), start, device=model.device)
    scores = _next_scores(model, tokens, caches, 0).float()
    probabilities = torch.empty_like(scores)
    probabilities[clips] = scores.softmax(dim=-1)
    return probabilities


def _prompts(
    model: WhisperForConditionalGeneration, languages: Sequence[str] | None, task: str, clips: int
) -> torch.Tensor:
    """The tokens (B, P) that decoding starts from, as `generate` makes them."""
    config = model.generation_config
    start, no_timestamps = config.decoder_start_token_id, config.no_timestamps_token_id
    asked: list[tuple[int, ...]] = [()] * clips
    if languages is not None:
        task_id = config.task_to_id[task]
        asked = [(config.lang_to_id[f"<|{code}|>"], task_id) for code in languages]
    rows = [prompt_layout(start, no_timestamps, tokens) for tokens in asked]
    return torch.tensor(rows, device=model.device)


@dataclass
class LayerCache:
    """Keys and values of one decoder layer, for clips in the order of their windows."""

    keys: torch.Tensor  # (B, H, T, d), with room for all tokens
    values: torch.Tensor
    cross: list[tuple[torch.Tensor, torch.Tensor]]  # of the encoder's states: (clips, H, C, d) each

    def keep(self, rows: list[int], length: int) -> None:
        """Keep only the clips `rows`, of which `length` tokens are cached."""
        self.keys, self.values = (_keep(part, rows, length) for part in (self.keys, self.values))
        cross, start = [], 0
        for keys, values in self.cross:
            own = [row - start for row in rows if 0 <= row - start < len(keys)]
            start += len(keys)
            if len(own) == len(keys):
                cross.append((keys, values))
            elif own:
                cross.append((keys[own], values[own]))
        self.cross = cross


def _keep(old: torch.Tensor, rows: list[int], length: int) -> torch.Tensor:
    """Some clips of a cache (B, H, T, d) with its room, without copying the empty part."""
    new = old.new_empty((len(rows), *old.shape[1:]))
    new[:, :, :length] = old[rows, :, :length]
    return new


def _heads(x: torch.Tensor, attention: WhisperAttention) -> torch.Tensor:
    """(B, T, D) -> (B, H, T, d)."""
    return x.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)


def _new_cache(cross: list[tuple[torch.Tensor, torch.Tensor]], room: int) -> LayerCache:
    """Keys and values of the encoder's states, and room for those of `room` tokens."""
    keys, _ = cross[0]  # under autocast its dtype is not that of the states
    _, heads, _, width = keys.shape
    shape = (sum(len(own) for own, _ in cross), heads, room, width)
    return LayerCache(keys.new_empty(shape), keys.new_empty(shape), cross)


def _queries(attention: WhisperAttention, hidden: torch.Tensor) -> torch.Tensor:
    """(B, H, T, d) of hidden (B, T, D), scaled where the stock model scales them."""
    return _heads(attention.q_proj(hidden) * attention.scaling, attention)


def _join(attention: WhisperAttention, heads: torch.Tensor) -> torch.Tensor:
    """(B, T, D) from the outputs of the heads, (B, H, T, d)."""
    return attention.out_proj(heads.transpose(1, 2).flatten(2))


def _next_scores(
    model: WhisperForConditionalGeneration,
    tokens: torch.Tensor,
    caches: list[LayerCache],
    position: int,
) -> torch.Tensor:
    """Scores (B, V) of what follows tokens (B, T), the first of which is at `position`."""
    decoder, end = model.model.decoder, position + tokens.shape[1]
    hidden = decoder.embed_tokens(tokens) + decoder.embed_positions.weight[position:end]
    for layer, cache in zip(decoder.layers, caches, strict=True):
        self_attn, cross_attn = layer.self_attn, layer.encoder_attn
        normed = layer.self_attn_layer_norm(hidden)
        cache.keys[:, :, position:end] = _heads(self_attn.k_proj(normed), self_attn)
        cache.values[:, :, position:end] = _heads(self_attn.v_proj(normed), self_attn)
        past = cache.keys[:, :, :end], cache.values[:, :, :end]
        queries = _queries(self_attn, normed)
        hidden = hidden + _join(
            self_attn, attend(queries, *past, scale=1.0, is_causal=position == 0)
        )

        normed = layer.encoder_attn_layer_norm(hidden)
        groups = _queries(cross_attn, normed).split([len(keys) for keys, _ in cache.cross])
        attended = [
            attend(queries, *states, scale=1.0)
            for queries, states in zip(groups, cache.cross, strict=True)
        ]
        hidden = hidden + _join(cross_attn, torch.cat(attended))

        normed = layer.final_layer_norm(hidden)
        hidden = hidden + layer.fc2(layer.activation_fn(layer.fc1(normed)))
    return model.proj_out(decoder.layer_norm(hidden[:, -1]))


def _greedy(
    model: WhisperForConditionalGeneration,
    encoded: list[tuple[list[int], torch.Tensor]],
    prompts: torch.Tensor,
    caps: Sequence[int],
    forbidden: Sequence[int] = (),
    cross: Cross | None = None,
) -> list[Decoded]:
    """The most probable token, again and again, in a batch that shrinks as clips end.

    Args:
        encoded: clips and their states, a pair for each window.
        prompts: (B, P) tokens.
        forbidden: tokens that are never taken, beside those of the checkpoint.
        cross: keys and values of the states, where they are known.
    """
    config, texts = model.generation_config, [[] for _ in caps]
    suppressed, suppressed_first = (
        torch.tensor(
            [token for token in ids or [] if 0 <= token < model.config.vocab_size],
            dtype=torch.long,
            device=prompts.device,
        )
        for ids in ([*(config.suppress_tokens or []), *forbidden], config.begin_suppress_tokens)
    )
    clips = [clip for group, _ in encoded for clip in group]  # of the rows of the batch
    unfinished = set(clips)
    room, cross = prompts.shape[1] + max(caps), cross or cross_states(model, encoded)
    caches = [_new_cache(own, room) for own in cross]
    cross.clear()
    tokens, position = prompts[clips], 0
    logprobs, owners = [], []  # of each token: on the device, and its clip
    while unfinished:
        scores = _next_scores(model, tokens, caches, position)
        scores[:, suppressed] = -math.inf
        if position == 0:
            scores[:, suppressed_first] = -math.inf
        position += tokens.shape[1]
        tokens = scores.argmax(dim=-1, keepdim=True)  # (B, 1)
        scores = scores.float()
        logprobs.append(scores.gather(1, tokens)[:, 0] - scores.logsumexp(dim=-1))
        owners += [clip if clip in unfinished else None for clip in clips]
        for clip, token in zip(clips, tokens[:, 0].tolist(), strict=True):
            if clip not in unfinished:
                continue
            if token == config.eos_token_id:
                unfinished.remove(clip)
                continue
            texts[clip].append(token)
            if len(texts[clip]) == caps[clip]:
                unfinished.remove(clip)
        if unfinished and len(unfinished) <= SHRINK_AT * len(clips):
            rows = [row for row, clip in enumerate(clips) if clip in unfinished]
            for cache in caches:
                cache.keep(rows, position)
            tokens, clips = tokens[rows], [clips[row] for row in rows]
    own: dict[int, list[float]] = {clip: [] for clip in range(len(caps))}
    for clip, logprob in zip(owners, torch.cat(logprobs).tolist(), strict=True):
        if clip is not None:
            own[clip].append(logprob)
    means = [sum(values) / len(values) for values in own.values()]
    return [Decoded(*pair) for pair in zip(texts, means, strict=True)]
