"""Transcripts as txt, srt, vtt, tsv and json."""

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from transcription.segments import Segment, Word

CUE_SECONDS = 7.0  # a subtitle is shown at most so long
LINE_LETTERS = 42  # of a line; a subtitle has two
PAUSE_SECONDS = 0.5  # between words; a longer one ends a subtitle


# ------ subtitles


def cues(segment: Segment) -> list[tuple[float, float, str]]:
    """Start, end and text of subtitles: at most 7 seconds and two lines each, without pauses."""
    if not segment.words:
        return [(segment.start, segment.end, "\n".join(wrap(segment.text)))]
    return [_cue(words) for words in _divide(segment.words)]


def _divide(words: Sequence[Word]) -> list[Sequence[Word]]:
    """Words that are shown together: divided at a pause near the middle while they do not fit.

    A word or two alone at the end would be on the screen too shortly to be read.
    """
    if len(words) == 1 or _fits(words):
        return [words]
    gaps = [after.start - before.end for before, after in pairwise(words)]
    middle = (words[0].start + words[-1].end) / 2
    half = max(words[-1].end - words[0].start, 1e-3) / 2
    distances = [abs(word.end - middle) / half for word in words[:-1]]
    worth = [min(gap, 1.0) - distance for gap, distance in zip(gaps, distances, strict=True)]
    longest = max(range(len(gaps)), key=gaps.__getitem__)
    cut = longest if gaps[longest] > PAUSE_SECONDS else max(range(len(gaps)), key=worth.__getitem__)
    return [*_divide(words[: cut + 1]), *_divide(words[cut + 1 :])]


def _fits(words: Sequence[Word]) -> bool:
    return (
        words[-1].end - words[0].start <= CUE_SECONDS
        and all(after.start - before.end <= PAUSE_SECONDS for before, after in pairwise(words))
        and len(wrap(_text(words))) <= 2
    )


def _text(words: Sequence[Word]) -> str:
    return "".join(word.text for word in words).strip()


def _cue(words: Sequence[Word]) -> tuple[float, float, str]:
    end = min(words[-1].end, words[0].start + CUE_SECONDS)
    return words[0].start, end, "\n".join(wrap(_text(words)))


def wrap(text: str) -> list[str]:
    """The lines of a text, two of them of similar length where one is too short for it.

    Lines are broken at spaces, or anywhere in a script without spaces.

    >>> wrap("word " * 10)
    ['word word word word word', 'word word word word word']
    """
    lines = _fill(text, LINE_LETTERS)
    if len(lines) != 2:
        return lines
    widths = range(len(text) // 2, LINE_LETTERS + 1)
    return next((even for width in widths if len(even := _fill(text, width)) == 2), lines)


def _fill(text: str, width: int) -> list[str]:
    """Lines of at most `width` letters, each as full as can be."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if len(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
        while len(lines[-1]) > width:
            lines[-1:] = [lines[-1][:width], lines[-1][width:]]
    return [line for line in lines if line]


def timestamp(seconds: float, point: str) -> str:
    """`01:02:03,450` of 3723.45 seconds.

    >>> timestamp(3723.45, ",")
    '01:02:03,450'
    """
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{point}{rest % 1000:03}"


# ------ formats, written a segment at a time


class Format:
    """A file that grows by a segment at a time: a recording of hours is never held as a whole."""

    def begin(self, header: dict[str, Any]) -> str:
        """What stands before the first segment."""
        return ""

    def add(self, segment: Segment) -> str:
        raise NotImplementedError

    def end(self, footer: dict[str, Any]) -> str:
        """What stands after the last segment."""
        return ""


class Txt(Format):
    """The text of each segment in a line."""

    def add(self, segment: Segment) -> str:
        return f"{segment.text}\n"


class Srt(Format):
    """SubRip."""

    number = 0

    def add(self, segment: Segment) -> str:
        blocks = []
        for start, end, text in cues(segment):
            self.number += 1
            times = f"{timestamp(start, ',')} --> {timestamp(end, ',')}"
            blocks.append(f"{self.number}\n{times}\n{text}\n\n")
        return "".join(blocks)


class Vtt(Format):
    """WebVTT."""

    def begin(self, header: dict[str, Any]) -> str:
        return "WEBVTT\n\n"

    def add(self, segment: Segment) -> str:
        return "".join(
            f"{timestamp(start, '.')} --> {timestamp(end, '.')}\n{_escape(text)}\n\n"
            for start, end, text in cues(segment)
        )


def _escape(text: str) -> str:
    """WebVTT reads these signs as markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


class Tsv(Format):
    """Start and end in milliseconds and text, a segment a line, as openai/whisper writes them."""

    def begin(self, header: dict[str, Any]) -> str:
        return "start\tend\ttext\n"

    def add(self, segment: Segment) -> str:
        times = (round(seconds * 1000) for seconds in (segment.start, segment.end))
        return "\t".join([*map(str, times), segment.text]) + "\n"


class Json(Format):
    """Everything: segments with words and probabilities, a line each, and how they were made."""

    separator = "\n"

    def begin(self, header: dict[str, Any]) -> str:
        rows = [f"{_quote(key)}: {_quote(own)},\n" for key, own in header.items()]
        return "{\n" + "".join(rows) + '"segments": ['

    def add(self, segment: Segment) -> str:
        row = segment.as_dict()
        del row["dropped"]
        line, self.separator = self.separator + _quote(row), ",\n"
        return line

    def end(self, footer: dict[str, Any]) -> str:
        rows = ",\n".join(f"{_quote(key)}: {_quote(own)}" for key, own in footer.items())
        return f"\n],\n{rows}\n}}\n"


def _quote(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


FORMATS: dict[str, type[Format]] = {"txt": Txt, "srt": Srt, "vtt": Vtt, "tsv": Tsv, "json": Json}
