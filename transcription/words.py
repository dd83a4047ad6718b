"""Tokens of a text -> its words, each with the tokens that spell it, in any script."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from common.languages import NO_SPACES

OPENING = "\"'“¿([{-¡«‘"
UNFINISHED = "\ufffd"  # a character of which not all bytes are there yet


@dataclass(frozen=True)
class Spelled:
    """A word and the positions of its tokens in the text."""

    text: str  # with the space before it, so that the words joined are the text
    start: int
    end: int


def split_words(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], language: str
) -> list[Spelled]:
    """The words of a text: joined they are the text, and their tokens follow one another.

    Signs that belong to a word, such as a full stop, are part of it.
    """
    words: list[Spelled] = []
    for piece in _characters(tokenizer, tokens):
        if words and _continues(words[-1].text, piece.text, language):
            words[-1] = _join(words[-1], piece)
        else:
            words.append(piece)
    joined: list[Spelled] = []
    for word in words:  # a dash or a sign of music between spaces is no word
        if joined and not _is_spoken(word.text):
            joined[-1] = _join(joined[-1], word)
        else:
            joined.append(word)
    return joined


def _join(word: Spelled, piece: Spelled) -> Spelled:
    return Spelled(word.text + piece.text, word.start, piece.end)


def _is_spoken(text: str) -> bool:
    return any(sign.isalnum() for sign in text)


def _continues(word: str, piece: str, language: str) -> bool:
    """Whether a piece belongs to the word before it."""
    if piece[0].isspace():
        return False
    if not _is_spoken(piece) or not _is_spoken(word):  # a full stop, a vowel sign; a bracket
        return _is_spoken(word) or all(sign.isspace() or sign in OPENING for sign in word)
    if language in NO_SPACES:  # each character is timed by itself, as in Whisper
        return piece.isascii() and word[-1].isascii()
    return True


def _characters(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[Spelled]:
    """The shortest runs of tokens that spell whole characters."""
    pieces, start = [], 0
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[start:end], skip_special_tokens=True)
        if UNFINISHED in text and end < len(tokens):
            continue
        if text:
            pieces.append(Spelled(text, start, end))
            start = end
    return pieces
