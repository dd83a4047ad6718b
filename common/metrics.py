"""Text normalisers, error counts and rates, also as `evaluate.Metric`. No torch of its own.

Counts come first and are divided once: rates are of the whole corpus, never means of means.
"""

import functools
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import datasets
import evaluate
from rapidfuzz.distance import Levenshtein
from transformers.models.whisper.english_normalizer import (
    BasicTextNormalizer,
    EnglishTextNormalizer,
)

Unit = Literal["word", "char"]

# ------ normalisers


def raw(text: str) -> str:
    """The text as it is, but for white space at its ends and repeated inside."""
    return " ".join(text.split())


def keep_marks(text: str) -> str:
    """NFC, lower case, punctuation and symbols to spaces; vowel signs and other marks stay.

    >>> keep_marks("हिंदी, मराठी! Don't")
    'हिंदी मराठी don t'
    """
    composed = unicodedata.normalize("NFC", text).lower()
    kept = (" " if unicodedata.category(sign)[0] in "PS" else sign for sign in composed)
    return raw("".join(kept))


_basic = BasicTextNormalizer()


def whisper_basic(text: str) -> str:
    """OpenAI's multilingual normaliser, which turns Indic vowel signs into spaces and so flatters.

    For comparison with public model cards only.

    >>> whisper_basic("हिंदी")
    'ह द'
    """
    return raw(_basic(text))


def whisper_english(text: str, spelling: dict[str, str] | None = None) -> str:
    """OpenAI's normaliser for English: numbers, contractions, and `spelling` (British: American).

    The spelling table is the tokenizer's `normalizer.json`; without one, spelling stays.

    >>> whisper_english("Mr. Brown can't pay twenty dollars")
    'mister brown can not pay $20'
    """
    return raw(EnglishTextNormalizer(spelling or {})(text))


NORMALISERS: dict[str, Callable[[str], str]] = {
    "raw": raw,
    "keep_marks": keep_marks,
    "whisper_basic": whisper_basic,
    "whisper_english": whisper_english,
}

# ------ counts


@dataclass(frozen=True)
class ErrorCounts:
    """Edits that turn the references into the hypotheses, in words or characters."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    reference_length: int = 0

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors in 100 units of reference; the number of errors itself where that is empty."""
        return 100.0 * self.errors / max(self.reference_length, 1)

    def __add__(self, other: "ErrorCounts") -> "ErrorCounts":
        pairs = zip(asdict(self).values(), asdict(other).values(), strict=True)
        return ErrorCounts(*(mine + theirs for mine, theirs in pairs))


def count_errors(reference: str, hypothesis: str, unit: Unit) -> ErrorCounts:
    """Count the edits of one shortest alignment. Characters are code points, spaces included.

    >>> count_errors("a b c", "a x c d", "word")
    ErrorCounts(substitutions=1, deletions=0, insertions=1, reference_length=3)
    """
    split = str.split if unit == "word" else list
    wanted, said = split(reference), split(hypothesis)
    tags = [edit.tag for edit in Levenshtein.editops(wanted, said)]
    return ErrorCounts(
        tags.count("replace"), tags.count("delete"), tags.count("insert"), len(wanted)
    )


def count_corpus(
    references: Sequence[str],
    hypotheses: Sequence[str],
    unit: Unit,
    normalise: Callable[[str], str] = raw,
) -> ErrorCounts:
    """Sum the counts of all pairs, each text normalised once."""
    counts = ErrorCounts()
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        counts += count_errors(normalise(reference), normalise(hypothesis), unit)
    return counts


# ------ evaluate.Metric

_FEATURES = datasets.Features(
    {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
)


class ErrorRate(evaluate.Metric):
    """Word and character error rate under one normaliser, without fetching code from the Hub.

    `spelling` is the table that `whisper_english` takes.

    >>> metric = ErrorRate("keep_marks")
    >>> metric.compute(references=["Yes, sir."], predictions=["yes sir"])["wer"]
    0.0
    """

    def __init__(
        self, normaliser: str = "raw", *, spelling: dict[str, str] | None = None, **kwargs: object
    ) -> None:
        super().__init__(config_name=normaliser, keep_in_memory=True, **kwargs)
        self.spelling = spelling  # for whisper_english

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Errors in 100 words (wer) and in 100 characters (cer) of a corpus.",
            citation="",
            features=_FEATURES,
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, object]:
        normalise = NORMALISERS[self.config_name]
        if normalise is whisper_english:
            normalise = functools.partial(whisper_english, spelling=self.spelling)
        words = count_corpus(references, predictions, "word", normalise)
        characters = count_corpus(references, predictions, "char", normalise)
        return {
            "wer": words.rate,
            "cer": characters.rate,
            "words": asdict(words),
            "characters": asdict(characters),
        }


def normalisers_for(languages: Sequence[str]) -> list[str]:
    """Names of the normalisers that make sense of a corpus: the English one for English only."""
    english = bool(languages) and all(language == "en" for language in languages)
    return [name for name in NORMALISERS if name != "whisper_english" or english]
