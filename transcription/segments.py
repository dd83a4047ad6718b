"""Stretches of speech -> segments: text, language, probabilities and the times of words.

A segment depends on its stretch and language alone, never on the stretches decoded with it.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from common import batching, decoding, labels, windows
from common.batching import DecodeBatch
from common.predictions import collator_for, token_cap
from common.systems import System
from transcription.alignment import Text, align, choose_heads, configured_heads
from transcription.stretches import Stretch
from transcription.words import split_words

# Tokens a second that no speech exceeds: 99.9 % of Hindi clips have at most 24, and the byte-level
# tokens of scripts that Whisper saw little of are twice as many.
TOKENS_PER_SECOND = 45.0
# A stretch is dropped where the model is this sure that nobody speaks. Whisper's own rule asks for
# 0.6 and for an improbable text as well: loops are probable, so it drops none of them. Silence,
# noise, hum and clicks had 0.74 and more with whisper-base, and Hindi speech up to 0.63.
NO_SPEECH_AT = 0.7
NO_SPEECH_TOKENS = ("<|nospeech|>", "<|nocaptions|>")


@dataclass(frozen=True, slots=True)
class Word:
    """A word in time."""

    start: float  # seconds from the start of the recording
    end: float
    text: str  # with the space before it, if there is one
    probability: float  # mean of its tokens


@dataclass(frozen=True)
class Segment:
    """What was said in one stretch of speech."""

    start: float  # seconds from the start of the recording
    end: float
    text: str
    language: str  # "" for an English-only model
    language_probability: float | None  # that the model gives this language on this stretch
    logprob: float | None  # mean of its tokens
    no_speech_probability: float | None
    decoded_again: bool  # at 30 seconds, as its own window gave a loop or hit the cap
    dropped: str = ""  # why its text is not written: no_speech, repetition, or "" where it is
    words: tuple[Word, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Options:
    """How stretches are decoded."""

    task: str  # transcribe or translate
    batch_seconds: float  # of window in a batch
    heads: Sequence[tuple[int, int]] = ()  # of alignment; none: words get no times
    no_speech_at: float = NO_SPEECH_AT


def decode_stretches(
    system: System, stretches: Sequence[Stretch], languages: Sequence[str], options: Options
) -> list[Segment]:
    """Decode stretches in batches of similar length.

    Args:
        languages: (B) a code each; "" is detected for that stretch by itself.

    Returns:
        (B) segments, those that are dropped among them.
    """
    segments: dict[int, Segment] = {}
    plan = _plan(system, stretches, options, system.window_mode)
    for batch in plan:
        segments |= _decode_batch(system, stretches, languages, batch, options)
    failed = [index for index, segment in segments.items() if segment.dropped == FAILED]
    if failed:
        again = [stretches[index] for index in failed]
        for batch in _plan(system, again, options, "full"):
            own = [languages[index] for index in failed]
            for row, segment in _decode_batch(system, again, own, batch, options).items():
                segments[failed[row]] = replace(segment, decoded_again=True)
    return [segments[index] for index in range(len(stretches))]


FAILED = "repetition"


def _plan(
    system: System, stretches: Sequence[Stretch], options: Options, window_mode: str
) -> list[DecodeBatch]:
    return batching.decode_plan(
        np.array([stretch.seconds for stretch in stretches]),
        batch_seconds=options.batch_seconds,
        window_mode=window_mode,
        margin=system.margin,
    )


def _decode_batch(
    system: System,
    stretches: Sequence[Stretch],
    languages: Sequence[str],
    batch: DecodeBatch,
    options: Options,
) -> dict[int, Segment]:
    """Segments by index."""

    def part(rows: slice) -> list[Segment]:
        own = DecodeBatch(batch.clips[rows], batch.windows[rows])
        return _decode_at_once(
            system,
            [stretches[index] for index in own.clips],
            [languages[index] for index in own.clips],
            own,
            options,
        )

    return dict(zip(batch.clips, decoding.in_halves(part, len(batch.clips)), strict=True))


def _decode_at_once(
    system: System,
    stretches: Sequence[Stretch],
    languages: Sequence[str],
    batch: DecodeBatch,
    options: Options,
) -> list[Segment]:
    """Segments (B) of the stretches of a batch, which have languages (B)."""
    model, tokenizer = system.model, system.tokenizer
    encoded = _encode(system, stretches, batch)
    start = decoding.start_probabilities(model, encoded).cpu()  # (B, V)
    silent = no_speech_probabilities(start, tokenizer)
    codes, likely = languages, [None] * len(stretches)
    if model.generation_config.is_multilingual:
        choices = [
            choose_language(row, model.generation_config.lang_to_id, code)
            for row, code in zip(start, codes, strict=True)
        ]
        codes, likely = zip(*choices, strict=True)
    texts = decoding.decode_encoded(
        model,
        encoded,
        languages=codes if model.generation_config.is_multilingual else None,
        task=options.task,
        caps=[token_cap(stretch.seconds, TOKENS_PER_SECOND) for stretch in stretches],
    )
    words = _word_times(system, stretches, encoded, codes, texts, options)
    segments = []
    for row, (stretch, text) in enumerate(zip(stretches, texts, strict=True)):
        cap = token_cap(stretch.seconds, TOKENS_PER_SECOND)
        dropped = ""
        if decoding.loops(text.tokens) or len(text.tokens) >= cap:
            dropped = FAILED
        if silent[row] is not None and silent[row] > options.no_speech_at:
            dropped = "no_speech"
        segment = Segment(
            start=_rounded(stretch.speech_start, 2),
            end=_rounded(stretch.speech_end, 2),
            text=tokenizer.decode(text.tokens, skip_special_tokens=True).strip(),
            language=codes[row],
            language_probability=_rounded(likely[row], 3),
            logprob=_rounded(text.logprob, 3),
            no_speech_probability=_rounded(silent[row], 3),
            decoded_again=False,
            dropped=dropped,
            words=words[row],
        )
        segments.append(segment)
    return segments


def _rounded(value: float | None, digits: int) -> float | None:
    """The last bits depend on the batch that a stretch is decoded in."""
    return None if value is None else round(value, digits)


@torch.inference_mode()
def _encode(
    system: System, stretches: Sequence[Stretch], batch: DecodeBatch
) -> list[tuple[list[int], torch.Tensor]]:
    """The stretches of a batch, as `decoding.encode_windows` encodes them."""
    rows = [{"audio": stretch.samples} for stretch in stretches]
    waves = collator_for(system.model).waves(rows, batch.window)["waves"]
    return decoding.encode_windows(system.model, waves, batch.windows)


# ------ languages and speech


def no_speech_probabilities(start: torch.Tensor, tokenizer: Any) -> list[float | None]:
    """The probability of each clip that nobody speaks; `None` if the tokenizer lacks the token.

    Args:
        start: (B, V) probabilities of what follows the start token.
    """
    known = tokenizer.get_added_vocab()
    token = next((known[name] for name in NO_SPEECH_TOKENS if name in known), None)
    if token is None or token >= start.shape[1]:
        return [None] * len(start)
    return start[:, token].tolist()


def choose_language(start: torch.Tensor, tokens: dict[str, int], code: str) -> tuple[str, float]:
    """A language, the most probable one if `code` is empty, and its probability among all.

    Args:
        start: (V) probabilities of what follows the start token.
        tokens: ids by token, such as `<|hi|>`.
    """
    codes = [name[2:-2] for name in tokens]
    shares = start[list(tokens.values())]
    shares = shares / shares.sum()
    index = codes.index(code) if code else int(shares.argmax())
    return codes[index], float(shares[index])


def detect_language(
    system: System, stretches: Sequence[Stretch], options: Options
) -> tuple[str, float]:
    """The language of several stretches together, and its probability.

    Probabilities are averaged over seconds of speech.
    """
    tokens = system.model.generation_config.lang_to_id
    total = torch.zeros(len(tokens))
    ids = list(tokens.values())
    for batch in _plan(system, stretches, options, system.window_mode):
        own = [stretches[index] for index in batch.clips]
        encoded = _encode(system, own, batch)
        shares = decoding.start_probabilities(system.model, encoded).cpu()[:, ids]
        seconds = torch.tensor([stretch.seconds for stretch in own])
        total += (seconds[:, None] * shares / shares.sum(dim=1, keepdim=True)).sum(dim=0)
    total /= total.sum()
    index = int(total.argmax())
    return list(tokens)[index][2:-2], round(float(total[index]), 3)


# ------ words

HEAD_CLIPS = 5  # on which heads are chosen
HEAD_TRIES = 40  # stretches that are decoded at most to have so many clips
HEAD_TOKENS = 8  # of a clip at least; fewer show no movement


def find_heads(
    system: System, stretches: Iterable[Stretch], language: str, options: Options
) -> list[tuple[int, int]]:
    """The heads of alignment: those of the checkpoint, or chosen on the first stretches that fit.

    Args:
        stretches: read as far as need be.
        language: code, or "" to detect that of each.

    Returns:
        No heads where no stretch has a text that can be used.
    """
    heads = configured_heads(system.model)
    if heads:
        return heads
    clips: list[tuple[torch.Tensor, Text]] = []
    for stretch in itertools.islice(stretches, HEAD_TRIES):
        [segment] = decode_stretches(system, [stretch], [language], replace(options, heads=()))
        tokens = labels.text_ids(system.tokenizer, segment.text, segment.language, options.task)
        if segment.dropped or len(tokens) < HEAD_TOKENS:
            continue
        [batch] = _plan(system, [stretch], options, system.window_mode)
        [(_, states)] = _encode(system, [stretch], batch)
        prompt = labels.prompt(system.tokenizer, segment.language, options.task)
        positions = min(windows.positions(stretch.seconds), states.shape[1])
        clips.append((states, Text(prompt, tokens, positions)))
        if len(clips) == HEAD_CLIPS:
            break
    return choose_heads(system.model, clips) if clips else []


def _word_times(
    system: System,
    stretches: Sequence[Stretch],
    encoded: list[tuple[list[int], torch.Tensor]],
    codes: Sequence[str],
    texts: Sequence[decoding.Decoded],
    options: Options,
) -> list[tuple[Word, ...]]:
    """The words of each text, timed; none where there are no heads of alignment."""
    words: list[tuple[Word, ...]] = [()] * len(stretches)
    for group, states in encoded if options.heads else ():
        rows = [row for row in group if texts[row].tokens]
        if not rows:
            continue
        texts_known = [
            Text(
                labels.prompt(system.tokenizer, codes[row], options.task),
                texts[row].tokens,
                min(windows.positions(stretches[row].seconds), states.shape[1]),
            )
            for row in rows
        ]
        own = states[[group.index(row) for row in rows]]
        aligned = align(system.model, own, texts_known, options.heads)
        for row, times in zip(rows, aligned, strict=True):
            stretch = stretches[row]
            written = "en" if options.task == "translate" else codes[row]
            words[row] = tuple(
                _word(stretch, times.starts, times.probabilities, word)
                for word in split_words(system.tokenizer, texts[row].tokens, written)
            )
    return words


def _word(stretch: Stretch, starts: np.ndarray, probabilities: np.ndarray, word: Any) -> Word:
    """A word with its times, inside the speech of its stretch."""
    start, end = (
        min(max(stretch.start + float(starts[token]), stretch.speech_start), stretch.speech_end)
        for token in (word.start, word.end)
    )
    mean = float(probabilities[word.start : word.end].mean())
    return Word(round(start, 2), round(end, 2), word.text, round(mean, 3))
