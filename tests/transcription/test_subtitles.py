"""Subtitles and the other formats, a segment at a time."""

import json

import pytest

from transcription.formats import FORMATS, cues
from transcription.segments import Segment, Word


def segment(words, *, start=0.0, spaces=True, pauses=()):
    """A segment of (seconds, text) words one after the other; a pause of 1 s before some."""
    made, now = [], start
    for index, (seconds, text) in enumerate(words):
        now += 1.0 if index in pauses else 0.0
        text = f" {text}" if spaces and index else text
        made.append(Word(round(now, 2), round(now + seconds, 2), text, 0.9))
        now += seconds
    text = "".join(word.text for word in made)
    return Segment(start, round(now, 2), text, "mr", 0.9, -0.2, 0.01, False, "", tuple(made))


LONG = segment([(0.5, "पाणी")] * 50)
LETTERS = segment([(0.1, "नमस्कार")] * 50)


@pytest.mark.parametrize(
    "own", [LONG, LETTERS, segment([(0.2, "今")] * 100, spaces=False)], ids=["long", "dense", "zh"]
)
def test_a_subtitle_has_seven_seconds_and_two_lines_at_most_and_no_word_is_lost(own):
    made = cues(own)
    assert all(end - start <= 7.0 for start, end, _ in made)
    assert all(len(line) <= 42 for *_, text in made for line in text.split("\n"))
    assert all(text.count("\n") <= 1 for *_, text in made)
    written = "".join(text for *_, text in made)
    assert written.replace("\n", "").replace(" ", "") == own.text.replace(" ", "")


def test_a_subtitle_ends_at_a_pause_and_none_is_left_with_a_word_alone():
    three = segment([(1, "एक"), (1, "दोन"), (1, "तीन")], pauses=[2])
    assert [text for *_, text in cues(three)] == ["एक दोन", "तीन"]
    counts = [len(text.split()) for *_, text in cues(segment([(0.51, "घर")] * 14))]  # 7.14 s
    assert counts == [7, 7]


def test_a_word_longer_than_a_subtitle_is_shown_for_seven_seconds():
    [(start, end, _)] = cues(segment([(9.0, "घर")]))
    assert (start, end) == (0.0, 7.0)


def written(name, segments):
    own = FORMATS[name]()
    rows = [own.add(row) for row in segments]
    parts = [own.begin({"file": "a.wav"}), *rows, own.end({"seconds": 1})]
    return "".join(parts)


def test_the_formats():
    two = [segment([(1, "एक"), (1, "<b>")]), segment([(1, "दोन")], start=3723.45)]
    assert written("txt", two) == "एक <b>\nदोन\n"
    assert written("srt", two) == (
        "1\n00:00:00,000 --> 00:00:02,000\nएक <b>\n\n2\n01:02:03,450 --> 01:02:04,450\nदोन\n\n"
    )
    assert written("vtt", two) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:02.000\nएक &lt;b&gt;\n\n"
        "01:02:03.450 --> 01:02:04.450\nदोन\n\n"
    )
    assert written("tsv", two) == "start\tend\ttext\n0\t2000\tएक <b>\n3723450\t3724450\tदोन\n"
    content = json.loads(written("json", two))
    assert content["file"] == "a.wav" and content["seconds"] == 1
    assert content["segments"][0]["words"][1] == {
        "start": 1.0, "end": 2.0, "text": " <b>", "probability": 0.9,
    }  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_a_recording_without_speech_gives_a_valid_file(name):
    content = written(name, [])
    assert content == {"vtt": "WEBVTT\n\n", "tsv": "start\tend\ttext\n"}.get(name, "") or (
        json.loads(content)["segments"] == []
    )
