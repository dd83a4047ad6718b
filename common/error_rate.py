"""Error rates as an `evaluate.Metric`, imported where one is computed: evaluate takes a second."""

import functools
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
from transformers import PreTrainedTokenizerBase

from common.metrics import (
    BY_LETTER,
    LETTER_LANGUAGES,
    NORMALISERS,
    ClipCounts,
    count_clips,
    guess_language,
    normalisers_for,
    whisper_english,
)

_FEATURES = datasets.Features(
    {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
)


class ErrorRate(evaluate.Metric):
    """Word and character error rate under one normaliser, without fetching code from the Hub.

    `spelling` is the table that `whisper_english` takes, `languages` the code of each text: those
    of LETTER_LANGUAGES are scored by letter, which the result says under `unit`. Without
    `languages` the writing system of each pair decides (`guess_language`).

    >>> metric = ErrorRate("keep_marks")
    >>> metric.compute(references=["Yes, sir."], predictions=["yes sir"])["wer"]
    0.0
    """

    def __init__(
        self,
        normaliser: str = "raw",
        *,
        spelling: dict[str, str] | None = None,
        languages: Sequence[str] | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(config_name=normaliser, keep_in_memory=True, **kwargs)
        self.spelling = spelling  # for whisper_english
        self.languages = languages

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Errors in 100 words (wer) and in 100 characters (cer) of a corpus.",
            citation="",
            features=_FEATURES,
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        return self.count_clips(references, predictions).rates()

    def count_clips(self, references: Sequence[str], hypotheses: Sequence[str]) -> ClipCounts:
        """Errors of each pair of texts."""
        normalise = NORMALISERS[self.config_name]
        if self.config_name == "whisper_english":
            normalise = functools.partial(_with_spelling, self.spelling)
        codes = self.languages or list(map(guess_language, references, hypotheses))
        words, characters = (
            count_clips(references, hypotheses, unit, normalise, codes) for unit in ("word", "char")
        )
        return ClipCounts(self.unit(codes), words, characters)

    def unit(self, languages: Sequence[str]) -> str:
        """What an error of `wer` is one of: a word, a letter, or either by the text's language."""
        codes = set(languages)
        letters = sorted(codes.intersection(LETTER_LANGUAGES))
        if self.config_name not in BY_LETTER or not letters:
            return "word"
        return "letter" if len(letters) == len(codes) else f"word; letter in {', '.join(letters)}"


def count_by_normaliser(
    references: Sequence[str],
    hypotheses: Sequence[str],
    languages: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, ClipCounts]:
    """Errors of each pair of texts, by normaliser.

    Args:
        languages: the code of each pair.
        tokenizer: may hold the spelling table of the English normaliser.
    """
    spelling = getattr(tokenizer, "english_spelling_normalizer", None)
    return {
        name: ErrorRate(name, spelling=spelling, languages=languages).count_clips(
            references, hypotheses
        )
        for name in normalisers_for(languages)
    }


def _with_spelling(spelling: dict[str, str] | None, text: str, _language: str) -> str:
    return whisper_english(text, spelling)
