"""What the columns of a table mean: path, text, speaker, language, split, start, end, channel.

Names are compared without case, spaces and punctuation: `Audio Path` and `audio_path` are both
`audiopath`.
"""

import functools
import math
import re
import unicodedata
from typing import Any

PATH_COLUMNS = ("path", "audio", "filename", "audiopath", "audiofilepath", "audiofile", "file")
TEXT_COLUMNS = ("text", "sentence", "transcript", "transcription")
SPEAKER_COLUMNS = ("speaker", "speakerid", "clientid", "spk", "spkid", "speakername")
LANGUAGE_COLUMNS = ("language", "lang", "locale", "languagecode", "langcode")
SPLIT_COLUMNS = ("split",)
# Read where they name a split; elsewhere they are of size, source or the like.
OTHER_SPLIT_COLUMNS = ("subset", "partition", "set", "dataset", "fold", "datasplit", "splitname")
# Not `channels`, which is usually their number.
CHANNEL_COLUMNS = ("channel", "channelid", "channelindex", "channelnumber", "audiochannel", "ch")

# How pandas, numpy, Python, R and spreadsheets spell a missing cell. As a text, `null` is a word:
# German for zero.
MISSING = ("nan", "NaN", "NAN", "<NA>", "NA", "N/A", "#N/A", "None", "NULL")
MISSING_ID = (*MISSING, "none", "null")

TIME = re.compile(
    r"(?:audio|segment|seg|clip|utterance|utt|speech|chunk|offset|time|ts|t"
    r"|(?P<unread_first>samples?|frames?))?"
    r"(?:(?P<start>start|begin|beg|offset|onset|xmin|tmin)|(?P<end>end|stop|xmax|tmax)"
    r"|(?P<duration>duration|dur)|(?P<from>from)|(?P<to>to)|(?P<length>length))"
    r"(?:time|timestamp|ts|offset|position|pos|at)?(?:in)?"
    r"(?:(?P<seconds>|s|secs?|seconds?)|(?P<milli>ms|msecs?|millis|milliseconds?)"
    r"|(?P<unread>samples?|frames?|us|usecs?|microseconds?|ns|nanoseconds?|ticks?|bytes?"
    r"|mins?|minutes?|hours?))"
)
# Columns of other names that differ in these alone may be the start and the end of a clip too.
OPPOSITES = (
    ("start", "end"), ("start", "stop"), ("begin", "end"), ("beg", "end"), ("from", "to"),
    ("first", "last"), ("stime", "etime"), ("t0", "t1"), ("t1", "t2"), ("time0", "time1"),
)  # fmt: skip
NO_TIME = re.compile("year|month|date|day|char|letter|line|page|token|index|idx|verse|chapter")
# A column of both times of a clip, such as `[1.5, 3.5]`.
SPAN = re.compile(r"\w*(?:times?|timestamps?|segment|interval|span|range|bounds|offsets|chunk)")
BRACKETS = re.compile(r"[\[(]\s*[\d.]+\s*[,;]\s*[\d.]+\s*[\])]")
SAME_SECONDS = 0.005  # times that differ by less are equal, but rounded differently
CHANNEL_NUMBER = re.compile(r"(?:ch(?:annel)?[ _-]?)?(\d{1,3})(?:\.0*)?")  # 0, 1.0, ch1, channel 2
CHANNEL_NAMES = {"left": 0, "l": 0, "a": 0, "right": 1, "r": 1, "b": 1}
CLOCK = re.compile(r"(?:(\d+):)?([0-5]?\d):([0-5]?\d(?:[.,]\d+)?)")  # 1:02:03.5, 02:03,5


def column_name(name: str) -> str:
    """A column's name without case, spaces and punctuation.

    >>> column_name(" Start (ms)"), column_name("audio_filepath")
    ('startms', 'audiofilepath')
    """
    return re.sub(r"[\W_]+", "", name).lower()


def cell(record: dict[str, Any], names: tuple[str, ...], missing: tuple[str, ...] = ()) -> str:
    """The first of the named cells that is neither empty nor in `missing`, as stripped text."""
    texts = (as_text(record.get(name)) for name in names)
    return next((text for text in texts if text and text not in missing), "")


def speaker(record: dict[str, Any]) -> str:
    """A row's speaker, or `""`; composed, so that both spellings of an accent are one speaker."""
    return unicodedata.normalize("NFC", cell(record, SPEAKER_COLUMNS, MISSING_ID))


def as_text(value: Any) -> str:
    """A cell as text: empty for null, NaN, lists and objects; `7` for 7.0, `true` for true."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if not math.isfinite(value):
            return ""
        return str(int(value)) if value.is_integer() else str(value)
    return str(value) if isinstance(value, int) else ""


def text(record: dict[str, Any], names: tuple[str, ...] = TEXT_COLUMNS) -> tuple[str, str]:
    """A row's transcript; and why it has none, if the cell is not simply empty."""
    for name in names:
        value = record.get(name)
        if isinstance(value, bool | list | dict):
            return "", f"{name} is not a text: {value!r}"[:100]
        transcript = as_text(value)
        if transcript in MISSING:
            return "", f"{name} is {transcript}, which stands for none"
        if transcript:
            return transcript, ""
    return "", ""


def paths(record: dict[str, Any]) -> list[str]:
    """The distinct audio paths of a row, usually one."""
    cells = (record.get(name) for name in PATH_COLUMNS)
    texts = (value.strip() for value in cells if isinstance(value, str))
    return list(dict.fromkeys(name for name in texts if name))


@functools.cache
def _time_role(name: str) -> tuple[str, float] | None:
    """The role of a column of times, and its unit in seconds; 0 for a unit that is not read."""
    match = TIME.fullmatch(name)
    if not match:
        return None
    roles = ("start", "end", "duration", "from", "to", "length")
    role = next(role for role in roles if match[role] is not None)
    is_unread = match["unread"] or match["unread_first"]
    return role, 0.0 if is_unread else 0.001 if match["milli"] else 1.0


def is_time(name: str) -> bool:
    """Whether a column holds the start or the end of a clip in its file."""
    role = _time_role(name)
    return bool(role) and role[0] in ("start", "end")


def is_known(name: str) -> bool:
    """Whether a column has a meaning for preprocess.py."""
    known = (PATH_COLUMNS, TEXT_COLUMNS, SPEAKER_COLUMNS, LANGUAGE_COLUMNS, SPLIT_COLUMNS)
    is_role = any(name in names for names in (*known, CHANNEL_COLUMNS))
    return is_role or _time_role(name) is not None


def channel(record: dict[str, Any]) -> str:
    """A row's channel as the source writes it, or `""`; a list of one is that one."""
    value = next((record[name] for name in CHANNEL_COLUMNS if name in record), None)
    if isinstance(value, list):
        value = value[0] if len(value) == 1 else str(value)
    text = as_text(value)
    return "" if text in MISSING_ID else text


def number_channels(values: set[str]) -> dict[str, tuple[int, ...]]:
    """Which channel of a file, from 0, each value of a column means; others are left out.

    Numbers start at 0 if any of the source is 0, and at 1 if there is none but there are larger
    ones than 1. A lone 1 is the first or the second: in a mono file, the first.

    >>> number_channels({"1", "2"}), number_channels({"0", "right", "BBC"}), number_channels({"1"})
    ({'1': (0,), '2': (1,)}, {'0': (0,), 'right': (1,)}, {'1': (0, 1)})
    """
    matches = {value: CHANNEL_NUMBER.fullmatch(value.lower()) for value in values}
    numbers = {value: int(match[1]) for value, match in matches.items() if match}
    names = {
        value: (CHANNEL_NAMES[value.lower()],) for value in values if value.lower() in CHANNEL_NAMES
    }
    if 0 in numbers.values():
        numbered = {value: (number,) for value, number in numbers.items()}
    elif max(numbers.values(), default=0) > 1:
        numbered = {value: (number - 1,) for value, number in numbers.items()}
    else:
        numbered = dict.fromkeys(numbers, (0, 1))
    return dict(sorted((numbered | names).items()))


def times(record: dict[str, Any]) -> tuple[float | None, float | None]:
    """Start and end of a clip in its file, in seconds; `None` for those of the file.

    A duration counts only together with a start, as in NeMo's manifests (`offset` and `duration`):
    alone it is the length of the file.

    Raises:
        ValueError: the columns contradict each other, or have units that are not read.
    """
    given: dict[str, list[tuple[str, float, Any]]] = {}
    for name, value in record.items():
        role = _time_role(name)
        if role and value is not None and value != "":
            given.setdefault(role[0], []).append((name, role[1], value))
    start, end = _agreed(given, "start"), _agreed(given, "end")
    if start is None and end is None and "from" in given and "to" in given:
        try:
            start, end = _agreed(given, "from"), _agreed(given, "to")
        except ValueError:  # of a translation, or of a letter
            return None, None
    if start is None and end is None:
        _refuse_other_times(record)
    if start is None and end is not None and not _has_start(tuple(record)):
        raise ValueError(f"{given['end'][0][0]} has no start: give start and end in seconds")
    if start is None or end is not None:
        return start, end
    if "duration" in given:
        return start, start + (_agreed(given, "duration") or 0.0)
    if "length" in given:
        raise ValueError(
            f"{given['length'][0][0]} has no unit: name it duration or end, in seconds"
        )
    return start, None


@functools.cache
def _has_start(names: tuple[str, ...]) -> bool:
    return any((_time_role(name) or ("",))[0] in ("start", "from") for name in names)


@functools.cache
def _other_times(names: tuple[str, ...]) -> tuple[list[tuple[str, str]], list[str]]:
    """Pairs of columns, and single ones, that by their names may hold times and are not read."""
    unknown = [name for name in names if not is_known(name) and not NO_TIME.search(name)]
    pairs = [
        (name, name.replace(first, last))
        for name in unknown
        for first, last in OPPOSITES
        if first in name and name.replace(first, last) in unknown
    ]
    return pairs, [name for name in unknown if SPAN.fullmatch(name)]


def _refuse_other_times(record: dict[str, Any]) -> None:
    """Raise ValueError if columns of other names hold what looks like a clip's start and end."""
    pairs, spans = _other_times(tuple(record))
    for first, last in pairs:
        if _is_span([record[first], record[last]]):
            raise ValueError(
                f"{first} and {last} look like the times of a clip: name them start and end, in "
                "seconds, or leave them out"
            )
    for name in spans:
        value = record[name]
        times = list(value.values()) if isinstance(value, dict) else value
        if isinstance(value, str) and BRACKETS.fullmatch(value.strip()):
            times = re.findall(r"[\d.]+", value)
        if isinstance(times, list) and len(times) == 2 and _is_span(times):
            raise ValueError(
                f"{name} looks like the times of a clip: give them as columns start and end, in "
                "seconds, or leave it out"
            )


def _is_span(values: list[Any]) -> bool:
    """Whether two cells are times, the second after the first."""
    try:
        first, last = (_seconds("", value) for value in values)
    except ValueError:
        return False
    return first < last


def _agreed(given: dict[str, list[tuple[str, float, Any]]], role: str) -> float | None:
    """The time that the columns of one role agree on, in seconds."""
    columns = given.get(role, ())
    values = [(name, _seconds(name, value) * unit) for name, unit, value in columns if unit]
    if columns and not values:
        raise ValueError(f"{columns[0][0]} is not read: give start and end in seconds")
    for name, seconds in values:
        if abs(seconds - values[0][1]) > SAME_SECONDS:
            raise ValueError(f"{values[0][0]} and {name} differ")
    return values[0][1] if values else None


def _seconds(name: str, value: Any) -> float:
    """A cell as seconds: a number, or hours, minutes and seconds."""
    word = as_text(value) if not isinstance(value, bool) else ""
    clock = CLOCK.fullmatch(word)
    if clock:
        hours, minutes, seconds = clock.groups(default="0")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds.replace(",", "."))
    try:
        seconds = float(word)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"bad start or end: {name} is {value!r}"[:100])
    return seconds
