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
from common.audio import SAMPLES_PER_POSITION
from common.batching import DecodeBatch
from common.decoding import token_cap
from transcription.alignment import Text
from transcription.runtimes import Runtime
from transcription.stretches import Stretch
from transcription.words import split_words

# Tokens a second that no speech exceeds: 99.9 % of Hindi clips have at most 24, and the byte-level
# tokens of scripts that Whisper saw little of are twice as many.
TOKENS_PER_SECOND = 45.0
# A stretch is dropped where the model is this sure that nobody speaks. Whisper's own rule asks for
# 0.6 and for an improbable text as well: loops are probable, so it drops none of them. Silence,
# noise, hum and clicks had 0.74 and more with whisper-base, and Hindi speech up to 0.63.
NO_SPEECH_AT = 0.7


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
    logprob: float | None  # mean of its tokens; None: not known, as with PyTorch's beams
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
    runtime: Runtime, stretches: Sequence[Stretch], languages: Sequence[str], options: Options
) -> list[Segment]:
    """Decode stretches in batches of similar length.

    Args:
        languages: (B) a code each; "" is detected for that stretch by itself.

    Returns:
        (B) segments, those that are dropped among them.
    """
    segments: dict[int, Segment] = {}
    failed = []
    for batch in _plan(runtime, stretches, options, runtime.window_mode):
        own = _decode_batch(runtime, stretches, languages, batch, options)
        segments |= own
        failed += [
            index
            for index, window in zip(batch.clips, batch.windows, strict=True)
            if own[index].dropped == FAILED and window < windows.FULL_WINDOW
        ]
    if failed:
        again = [stretches[index] for index in failed]
        for batch in _plan(runtime, again, options, "full"):
            own = [languages[index] for index in failed]
            for row, segment in _decode_batch(runtime, again, own, batch, options).items():
                segments[failed[row]] = replace(segment, decoded_again=True)
    return [segments[index] for index in range(len(stretches))]


FAILED = "repetition"


def _plan(
    runtime: Runtime, stretches: Sequence[Stretch], options: Options, window_mode: str
) -> list[DecodeBatch]:
    return batching.decode_plan(
        np.array([stretch.seconds for stretch in stretches]),
        batch_seconds=options.batch_seconds,
        window_mode=window_mode,
        margin=runtime.margin,
    )


def _decode_batch(
    runtime: Runtime,
    stretches: Sequence[Stretch],
    languages: Sequence[str],
    batch: DecodeBatch,
    options: Options,
) -> dict[int, Segment]:
    """Segments by index."""

    def part(rows: slice) -> list[Segment]:
        own = DecodeBatch(batch.clips[rows], batch.windows[rows])
        return _decode_at_once(
            runtime,
            [stretches[index] for index in own.clips],
            [languages[index] for index in own.clips],
            own,
            options,
        )

    return dict(zip(batch.clips, decoding.in_halves(part, len(batch.clips)), strict=True))


def _decode_at_once(
    runtime: Runtime,
    stretches: Sequence[Stretch],
    languages: Sequence[str],
    batch: DecodeBatch,
    options: Options,
) -> list[Segment]:
    """Segments (B) of the stretches of a batch, which have languages (B)."""
    tokenizer = runtime.tokenizer
    encoded = _encode(runtime, stretches, batch)
    codes, likely = languages, [None] * len(stretches)
    if runtime.languages:
        choices = [
            choose_language(shares, runtime.languages, code)
            for shares, code in zip(runtime.language_shares(encoded), codes, strict=True)
        ]
        codes, likely = zip(*choices, strict=True)
    caps = [token_cap(stretch.seconds, TOKENS_PER_SECOND) for stretch in stretches]
    texts = runtime.decode(encoded, languages=codes, task=options.task, caps=caps)
    words = _word_times(runtime, stretches, encoded, codes, texts, batch, options)
    segments = []
    for row, (stretch, text) in enumerate(zip(stretches, texts, strict=True)):
        dropped = ""
        if decoding.loops(text.tokens) or len(text.tokens) >= caps[row]:
            dropped = FAILED
        if text.no_speech is not None and text.no_speech > options.no_speech_at:
            dropped = "no_speech"
        segment = Segment(
            start=_rounded(stretch.speech_start, 2),
            end=_rounded(stretch.speech_end, 2),
            text=tokenizer.decode(text.tokens, skip_special_tokens=True).strip(),
            language=codes[row],
            language_probability=_rounded(likely[row], 3),
            logprob=_rounded(text.logprob, 3),
            no_speech_probability=_rounded(text.no_speech, 3),
            decoded_again=False,
            dropped=dropped,
            words=words[row],
        )
        segments.append(segment)
    return segments


def _rounded(value: float | None, digits: int) -> float | None:
    """The last bits depend on the batch that a stretch is decoded in."""
    return None if value is None else round(value, digits)


def _encode(runtime: Runtime, stretches: Sequence[Stretch], batch: DecodeBatch) -> Any:
    """The stretches of a batch, each at its window."""
    waves = torch.zeros(len(stretches), batch.window * SAMPLES_PER_POSITION, dtype=torch.int16)
    for row, stretch in enumerate(stretches):
        samples = torch.from_numpy(stretch.samples)[: waves.shape[1]]
        waves[row, : len(samples)] = samples  # the window holds the stretch but for rounding
    return runtime.encode(waves, batch.windows)


# ------ languages


def choose_language(shares: torch.Tensor, languages: Sequence[str], code: str) -> tuple[str, float]:
    """A language, the most probable one if `code` is empty, and its probability among all.

    Args:
        shares: (L) probabilities of the languages.
        languages: (L) codes.
    """
    index = languages.index(code) if code else int(shares.argmax())
    return languages[index], float(shares[index])


def detect_language(
    runtime: Runtime, stretches: Sequence[Stretch], options: Options
) -> tuple[str, float]:
    """The language of several stretches together, and its probability.

    Probabilities are averaged over seconds of speech.
    """
    total = torch.zeros(len(runtime.languages))
    for batch in _plan(runtime, stretches, options, runtime.window_mode):
        own = [stretches[index] for index in batch.clips]
        shares = runtime.language_shares(_encode(runtime, own, batch))
        seconds = torch.tensor([stretch.seconds for stretch in own])
        total += (seconds[:, None] * shares).sum(dim=0)
    code, probability = choose_language(total / total.sum(), runtime.languages, "")
    return code, round(probability, 3)


# ------ words

HEAD_CLIPS = 5  # on which heads are chosen
HEAD_TRIES = 40  # stretches that are decoded at most to have so many clips
HEAD_TOKENS = 8  # of a clip at least; fewer show no movement


def find_heads(
    runtime: Runtime, stretches: Iterable[Stretch], language: str, options: Options
) -> list[tuple[int, int]]:
    """The heads of alignment: those of the checkpoint, or chosen on the first stretches that fit.

    Args:
        stretches: read as far as need be.
        language: code, or "" to detect that of each.

    Returns:
        No heads where no stretch has a text that can be used.
    """
    heads = runtime.configured_heads()
    if heads:
        return heads
    clips: list[tuple[Any, Text]] = []
    for stretch in itertools.islice(stretches, HEAD_TRIES):
        [segment] = decode_stretches(runtime, [stretch], [language], replace(options, heads=()))
        code = segment.language
        tokens = labels.text_ids(runtime.tokenizer, segment.text, code, options.task)
        if segment.dropped or len(tokens) < HEAD_TOKENS:
            continue
        [batch] = _plan(runtime, [stretch], options, runtime.window_mode)
        encoded = _encode(runtime, [stretch], batch)
        text = _text(runtime, stretch, code, tokens, batch.window, options.task)
        clips.append((encoded, text))
        if len(clips) == HEAD_CLIPS:
            break
    return runtime.choose_heads(clips) if clips else []


def _text(
    runtime: Runtime, stretch: Stretch, code: str, tokens: Sequence[int], window: int, task: str
) -> Text:
    """What was said in a stretch that was decoded at a window of so many positions."""
    prompt = labels.prompt(runtime.tokenizer, code, task)
    return Text(prompt, tokens, min(windows.positions(stretch.seconds), window))


def _word_times(
    runtime: Runtime,
    stretches: Sequence[Stretch],
    encoded: Any,
    codes: Sequence[str],
    texts: Sequence[decoding.Decoded],
    batch: DecodeBatch,
    options: Options,
) -> list[tuple[Word, ...]]:
    """The words of each text, timed; none where there are no heads of alignment."""
    words: list[tuple[Word, ...]] = [()] * len(stretches)
    if not options.heads:
        return words
    known = {
        row: _text(runtime, stretches[row], codes[row], text.tokens, window, options.task)
        for row, (text, window) in enumerate(zip(texts, batch.windows, strict=True))
        if text.tokens
    }
    for row, times in runtime.align(encoded, known, options.heads).items():
        written = "en" if options.task == "translate" else codes[row]
        words[row] = tuple(
            _word(stretches[row], times.starts, times.probabilities, word)
            for word in split_words(runtime.tokenizer, texts[row].tokens, written)
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
