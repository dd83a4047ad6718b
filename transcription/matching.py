"""A transcript and what was recognized, letter by letter, where either may lack whole paragraphs.

Letters are what is left of a text under `keep_marks` without spaces, so that words may be divided
differently, and languages without spaces are no special case. A path through both texts earns or
pays for each letter. It pays once for leaving out any number of letters of both: where nothing
matches, that is cheaper than pairs of letters that are equal by chance.
"""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import regex

from common.languages import NO_SPACES
from common.metrics import keep_marks

# A path pays off up to a character error rate of 4 / 7. Unrelated sentences of a language agree in
# a third of their letters at best, so they cost about 1 for each letter.
MATCH, ERROR = 4, -3
SKIP = -40  # as many as ten equal letters earn
MAX_CELLS = 2**24  # of letters by letters that are aligned at once; a byte is held for each
ANCHOR_LETTERS = (12, 8)  # of a run that is once in both texts and divides larger ones

HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, of bits without a pattern: 2**64 / golden ratio
# How the best path to a cell came: both letters paired, one text's letter alone, or out of letters
# that are left out. And in the same byte, how the best path that is leaving letters out came.
DIAGONAL, DOWN, RIGHT, LEAVE = 0, 1, 2, 3
SKIP_DOWN, SKIP_RIGHT = 4, 8
LOW = -(2**30)

OPENING = regex.compile(r"[\p{Ps}\p{Pi}\"'¿¡-]+")  # a sign that stands before a word
SENTENCE_END = regex.compile(r"[\n\p{Sentence_Terminal}:;…](?=[^\p{L}\p{N}]*$)")


# ------ transcripts


@dataclass(frozen=True)
class Transcript:
    """A text and its words; those of languages without spaces are single letters."""

    text: str
    spans: list[tuple[int, int]]  # (W) of each word in the text, with the signs around it
    words: list[str]  # (W) letters of each word, never none
    joined: str  # between words in a clip: a space or nothing

    def part(self, first: int, end: int) -> str:
        """The text of words as it was written, in one line."""
        own = self.text[self.spans[first][0] : self.spans[end - 1][1]]
        lines = (" ".join(line.split()) for line in own.splitlines())
        return self.joined.join(line for line in lines if line)

    def letters(self, first: int = 0, end: int | None = None) -> str:
        return "".join(self.words[first:end])

    def ends_sentence(self, word: int) -> bool:
        """Whether a sentence or a line ends before a word, by the signs between."""
        if word in (0, len(self.words)):
            return True
        before = self.text[self.spans[word - 1][0] : self.spans[word][0]]
        return bool(SENTENCE_END.search(before))


def letters(text: str, language: str) -> str:
    """What is compared of a text.

    >>> letters("हिंदी, 5 दिन!", "hi")
    'हिंदी5दिन'
    """
    return keep_marks(text, language).replace(" ", "")


def read_words(text: str, language: str) -> Transcript:
    """Divide a text into words; a sign that stands alone belongs to the word before it.

    An opening bracket belongs to the word after it, and so does a sign that begins a line.

    >>> words = read_words("(a) – b\\n— c", "en")
    >>> [words.part(index, index + 1) for index in range(3)]
    ['(a) –', 'b', '— c']
    """
    has_spaces = language not in NO_SPACES
    pattern = regex.compile(r"\S+" if has_spaces else r"[0-9A-Za-z]+|\X")
    spans: list[tuple[int, int]] = []
    words: list[str] = []
    start = None  # of signs that belong to the next word
    for match in pattern.finditer(text):
        if match[0].isspace():
            continue
        own = letters(match[0], language)
        if own:
            spans.append((match.start() if start is None else start, match.end()))
            words.append(own)
            start = None
        elif not words or start is not None or _opens(text, match):
            start = match.start() if start is None else start
        else:
            spans[-1] = (spans[-1][0], match.end())
    if spans and start is not None:
        spans[-1] = (spans[-1][0], len(text.rstrip()))
    return Transcript(text, spans, words, " " if has_spaces else "")


def _opens(text: str, match: regex.Match) -> bool:
    before = text[: match.start()].rstrip(" \t")
    return before.endswith("\n") or bool(OPENING.fullmatch(match[0]))


# ------ pairs of letters


def pair_letters(hypothesis: str, reference: str) -> np.ndarray:
    """Equal letters on the best path through two texts.

    Args:
        hypothesis, reference: letters, without spaces.

    Returns:
        (P, 2) positions in each, both ascending.

    >>> pair_letters("heardandmore", "herdand").T.tolist()
    [[0, 1, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6]]
    """
    codes = (np.array(list(map(ord, own)), np.int64) for own in (hypothesis, reference))
    pairs = list(_pair(*codes))
    return np.array(pairs, np.int64).reshape(-1, 2)


def _pair(hypothesis: np.ndarray, reference: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs of two texts (H), (R), divided at anchors where they are long.

    Long texts without any anchor have nothing in common.
    """
    if len(hypothesis) * len(reference) <= MAX_CELLS:
        yield from _best_path(hypothesis, reference)
        return
    tries = (_anchors(hypothesis, reference, number) for number in ANCHOR_LETTERS)
    anchors = next((own for own in tries if own), None)
    row = column = 0
    for anchor in [*anchors, (len(hypothesis), len(reference))] if anchors else ():
        between = _pair(hypothesis[row : anchor[0]], reference[column : anchor[1]])
        yield from ((row + first, column + second) for first, second in between)
        if anchor[0] < len(hypothesis):
            yield anchor
        row, column = anchor[0] + 1, anchor[1] + 1


def _anchors(hypothesis: np.ndarray, reference: np.ndarray, number: int) -> list[tuple[int, int]]:
    """Pairs of letters in runs of `number` that either text has once, the most in one order."""
    (rows, columns) = (_unique_runs(own, number) for own in (hypothesis, reference))
    _, first, second = np.intersect1d(rows[0], columns[0], assume_unique=True, return_indices=True)
    starts = sorted(zip(rows[1][first].tolist(), columns[1][second].tolist(), strict=True))
    pairs: list[tuple[int, int]] = []
    for row, column in _longest_rising(starts):
        for step in range(number):
            if not pairs or (row + step > pairs[-1][0] and column + step > pairs[-1][1]):
                pairs.append((row + step, column + step))
    return pairs


def _unique_runs(codes: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the runs of `number` letters that occur once, and where they begin."""
    if len(codes) < number:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    hashes = np.zeros(len(codes) - number + 1, np.uint64)
    for step in range(number):
        hashes = hashes * HASH_FACTOR + codes[step : len(hashes) + step].astype(np.uint64)
    runs, starts, counts = np.unique(hashes, return_index=True, return_counts=True)
    return runs[counts == 1], starts[counts == 1]


def _longest_rising(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Most of some pairs that rise in both; they are sorted and differ in the first.

    >>> _longest_rising([(0, 5), (1, 1), (2, 2), (3, 0), (4, 3)])
    [(1, 1), (2, 2), (4, 3)]
    """
    lasts: list[int] = []  # smallest end of a rising row of each length
    ends: list[int] = []  # index of the pair that it is of
    before: list[int] = []  # index of the pair before each
    for index, (_, column) in enumerate(pairs):
        length = bisect.bisect_left(lasts, column)
        lasts[length : length + 1] = [column]
        ends[length : length + 1] = [index]
        before.append(ends[length - 1] if length else -1)
    rising, index = [], ends[-1] if ends else -1
    while index >= 0:
        rising.append(pairs[index])
        index = before[index]
    return rising[::-1]


def _best_path(hypothesis: np.ndarray, reference: np.ndarray) -> list[tuple[int, int]]:
    """Equal letters on the path that earns most, a diagonal of cells (i + j constant) at a time.

    A cell (i, j) stands after i and j letters. Its value is that of the best path whose letters are
    paired there, and a second one that of the best path which is leaving letters out.
    """
    rows, columns = len(hypothesis), len(reference)
    if not rows or not columns:
        return []
    first = np.concatenate([[-1], hypothesis])  # (rows + 1,)
    second = np.concatenate([[-2], reference])[::-1]
    # One place more on either side of the rows, which stays LOW.
    before, last, skip = (np.full(rows + 3, LOW, np.int32) for _ in range(3))
    moves: list[tuple[int, np.ndarray]] = []  # of each diagonal: its first row, moves of its cells
    for diagonal in range(rows + columns + 1):
        low, high = max(0, diagonal - columns), min(rows, diagonal) + 1
        own, above = slice(low + 1, high + 1), slice(low, high)
        shift = columns - diagonal
        is_equal = first[low:high] == second[shift + low : shift + high]
        value = before[above] + np.where(is_equal, MATCH, ERROR)
        down, right = last[above] + ERROR, last[own] + ERROR
        move = np.where(right > down, RIGHT, DOWN)
        one_sided = np.maximum(down, right)
        move[value >= one_sided] = DIAGONAL
        value = np.maximum(value, one_sided) if diagonal else np.zeros(1, np.int32)
        longer = np.maximum(skip[above], skip[own])
        is_longer = longer > value + SKIP
        move[is_longer] |= np.where(skip[own] > skip[above], SKIP_RIGHT, SKIP_DOWN)[is_longer]
        left_out = np.maximum(longer, value + SKIP)
        move[left_out > value] |= LEAVE
        before[own] = np.maximum(value, left_out)
        skip[own] = left_out
        for values in (before, skip):
            values[[low, high + 1]] = LOW
        before, last = last, before
        moves.append((low, move.astype(np.uint8)))
    return _equal_letters(moves, hypothesis, reference)


def _equal_letters(
    moves: list[tuple[int, np.ndarray]], hypothesis: np.ndarray, reference: np.ndarray
) -> list[tuple[int, int]]:
    """Follow the moves back from the end of both texts."""
    pairs, is_leaving = [], False
    row, column = len(hypothesis), len(reference)
    while row or column:
        low, own = moves[row + column]
        move = int(own[row - low])
        if not is_leaving and move & LEAVE == LEAVE:
            is_leaving = True
        if is_leaving:
            is_leaving = move >= SKIP_DOWN
            row -= move & SKIP_DOWN == SKIP_DOWN
            column -= move & SKIP_RIGHT == SKIP_RIGHT
            continue
        step = move & LEAVE
        row -= step != RIGHT
        column -= step != DOWN
        if step == DIAGONAL and hypothesis[row] == reference[column]:
            pairs.append((row, column))
    return pairs[::-1]
