"""Files that go on behind the audio their header announces: all of it is read, or it is refused."""

import functools
import io
import struct

import numpy as np
import pytest
import soundfile

from common.audio import SAMPLE_RATE, AudioError
from prepare import containers, streams
from prepare.containers import end_of_page
from prepare.reading import read_audio

RATE = 16_000


def noise(seconds, seed=0, loud=0.2):
    return (loud * np.random.default_rng(seed).standard_normal(int(seconds * RATE))).astype("f4")


def encoded(samples, rate=RATE, **options):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **options)
    return file.getvalue()


def ffmpeg_seconds(data):
    """The length that FFmpeg decodes, by way of PyAV."""
    av = pytest.importorskip("av")
    with av.open(io.BytesIO(data)) as container:
        return sum(frame.samples / frame.sample_rate for frame in container.decode(audio=0))


def variable_mp3(samples):
    """An mp3 of variable bitrate without a header that tells its length, made by FFmpeg."""
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp3", options={"write_xing": "0"}) as container:
        stream = container.add_stream("libmp3lame", rate=RATE, layout="mono")
        stream.options = {"flags": "+qscale", "global_quality": "472"}
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate = RATE
        resampler = av.AudioResampler(stream.format, "mono", RATE, frame_size=576)
        for part in [*resampler.resample(frame), *resampler.resample(None), None]:
            for packet in stream.encode(part):
                container.mux(packet)
    return file.getvalue()


PCM = struct.pack("<32000h", *(noise(2) * 32_000).clip(-32_768, 32_767).astype(int))
CHUNK = b"LIST" + struct.pack("<I", 4) + b"INFO"


def wav(size, *, riff=None, audio=PCM, behind=b""):
    """A wav whose header says that it has `size` bytes of audio."""
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16)
    riff = 36 + size if riff is None else riff
    head = struct.pack("<4sI4s", b"RIFF", riff % 2**32, b"WAVE")
    return head + form + struct.pack("<4sI", b"data", size % 2**32) + audio + behind


def data_chunk(audio):
    return struct.pack("<4sI", b"data", len(audio)) + audio


def flac_that_says(frames, seed=0):
    data = encoded(noise(2, seed), format="FLAC")
    fields = int.from_bytes(data[18:26], "big") >> 36 << 36 | frames
    return data[:18] + fields.to_bytes(8, "big") + data[26:]


def au_that_says(size):
    data = encoded(noise(2), format="AU", subtype="PCM_16")
    return data[:8] + struct.pack(">I", size) + data[12:]


def xing_that_says(frames):
    data = encoded(noise(2), format="MP3", bitrate_mode="VARIABLE")
    start = data.index(b"Xing") + 8
    return data[:start] + struct.pack(">I", frames) + data[start + 4 :]


MP3 = [encoded(noise(2, seed), format="MP3", bitrate_mode="VARIABLE") for seed in (1, 2)]
STEREO_MP3 = encoded(np.stack([noise(3, 3)] * 2, axis=1), 24_000, format="MP3")  # 2 s
VORBIS = [encoded(noise(2, seed), format="OGG", subtype="VORBIS") for seed in (1, 2)]
SHORT_VORBIS = encoded(noise(0.3, 3), format="OGG", subtype="VORBIS")
OPUS = [encoded(noise(2, seed), format="OGG", subtype="OPUS") for seed in (1, 2)]
FLAC = [encoded(noise(2, seed), format="FLAC") for seed in (1, 2)]
TAG = b"TAG" + bytes(125)  # ID3v1

LONGER = {
    "joined mp3": (MP3[0] + MP3[1], 4),
    "joined mp3 of other rates and channels": (MP3[0] + STEREO_MP3 + MP3[1], 6),
    "joined mp3 with tags": (MP3[0] + TAG + MP3[1] + TAG, 4),
    "mp3 whose header names too few frames": (xing_that_says(10), 2),
    "mp3 whose header names no frames": (xing_that_says(0), 2),
    "joined mp3, the first cut off": (MP3[0][: len(MP3[0]) // 2] + MP3[1], 2.9),
    "mp3 with other bytes behind": (MP3[0] + b"no sound " * 1_000, 2),
    "mp3 with zeros behind": (MP3[0] + bytes(5_000), 2),
    "chained vorbis": (VORBIS[0] + VORBIS[1], 4),
    "chained vorbis, the last short": (VORBIS[0] + SHORT_VORBIS, 2.3),
    "chained opus": (OPUS[0] + OPUS[1] + OPUS[0], 6),
    "joined flac": (FLAC[0] + FLAC[1], 4),
    "streamed flac": (flac_that_says(0), 2),
    "flac that names too few samples": (flac_that_says(8_000), 2),
    "flac that names too many": (flac_that_says(64_000), 2),
    "wav of size 0": (wav(0, riff=0), 2),
    "wav of size 0 with the right riff size": (wav(0, riff=36 + len(PCM)), 2),
    "wav that was not closed": (wav(0), 2),
    "streamed wav": (wav(-1, riff=-1), 2),
    "wav of size 0x7FFFFFFF": (wav(0x7FFFFFFF, riff=0x7FFFFFFF), 2),
    "wav of too large a size": (wav(3 * len(PCM)), 2),
    "wav of too small a size": (wav(len(PCM) // 4), 2),
    "wav with two data chunks": (wav(len(PCM), behind=data_chunk(PCM[:32_000])), 3),
    "wav with another chunk between": (wav(len(PCM), behind=CHUNK + data_chunk(PCM)), 4),
    "wav of size 0, then a data chunk": (wav(0, audio=b"", behind=data_chunk(PCM)), 2),
    "wav of size 0, then two data chunks": (
        wav(0, audio=b"", behind=data_chunk(PCM) + data_chunk(PCM)),
        4,
    ),
    "joined wav": (wav(len(PCM), behind=wav(len(PCM))), 4),
    "joined streamed wav": (wav(0, behind=wav(len(PCM))), 4),
    "au of size 0": (au_that_says(0), 2),
    "au of too small a size": (au_that_says(16_000), 2),
}


@pytest.mark.parametrize("name", LONGER)
def test_a_file_is_read_to_the_end_of_its_bytes_whatever_its_header_says(tmp_path, name):
    data, seconds = LONGER[name]
    (tmp_path / "a").write_bytes(data)
    for source in (tmp_path / "a", io.BytesIO(data)):
        for limit in (None, 30.0):
            decoded = len(read_audio(source, max_seconds=limit)) / SAMPLE_RATE
            # Without a header that says so, an mp3 encoder's delay and padding are not cut.
            assert abs(decoded - seconds) < 0.13, f"{decoded} s of {seconds} s"


@pytest.mark.parametrize("name", ["joined mp3", "chained vorbis", "chained opus", "joined flac"])
def test_what_is_joined_has_the_length_that_ffmpeg_decodes(name):
    data, seconds = LONGER[name]
    decoded, expected = len(read_audio(io.BytesIO(data))) / SAMPLE_RATE, ffmpeg_seconds(data)
    # FFmpeg leaves the padding of a second mp3 in, and half a block of a second vorbis stream.
    assert -1e-6 < expected - decoded < 0.15 and abs(decoded - seconds) < 0.01, (decoded, expected)


@pytest.mark.parametrize("is_loud_first", [True, False])
def test_an_mp3_of_variable_bitrate_without_a_length_is_read_as_ffmpeg_reads_it(is_loud_first):
    av = pytest.importorskip("av")
    parts = [noise(3), np.zeros(6 * RATE, np.float32)]
    data = variable_mp3(np.concatenate(parts if is_loud_first else parts[::-1]))
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        assert abs(file.frames / RATE - 9) > 3, "libsndfile's estimate is right: nothing is tested"
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
    decoded, expected = read_audio(io.BytesIO(data), max_seconds=30.0), np.concatenate(frames)
    assert len(decoded) == len(expected) > 9 * RATE
    assert np.abs(decoded - expected).max() < 1e-4


@pytest.mark.parametrize("name", [name for name in LONGER if "mp3" in name or "wav" in name])
def test_a_part_of_such_a_file_is_read_at_its_place(name):
    data, seconds = LONGER[name]
    whole = read_audio(io.BytesIO(data))
    start, end = seconds - 1.2, seconds - 0.3
    part = read_audio(io.BytesIO(data), start_seconds=start, end_seconds=end, max_seconds=30.0)
    assert len(part) == round(0.9 * SAMPLE_RATE)
    expected = whole[round(start * SAMPLE_RATE) :][: len(part)]
    error = np.abs(part - expected)[800:-800].max()  # the edges are the resampler's
    assert error < 1e-3, error
    assert not len(read_audio(io.BytesIO(data), start_seconds=seconds + 1, end_seconds=seconds + 2))


def test_the_joined_streams_follow_each_other_without_a_gap():
    decoded = read_audio(io.BytesIO(FLAC[0] + FLAC[1]))
    assert np.abs(decoded - np.concatenate([noise(2, 1), noise(2, 2)])).max() < 1e-4


ORDINARY = {
    "wav": wav(len(PCM)),
    "wav with a chunk behind": wav(len(PCM), behind=CHUNK),
    "wav with an odd chunk behind": wav(len(PCM), behind=b"id3 \x03\0\0\0abc\0"),
    "wav with a tag behind": wav(len(PCM), behind=TAG),
    "wav with padding behind": wav(len(PCM), behind=bytes(1000)),
    "wav with a chunk cut off": wav(len(PCM), behind=b"LIST\xff\0\0\0INFO"),
    "empty wav": wav(0, audio=b""),
    "empty wav with a chunk behind": wav(0, audio=b"", behind=CHUNK),
    "mp3": MP3[0],
    "mp3 with a tag behind": MP3[0] + TAG,
    "vorbis": VORBIS[0],
    "opus": OPUS[0],
    "flac": FLAC[0],
}


@pytest.mark.parametrize("name", ORDINARY)
def test_an_ordinary_file_is_decoded_once_and_no_tag_is_taken_for_sound(
    tmp_path, monkeypatch, name
):
    data = ORDINARY[name]
    (tmp_path / "a").write_bytes(data)
    expected = len(soundfile.read(io.BytesIO(data))[0])
    opened, open_once = [], soundfile.SoundFile
    monkeypatch.setattr(
        soundfile,
        "SoundFile",
        lambda *words, **options: opened.append(1) or open_once(*words, **options),
    )
    assert len(read_audio(tmp_path / "a", max_seconds=30.0)) == expected
    assert len(opened) == 1


def test_a_container_that_cannot_be_repaired_is_refused_with_the_remedy():
    data = encoded(noise(2), format="AIFF", subtype="PCM_16")
    frames, size = struct.pack(">I", 8_000), struct.pack(">I", 16_008)
    at_frames, at_size = data.index(b"COMM") + 10, data.index(b"SSND") + 4
    data = data[:at_frames] + frames + data[at_frames + 4 : at_size] + size + data[at_size + 4 :]
    with pytest.raises(AudioError, match="AIFF header announces: rewrite it with ffmpeg -i"):
        read_audio(io.BytesIO(data))


def test_a_flac_that_is_cut_off_is_damaged_not_short():
    with pytest.raises(AudioError):
        read_audio(io.BytesIO(FLAC[0][: len(FLAC[0]) // 2]))


def test_an_mp3_that_is_damaged_in_its_middle_is_not_cut_there():
    data = encoded(noise(20), format="MP3", bitrate_mode="CONSTANT", compression_level=0.9)
    middle = len(data) // 2
    damaged = data[:middle] + np.random.default_rng(0).bytes(3_000) + data[middle + 3_000 :]
    with pytest.raises(AudioError):
        read_audio(io.BytesIO(damaged), max_seconds=30.0)


def test_streams_that_begin_together_in_an_ogg_file_are_one():
    page_end = end_of_page(VORBIS[0], 0)
    both = VORBIS[0][:page_end] + OPUS[0][: end_of_page(OPUS[0], 0)] + VORBIS[0][page_end:]
    assert streams._later_starts(both, "OGG") == []
    assert streams._later_starts(both + VORBIS[1], "OGG") == [len(both)]


def test_an_mp3_that_ends_with_a_frame_of_padding_is_read_once_and_in_silence(
    tmp_path, monkeypatch, capfd
):
    """The decoder stops before it: its header does not count it. mpg123 would warn of a repair."""
    path, padded, repaired = tmp_path / "clip.mp3", 0, []
    monkeypatch.setattr(streams, "repair", lambda *data: repaired.append(data))
    for i in range(40):
        tail = np.zeros(7_000, np.float32)  # silence at the end, as of speech
        path.write_bytes(encoded(np.concatenate([noise(1 + i / 20), tail]), 22_050, format="MP3"))
        with path.open("rb") as file, soundfile.SoundFile(file.fileno(), closefd=False) as sound:
            expected = len(sound.read())
            padded += file.tell() < path.stat().st_size
        assert abs(len(read_audio(path)) - expected * SAMPLE_RATE / 22_050) <= 1
    assert padded, "no file ends with such a frame"
    assert not repaired
    assert "Xing" not in capfd.readouterr().err


# ------ several files in one


def with_av(container, codec, seconds=2.0, seed=0, rate=RATE, **options):
    """Noise in a container that libsndfile does not write."""
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=options) as output:
        stream = output.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(noise(seconds, seed)[None], "fltp", "mono")
        frame.sample_rate = RATE
        size = stream.frame_size or 0
        resampler = av.AudioResampler(stream.format, "mono", rate, frame_size=size)
        for part in [*resampler.resample(frame), *resampler.resample(None), None]:
            for packet in stream.encode(part):
                output.mux(packet)
    return file.getvalue()


MAKERS = {
    "mp3": lambda: MP3[0],
    "bare mp3": lambda: variable_mp3(noise(2)),
    "mp3 with a tag in front": lambda: (
        b"ID3\x04\0\0\0\0\0\x0a" + bytes(10) + variable_mp3(noise(2))
    ),
    "ogg": lambda: VORBIS[0],
    "opus": lambda: OPUS[0],
    "flac": lambda: FLAC[0],
    "wav": lambda: wav(len(PCM)),
    "aiff": lambda: encoded(noise(2), format="AIFF", subtype="PCM_16"),
    "caf": lambda: encoded(noise(2), format="CAF", subtype="PCM_16"),
    "m4a": lambda: with_av("ipod", "aac"),
    "aac": lambda: with_av("adts", "aac"),
    "webm": lambda: with_av("webm", "libopus", rate=48_000),
    "live webm": lambda: with_av("webm", "libopus", rate=48_000, live="1"),
    "mka of mp3": lambda: with_av("matroska", "libmp3lame"),
    "mov of mp3": lambda: with_av("mov", "libmp3lame"),
    "fragments": lambda: with_av("mp4", "aac", movflags="frag_keyframe+empty_moov"),
}


@functools.cache
def made(name):
    return MAKERS[name]()


@pytest.mark.parametrize("first", MAKERS)
def test_a_file_of_one_container_is_read_whole(first):
    assert abs(len(read_audio(io.BytesIO(made(first)))) / SAMPLE_RATE - 2) < 0.15


@pytest.mark.parametrize("first", MAKERS)
def test_files_of_two_containers_in_one_are_read_whole_or_refused_never_cut(tmp_path, first):
    results = {}
    for second in MAKERS:
        data = made(first) + made(second)
        (tmp_path / "a").write_bytes(data)
        for source in (tmp_path / "a", io.BytesIO(data)):
            try:
                seconds = len(read_audio(source, max_seconds=30.0)) / SAMPLE_RATE
                results[second] = "whole" if abs(seconds - 4) < 0.25 else f"{seconds} s"
            except AudioError as error:
                is_named = "ffmpeg" in str(error) or "nor PyAV" in str(error)
                results[second] = "refused" if is_named else str(error)
    cut = {second: result for second, result in results.items() if result.endswith(" s")}
    assert not cut


def test_what_is_behind_the_first_file_is_refused_with_its_place_and_the_remedy():
    with pytest.raises(
        AudioError, match=rf"a second file \(OGG\) begins at byte {len(MP3[0])}.*ffmpeg"
    ):
        read_audio(io.BytesIO(MP3[0] + VORBIS[0]))
    part = read_audio(io.BytesIO(MP3[0] + VORBIS[0]), start_seconds=0.5, end_seconds=1.5)
    assert len(part) == SAMPLE_RATE, "a part of the first file needs no second"


def test_bytes_of_an_mp3_that_look_like_an_aac_frame_of_no_length_are_no_second_file():
    """In one of eighty files of Common Voice a frame holds such bytes by chance."""
    data = MP3[0]
    middle = len(data) // 2
    odd = data[:middle] + bytes.fromhex("fff9d510001158") + data[middle + 7 :]
    assert len(read_audio(io.BytesIO(odd))) == len(read_audio(io.BytesIO(data)))


@pytest.mark.parametrize("name", ["m4a", "fragments", "webm"])
def test_joined_files_that_pyav_reads_follow_each_other(name):
    data = made(name)
    alone, both = read_audio(io.BytesIO(data)), read_audio(io.BytesIO(data + data))
    assert abs(len(both) - 2 * len(alone)) < 0.05 * SAMPLE_RATE
    error = np.abs(both[-SAMPLE_RATE:] - alone[-SAMPLE_RATE:]).max()
    assert name == "webm" or error < 1e-3, error
    part = read_audio(io.BytesIO(data + data), start_seconds=1.5, end_seconds=3.5)
    assert len(part) == 2 * SAMPLE_RATE
    assert np.abs(part - both[round(1.5 * SAMPLE_RATE) :][: len(part)]).max() < 1e-4


def test_flac_in_ogg_is_no_file_of_its_own():
    start = b"fLaC\0\0\0\x22"
    assert not containers.BEGINS["FLAC"].search(b"\x7fFLAC\1\0\0\1" + start)
    assert containers.BEGINS["FLAC"].search(b"end of another" + start)


@pytest.mark.parametrize("name", ["m4a", "fragments", "webm", "ogg", "opus"])
def test_a_file_that_is_cut_off_is_refused(name):
    data = made(name)
    with pytest.raises(AudioError, match=r"is cut off|nor PyAV"):
        read_audio(io.BytesIO(data[: len(data) * 2 // 3]))


@pytest.mark.parametrize("name", ["ogg", "opus"])
@pytest.mark.parametrize("position", [-1, 0, 800])
def test_an_ogg_file_whose_last_page_names_no_end_is_refused(name, position):
    data = bytearray(made(name))
    *_, (last, end) = containers._ogg_pages(data)
    assert end == len(data)
    data[last + 6 : last + 14] = struct.pack("<q", position)
    with pytest.raises(AudioError, match="last Ogg page does not say where the audio ends"):
        read_audio(io.BytesIO(bytes(data)), max_seconds=30.0)
    with pytest.raises(AudioError, match="last Ogg page"):
        read_audio(io.BytesIO(bytes(data) + made(name)), max_seconds=30.0)


@pytest.mark.parametrize(
    ("make", "seconds"),
    [(lambda: encoded(noise(2), format="W64"), "refused"), (lambda: with_av("tta", "tta"), 4.0)],
)
def test_joined_files_of_rare_containers_are_read_whole_or_refused(make, seconds):
    data = make()
    assert len(read_audio(io.BytesIO(data))) == 2 * SAMPLE_RATE
    if seconds == "refused":
        with pytest.raises(AudioError, match="more in it than its W64 header announces"):
            read_audio(io.BytesIO(data + data))
    else:
        assert len(read_audio(io.BytesIO(data + data))) == seconds * SAMPLE_RATE


@pytest.mark.parametrize("name", ["m4a", "webm", "wav", "mp3", "flac", "ogg"])
@pytest.mark.parametrize("behind", [bytes(5_000), b"no sound " * 1_000])
def test_other_bytes_behind_a_file_are_no_second_file(name, behind):
    if name == "wav" and behind[0]:
        pytest.skip("such bytes behind a wav are audio")
    assert abs(len(read_audio(io.BytesIO(made(name) + behind))) / SAMPLE_RATE - 2) < 0.15
