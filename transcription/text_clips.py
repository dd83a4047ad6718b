"""Stretches of speech and a transcript without times -> clips, each with the words spoken in it.

The transcript is cut only at pauses, and only where the letters on both sides leave no doubt to
which side each word belongs. A cut in doubt is not made: its stretches form one clip. A clip that
would be too long for that, or that does not match its text, is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from rapidfuzz.distance import Levenshtein

from transcription.matching import Transcript, pair_letters

MIN_SECONDS = 2.0  # of a clip, if the next pause can be cut at
MAX_SECONDS = 29.5  # of stretches that are joined; with the pauses around them, 30 s
NEAR_WORDS = 3  # that a cut may be away from where the first and the last pair of letters put it
MIN_MARGIN = 2  # letters by which any other cut must match worse: a letter on the wrong side
OPEN_MARGIN = 5  # the same within a sentence, beside words that are in no stretch
MIN_PLACED = 0.3  # of the letters of a stretch that are paired with the transcript
# Letters in a row that only one side of a clip has. With the texts of an adapter of 67 % WER, and
# some words in a row put into a transcript or removed, 5 let 42 of 113 clips pass with two such
# words, 12 of 109 with three and 0 of 95 with five, and kept 598 of 619 others; 12 let 98, 62 and 3
# pass and kept 606.
MAX_GAP = 5
MAX_GAP_UNSPACED = 2  # in languages without spaces, whose letters are syllables or words
SHARED_LETTERS = 12  # of the transcript between two stretches, that may belong to either
NO_TEXT, NO_MATCH, NO_CUT = "not recognized", "not in the text", "no certain cut"
POOR_MATCH = "poor match"


@dataclass(frozen=True)
class Speech:
    """A stretch of speech, and the letters that were recognized in it."""

    start: float  # seconds
    end: float
    letters: str  # none if its text was dropped


@dataclass(frozen=True)
class Clip:
    """Stretches in a row and the words of the transcript that were spoken in them."""

    first: int  # stretch
    end: int  # the stretch after the last
    first_word: int
    end_word: int
    match: float  # 1 - edit distance / length of the longer side, in letters


@dataclass
class Cut:
    """The clips of a recording, and the stretches that are in none, by reason."""

    clips: list[Clip] = field(default_factory=list)
    left_out: dict[str, list[int]] = field(default_factory=dict)

    def leave_out(self, reason: str, stretches: Sequence[int]) -> None:
        if stretches:
            self.left_out.setdefault(reason, []).extend(stretches)


@dataclass(frozen=True)
class Edge:
    """Where the words of a stretch begin or end in the transcript."""

    word: int  # the first after it
    is_certain: bool


@dataclass
class Place:
    """The words that a stretch has letters of; its edges, one of which may be its neighbor's."""

    first: int
    end: int
    left: Edge | None = None
    right: Edge | None = None


def cut_clips(speech: Sequence[Speech], transcript: Transcript, *, min_match: float) -> Cut:
    """Cut a recording into clips.

    Args:
        speech: all stretches of a recording, in order.
        transcript: of all or some of them, and maybe of more than was spoken, in the same order.
        min_match: clips that match worse are left out.
    """
    pairs = pair_letters("".join(own.letters for own in speech), transcript.letters())
    limits = np.cumsum([0, *(len(own.letters) for own in speech)])
    word_limits = np.cumsum([0, *map(len, transcript.words)])
    places = _place(limits, word_limits, pairs)
    _find_edges(speech, transcript, places)
    cut = Cut()
    for index, (own, place) in enumerate(zip(speech, places, strict=True)):
        if place is None:
            cut.leave_out(NO_MATCH if own.letters else NO_TEXT, [index])
    start = 0
    while start < len(speech):
        place = places[start]
        end = _end_of_clip(speech, places, start) if place else None
        if end is None:
            cut.leave_out(NO_CUT, [start] if place else [])
            start += 1
            continue
        clip = _clip(speech, transcript, places, start, end)
        gap = _longest_gap(limits, word_limits, pairs, clip)
        if clip.match < min_match or gap > _max_gap(transcript):
            cut.leave_out(POOR_MATCH, range(start, end))
        else:
            cut.clips.append(clip)
        start = end
    return cut


def _place(limits: np.ndarray, word_limits: np.ndarray, pairs: np.ndarray) -> list[Place | None]:
    """Where each stretch is in the transcript, if enough of its letters are.

    Args:
        limits: (S + 1) letters of the speech before each stretch, and of all.
        word_limits: (W + 1) letters of the transcript before each word, and of all.
        pairs: (P, 2) of letters.
    """
    places: list[Place | None] = []
    rows = np.searchsorted(pairs[:, 0], limits)
    for low, high, number in zip(rows[:-1], rows[1:], np.diff(limits), strict=True):
        if high - low <= MIN_PLACED * number:
            places.append(None)
            continue
        ends = np.searchsorted(word_limits, pairs[[low, high - 1], 1], side="right")
        places.append(Place(int(ends[0]) - 1, int(ends[1])))
    return places


def _max_gap(transcript: Transcript) -> int:
    return MAX_GAP if transcript.joined else MAX_GAP_UNSPACED


# ------ edges


def _find_edges(
    speech: Sequence[Speech], transcript: Transcript, places: Sequence[Place | None]
) -> None:
    """Set the edges of every stretch that has a place.

    Two stretches in a row share an edge, unless the transcript has more than SHARED_LETTERS
    between them that neither has.
    """
    following = [*places, None][1:]
    for index, (own, after) in enumerate(zip(places, following, strict=True)):
        if own is None:
            continue
        if own.left is None:
            own.left = _open_edge(speech[index], transcript, own, is_left=True)
        if after and len(transcript.letters(own.end, after.first)) <= SHARED_LETTERS:
            own.right = after.left = _shared_edge(speech[index : index + 2], transcript, own, after)
        else:
            own.right = _open_edge(speech[index], transcript, own, is_left=False)


def _shared_edge(
    speech: Sequence[Speech], transcript: Transcript, own: Place, after: Place
) -> Edge:
    """The edge between two stretches in a row: any word near it is either's."""
    low = max(own.first + 1, min(own.end, after.first) - NEAR_WORDS)
    high = min(after.end - 1, max(own.end, after.first) + NEAR_WORDS)
    words = range(low, max(low, high) + 1)
    costs = [
        _distance(speech[0], transcript, own.first, word)
        + _distance(speech[1], transcript, word, after.end)
        for word in words
    ]
    word, margin = _cheapest(words, costs)
    return Edge(word, margin >= MIN_MARGIN)


def _open_edge(speech: Speech, transcript: Transcript, own: Place, *, is_left: bool) -> Edge:
    """An edge beside words that are in no stretch, or beside speech that is not in the transcript.

    Leaving out a word that was spoken there but not recognized would cost nothing. So the edge has
    to be that of a sentence or a line, or the next word too long to be missed.
    """
    if is_left:
        words = range(max(0, own.first - NEAR_WORDS), min(own.end, own.first + NEAR_WORDS + 1))
        costs = [_distance(speech, transcript, word, own.end) for word in words]
    else:
        last = min(len(transcript.words), own.end + NEAR_WORDS)
        words = range(max(own.first + 1, own.end - NEAR_WORDS), last + 1)
        costs = [_distance(speech, transcript, own.first, word) for word in words]
    word, margin = _cheapest(words, costs)
    needed = 1 if transcript.ends_sentence(word) else OPEN_MARGIN
    return Edge(word, margin >= needed)


def _distance(speech: Speech, transcript: Transcript, first: int, end: int) -> int:
    return Levenshtein.distance(speech.letters, transcript.letters(first, end))


def _cheapest(words: Sequence[int], costs: Sequence[int]) -> tuple[int, float]:
    """The word of the least cost, and by how much all others cost more."""
    best = int(np.argmin(costs))
    others = [cost for index, cost in enumerate(costs) if index != best]
    return words[best], min(others, default=np.inf) - costs[best]


# ------ clips


def _end_of_clip(
    speech: Sequence[Speech], places: Sequence[Place | None], start: int
) -> int | None:
    """The stretch after a clip that begins with `start`; None if it has no certain edges."""
    if not places[start].left.is_certain:
        return None
    end = None
    for index in range(start, len(speech)):
        place, seconds = places[index], speech[index].end - speech[start].start
        continues = index == start or (place and place.left is places[index - 1].right)
        if not continues or (index > start and seconds > MAX_SECONDS):
            break
        if place.right.is_certain:
            end = index + 1
            if seconds >= MIN_SECONDS:
                break
    return end


def _clip(
    speech: Sequence[Speech],
    transcript: Transcript,
    places: Sequence[Place | None],
    start: int,
    end: int,
) -> Clip:
    first_word, end_word = places[start].left.word, places[end - 1].right.word
    recognized = "".join(own.letters for own in speech[start:end])
    text = transcript.letters(first_word, end_word)
    match = Levenshtein.normalized_similarity(recognized, text)
    return Clip(start, end, first_word, end_word, match)


def _longest_gap(limits: np.ndarray, word_limits: np.ndarray, pairs: np.ndarray, clip: Clip) -> int:
    """The most letters by which one side of a clip is longer than the other between two pairs."""
    before = [limits[clip.first], word_limits[clip.first_word]]
    after = [limits[clip.end], word_limits[clip.end_word]]
    is_inside = ((pairs >= before) & (pairs < after)).all(axis=1)
    rows = np.array([np.subtract(before, 1), *pairs[is_inside], after])
    return int(np.abs(np.diff(np.diff(rows, axis=0), axis=1)).max())
