"""Text normalisers, error counts and rates. No torch of its own.

Counts come first and are divided once: rates are of the whole corpus, never means of means.
"""

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import regex
from rapidfuzz.distance import Levenshtein
from transformers.models.whisper.english_normalizer import (
    BasicTextNormalizer,
    EnglishTextNormalizer,
)

Unit = Literal["word", "char"]
# Written without spaces between words: OpenAI scores them by letter, with `split_letters` of its
# normaliser (the paper's appendix on text standardisation names the first five).
LETTER_LANGUAGES = ("zh", "ja", "th", "lo", "my", "yue")
TURKIC = ("tr", "az")  # whose I and İ are the capitals of ı and i
DOTLESS = str.maketrans({"I": "ı", "İ": "i"})  # Turkish and Azeri, by Unicode's SpecialCasing.txt
# What Unicode says is not shown (Default_Ignorable_Code_Point): marks of direction, byte order
# marks, soft hyphens, variation selectors and the like cannot be heard. The two joiners stay where
# they are part of the spelling: beside a virama in Indic scripts, where they choose the form of a
# conjunct, and ZWNJ between Arabic letters, where it parts what a word is made of (Persian).
JOINERS = r"[\u200c\u200d](?=\p{ccc=9})|(?<=\p{ccc=9})[\u200c\u200d]"
PERSIAN = r"(?<=[\p{Arabic}\p{M}])\u200c(?=\p{Arabic})"
# Tatweel only stretches the line between two Arabic letters.
UNHEARD = regex.compile(rf"(?!{JOINERS}|{PERSIAN})\p{{Default_Ignorable_Code_Point}}|\u0640")

# Chinese writes Han alone; Japanese is told by any kana among it.
SCRIPTS = {
    "ja": regex.compile(r"(?=.*[\p{Hiragana}\p{Katakana}])[\p{Hiragana}\p{Katakana}\p{Han}]"),
    "zh": regex.compile(r"\p{Han}"),
    "th": regex.compile(r"\p{Thai}"),
    "lo": regex.compile(r"\p{Lao}"),
    "my": regex.compile(r"\p{Myanmar}"),
}

# ------ normalisers


def raw(text: str, language: str = "") -> str:
    """The text as it is, but for white space at its ends and repeated inside."""
    return " ".join(text.split())


def keep_marks(text: str, language: str = "") -> str:
    """NFC, lower case, punctuation and symbols to spaces; vowel signs and other marks stay.

    What is neither seen nor heard goes. Letters of LETTER_LANGUAGES are words of their own.

    >>> keep_marks("हिंदी, मराठी! Don't"), keep_marks("IŞIK", "tr"), keep_marks("今天, 好", "zh")
    ('हिंदी मराठी don t', 'ışık', '今 天 好')
    """
    composed = unicodedata.normalize("NFC", UNHEARD.sub("", text)).replace("İ", "i")
    lower = (composed.translate(DOTLESS) if language in TURKIC else composed).lower()
    kept = (" " if unicodedata.category(sign)[0] in "PS" else sign for sign in lower)
    return _split_letters(raw("".join(kept)), language)


def graphemes(text: str) -> list[str]:
    """What a reader sees as characters, without spaces: a vowel sign stays with its consonant.

    >>> graphemes("हिंदी में")
    ['हिं', 'दी', 'में']
    """
    return [cluster for cluster in regex.findall(r"\X", text) if not cluster.isspace()]


def _split_letters(text: str, language: str) -> str:
    """A space between all letters, as BasicTextNormalizer has it, in LETTER_LANGUAGES."""
    return " ".join(graphemes(text)) if language in LETTER_LANGUAGES else text


_basic, _basic_by_letter = BasicTextNormalizer(), BasicTextNormalizer(split_letters=True)


def whisper_basic(text: str, language: str = "") -> str:
    """OpenAI's multilingual normaliser, which turns Indic vowel signs into spaces and so flatters.

    For comparison with public model cards only, hence left as it is, but for the capitals of
    TURKIC: OpenAI's own makes two words of İstanbul, `i stanbul`, and i of I. `whisper_openai` is
    without this change.

    >>> whisper_basic("हिंदी"), whisper_basic("İstanbul", "tr")
    ('ह द', 'istanbul')
    """
    if language in TURKIC:
        text = unicodedata.normalize("NFC", text).translate(DOTLESS)  # İ may be I and a dot
    return whisper_openai(text, language)


def whisper_openai(text: str, language: str = "") -> str:
    """OpenAI's multilingual normaliser byte for byte; reported where `whisper_basic` differs.

    >>> whisper_openai("İstanbul", "tr")
    'i stanbul'
    """
    return raw((_basic_by_letter if language in LETTER_LANGUAGES else _basic)(text))


def whisper_english(text: str, spelling: dict[str, str] | None = None) -> str:
    """OpenAI's normaliser for English: numbers, contractions, and `spelling` (British: American).

    The spelling table is the tokenizer's `normalizer.json`; without one, spelling stays.

    >>> whisper_english("Mr. Brown can't pay twenty dollars")
    'mister brown can not pay $20'
    """
    return raw(EnglishTextNormalizer(spelling or {})(text))


NORMALISERS: dict[str, Callable[..., str]] = {
    "raw": raw,
    "keep_marks": keep_marks,
    "whisper_basic": whisper_basic,
    "whisper_openai": whisper_openai,
    "whisper_english": whisper_english,
}
BY_LETTER = ("keep_marks", "whisper_basic", "whisper_openai")  # those that know LETTER_LANGUAGES

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
    units = split(reference)
    tags = [edit.tag for edit in Levenshtein.editops(units, split(hypothesis))]
    return ErrorCounts(
        tags.count("replace"), tags.count("delete"), tags.count("insert"), len(units)
    )


def count_clips(
    references: Sequence[str],
    hypotheses: Sequence[str],
    unit: Unit,
    normalise: Callable[[str, str], str] = raw,
    languages: Sequence[str] | None = None,
) -> list[ErrorCounts]:
    """The counts of each pair, each text normalised once.

    Args:
        languages: code of each pair; in LETTER_LANGUAGES spaces are no characters.
    """
    counts = []
    codes = languages or [""] * len(references)
    for reference, hypothesis, code in zip(references, hypotheses, codes, strict=True):
        pair = normalise(reference, code), normalise(hypothesis, code)
        if unit == "char" and code in LETTER_LANGUAGES and normalise is not raw:
            pair = tuple(text.replace(" ", "") for text in pair)
        counts.append(count_errors(*pair, unit))
    return counts


@dataclass(frozen=True)
class ClipCounts:
    """Errors of each clip under one normaliser."""

    unit: str  # what an error of `words` is one of
    words: list[ErrorCounts]  # (N)
    characters: list[ErrorCounts]  # (N)

    def rates(self) -> dict[str, Any]:
        """Rates and counts of the corpus."""
        words, characters = (sum(clips, ErrorCounts()) for clips in (self.words, self.characters))
        return {
            "unit": self.unit,
            "wer": words.rate,
            "cer": characters.rate,
            "words": asdict(words),
            "characters": asdict(characters),
        }


# ------ of a corpus


def normalisers_for(languages: Sequence[str]) -> list[str]:
    """Names of the normalisers that make sense of a corpus.

    The English one for English only, and OpenAI's own where `whisper_basic` is not the same.
    """
    codes = set(languages)
    left_out = {
        "whisper_english": codes != {"en"},
        "whisper_openai": not codes.intersection(TURKIC),
    }
    return [name for name in NORMALISERS if not left_out.get(name)]


# ------ languages


def guess_language(reference: str, hypothesis: str) -> str:
    """A language whose rules a pair of texts needs, by its writing system; `""` for others.

    By the letters of the reference: half or more of a script of LETTER_LANGUAGES. By either text:
    ı, which only Turkic languages write, or İ, unless an I beside it may be English.

    >>> guess_language("今天, 好", ""), guess_language("IŞIK", "ışık"), guess_language("İ IS", "")
    ('zh', 'tr', '')
    """
    letters = [sign for sign in reference if unicodedata.category(sign)[0] in "LM"]
    for code, script in SCRIPTS.items():
        if letters and 2 * len(script.findall(reference)) >= len(letters):
            return code
    both = reference + hypothesis
    return "tr" if "ı" in both or ("İ" in both and "I" not in both) else ""
