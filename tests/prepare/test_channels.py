"""A column that names a channel: each row of a stereo file is one speaker, never their mix."""

import io
import json

import numpy as np
import pytest
import soundfile

from common.audio import AudioError
from prepare import clips, columns, sources
from prepare.clips import ClipOptions, DroppedError
from prepare.reading import read_audio

RATE = 16_000
SPEAKERS = 0.2 * np.random.default_rng(0).standard_normal((RATE, 2)).astype("f4")  # (N, channels)
OPTIONS = ClipOptions(
    model="", task="transcribe", max_seconds=30, min_seconds=0.1, max_chars_per_second=40,
    audio_bits=16,
)  # fmt: skip


def rows(folder, values, *, samples=SPEAKERS, column="channel"):
    """The rows of a manifest with a value of the column each, all of one file."""
    soundfile.write(folder / "call.wav", samples, RATE, subtype="FLOAT")
    records = [{"path": "call.wav", "text": "x", column: value} for value in values]
    path = folder / "m.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return list(sources.read(sources.find(str(path))))


def speakers(given):
    """Which speaker each row's audio is: 0, 1 or "mix"."""
    heard = [clips.read_pcm(row, OPTIONS) / 32_768 for row in given]
    return [
        next((i for i in (0, 1) if np.abs(pcm - SPEAKERS[:, i]).max() < 1e-4), "mix")
        for pcm in heard
    ]


@pytest.mark.parametrize(
    "values",
    [
        (0, 1), (1, 2), ("0", "1"), ("1.0", "2.0"), (1.0, 0.0), ([1], [0]),
        ("left", "right"), ("R", "L"), ("A", "B"), ("ch0", "ch1"), ("Channel 1", "Channel 2"),
    ],
)  # fmt: skip
def test_a_row_of_a_stereo_file_is_the_speaker_of_its_channel(tmp_path, values):
    given = rows(tmp_path, values)
    is_swapped = values in ((1.0, 0.0), ([1], [0]), ("R", "L"))
    assert speakers(given) == ([1, 0] if is_swapped else [0, 1])
    assert len({row.id for row in given}) == 2 and not any(row.problem for row in given)


@pytest.mark.parametrize("column", ["channel", "Channel", "audio_channel", "channel_id", "ch"])
def test_a_channel_has_other_names(tmp_path, column):
    assert speakers(rows(tmp_path, (0, 1), column=column)) == [0, 1]


def test_a_row_without_a_channel_is_the_whole_file(tmp_path):
    assert speakers(rows(tmp_path, (0, 1, None, ""))) == [0, 1, "mix", "mix"]


@pytest.mark.parametrize("value", [0, 1, "left", "A"])
def test_the_only_channel_of_a_mono_file_is_taken(tmp_path, value):
    (row,) = rows(tmp_path, [value], samples=SPEAKERS[:, :1])
    assert speakers([row]) == [0]


@pytest.mark.parametrize(
    ("values", "detail"),
    [
        (
            [1],
            "channel 1 is the first or the second: no other row tells which: write left or right",
        ),
        ([0, 2], "channel 2 is not in the file, which has 2 channels"),
        ([1, 3], "channel 3 is not in the file, which has 2 channels"),
        ([0, "north"], "channel is 'north': give a number, left, right, A or B"),
        ([0, [0, 1]], "channel is '[0, 1]': give a number"),
    ],
)
def test_a_channel_that_the_file_does_not_have_is_a_malformed_row(tmp_path, values, detail):
    row = rows(tmp_path, values)[-1]
    if not row.problem:
        with pytest.raises(DroppedError) as dropped:
            clips.read_pcm(row, OPTIONS)
        reason, why = dropped.value.args
    else:
        reason, why = row.problem, row.detail
    assert reason == "malformed row" and detail in why, why


def test_a_column_of_other_names_is_no_audio_channel_and_that_is_said(tmp_path, capsys):
    assert speakers(rows(tmp_path, ["BBC News", "DW"])) == ["mix", "mix"]
    assert "channel is not used: its values (such as BBC News) name no channel" in (
        capsys.readouterr().out
    )


def test_where_numbers_begin_is_decided_by_all_tables_of_a_source(tmp_path):
    for split, value in (("train", 1), ("test", 2)):
        (tmp_path / split).mkdir()
        soundfile.write(tmp_path / split / "a.wav", SPEAKERS, RATE, subtype="FLOAT")
        content = f"file_name,text,channel\na.wav,x,{value}\n"
        (tmp_path / split / "metadata.csv").write_text(content)
    given = list(sources.read(sources.find(str(tmp_path))))
    assert dict(zip((row.split for row in given), speakers(given), strict=True)) == {
        "train": 0,
        "test": 1,
    }


@pytest.mark.parametrize("suffix", ["flac", "ogg", "mp3", "m4a"])
def test_a_channel_and_a_part_of_any_container_are_read_together(suffix):
    time = np.arange(3 * RATE) / RATE
    tones = np.stack([np.sin(2 * np.pi * hertz * time) for hertz in (300, 1_100)], axis=1) * 0.3
    file = io.BytesIO()
    if suffix == "m4a":
        av = pytest.importorskip("av")
        with av.open(file, "w", format="mp4") as container:
            stream = container.add_stream("aac", rate=RATE, layout="stereo")
            samples = np.ascontiguousarray(tones.T.astype("f4"))
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
            frame.sample_rate = RATE
            resampler = av.AudioResampler("fltp", "stereo", RATE, frame_size=stream.frame_size)
            for part in [*resampler.resample(frame), *resampler.resample(None), None]:
                for packet in stream.encode(part):
                    container.mux(packet)
    else:
        soundfile.write(file, tones, RATE, format={"mp3": "MP3", "ogg": "OGG"}.get(suffix, "FLAC"))
    for channel, hertz in ((0, 300), (1, 1_100)):
        part = read_audio(file, start_seconds=1.0, end_seconds=2.0, channels=(channel,))
        spectrum = np.abs(np.fft.rfft(part))
        assert abs(len(part) - RATE) <= 1 and abs(spectrum.argmax() - hertz) <= 1
        assert spectrum[1_400 - hertz] < 0.05 * spectrum.max(), "the other speaker is heard"


def test_a_channel_that_is_not_there_is_refused():
    file = io.BytesIO()
    soundfile.write(file, SPEAKERS, RATE, format="WAV")
    with pytest.raises(AudioError, match="has 2 channels"):
        read_audio(file, channels=(2,))


@pytest.mark.parametrize("name", ["channels", "num_channels", "channel_count"])
def test_the_number_of_channels_is_no_channel(name):
    assert columns.column_name(name) not in columns.CHANNEL_COLUMNS


def test_a_malformed_first_row_hides_no_channel(tmp_path):
    soundfile.write(tmp_path / "a.wav", SPEAKERS, RATE, subtype="FLOAT")
    path = tmp_path / "m.csv"
    path.write_text("path,text,channel\na.wav\na.wav,x,0\na.wav,x,1\n")
    assert speakers(list(sources.read(sources.find(str(path))))[1:]) == [0, 1]
