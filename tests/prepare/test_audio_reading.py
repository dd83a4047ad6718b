"""prepare/reading.py: containers, rates, channels, parts of files, refusals."""

import io
import sys

import numpy as np
import pytest
import soundfile

from common.audio import SAMPLE_RATE, AudioError, decode_flac, encode_flac, to_pcm
from prepare.reading import NeedsPyAVError, read_audio


def chirp(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """A tone that rises from 200 to 1200 Hz, so that time shifts are seen: (N, channels)."""
    time = np.arange(round(seconds * rate)) / rate
    wave = 0.4 * np.sin(2 * np.pi * (200 * time + 500 * time**2 / seconds))
    return np.repeat(wave[:, None], channels, axis=1).astype(np.float32)


def write_m4a(path, seconds=1.0, container="mp4", codec="aac", rate=44_100):
    av = pytest.importorskip("av")
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate, layout="mono")
        samples = chirp(seconds, rate)[:, 0][None]
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler(
            stream.format, "mono", rate, frame_size=stream.frame_size or 0
        )
        for part in [*resampler.resample(frame), *resampler.resample(None), None]:
            for packet in stream.encode(part):
                file.mux(packet)


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("wav", {"subtype": "PCM_24"}),
        ("flac", {}),
        ("mp3", {}),
        ("ogg", {"subtype": "VORBIS"}),
        ("opus", {"format": "OGG", "subtype": "OPUS"}),
    ],
)
def test_stereo_of_any_container_becomes_16_khz_mono(tmp_path, suffix, options):
    rate = 48_000 if suffix == "opus" else 44_100
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, chirp(2.0, rate, channels=2), rate, **options)
    samples = read_audio(path)
    expected = chirp(2.0, SAMPLE_RATE)[:, 0]
    assert samples.dtype == np.float32 and samples.ndim == 1
    assert abs(len(samples) - len(expected)) <= 0.08 * SAMPLE_RATE, len(samples)
    delays = range(0, 1200, 4) if suffix == "mp3" else range(4)
    correlation = max(
        np.corrcoef(samples[delay : delay + 24_000], expected[:24_000])[0, 1] for delay in delays
    )
    assert correlation > 0.98, correlation


def test_opposite_channels_cancel_because_channels_are_averaged(tmp_path):
    wave = chirp(1.0, SAMPLE_RATE)
    soundfile.write(tmp_path / "a.wav", np.hstack([wave, -wave]), SAMPLE_RATE, subtype="FLOAT")
    assert np.abs(read_audio(tmp_path / "a.wav")).max() < 1e-6


def test_16_bit_audio_at_16_khz_is_stored_bit_for_bit(tmp_path):
    pcm = np.random.default_rng(0).integers(-32768, 32768, 16_000, dtype=np.int16)
    pcm[:2] = -32768, 32767
    soundfile.write(tmp_path / "a.wav", pcm, SAMPLE_RATE)
    stored = decode_flac(encode_flac(read_audio(tmp_path / "a.wav")))
    assert (stored == pcm).all()


def test_overshoot_is_clipped_not_wrapped():
    assert to_pcm(np.array([1.5, -1.5], np.float32)).tolist() == [32767, -32768]


def test_a_part_of_a_file_is_read_at_its_place(tmp_path):
    wave = chirp(3.0, 8_000)
    soundfile.write(tmp_path / "a.flac", wave, 8_000)
    whole = read_audio(tmp_path / "a.flac")
    part = read_audio(tmp_path / "a.flac", start_seconds=1.0, end_seconds=2.5)
    assert len(part) == 1.5 * SAMPLE_RATE
    middle = slice(1000, 20_000)  # away from the resampler's edges
    assert np.abs(part[middle] - whole[SAMPLE_RATE:][middle]).max() < 1e-3


def test_a_part_beyond_the_end_is_empty(tmp_path):
    soundfile.write(tmp_path / "a.wav", chirp(1.0, 8_000), 8_000)
    assert len(read_audio(tmp_path / "a.wav", start_seconds=5.0, end_seconds=6.0)) == 0


def test_a_part_that_ends_before_it_starts_is_refused(tmp_path):
    with pytest.raises(AudioError, match=r"end 1.0 s is not after start 2.0 s"):
        read_audio(tmp_path / "a.wav", start_seconds=2.0, end_seconds=1.0)


def test_a_long_file_is_not_decoded_to_its_end(tmp_path):
    soundfile.write(tmp_path / "a.wav", chirp(60.0, 8_000), 8_000)
    assert len(read_audio(tmp_path / "a.wav", max_seconds=2.0)) == 2.5 * SAMPLE_RATE


def test_m4a_is_read_through_pyav_whole_and_in_part(tmp_path):
    write_m4a(tmp_path / "a.m4a", seconds=2.0)
    whole = read_audio(tmp_path / "a.m4a")
    assert abs(len(whole) - 2 * SAMPLE_RATE) < 0.1 * SAMPLE_RATE, len(whole)
    part = read_audio(tmp_path / "a.m4a", start_seconds=0.5, end_seconds=1.5)
    assert len(part) == SAMPLE_RATE
    assert (part == whole[8_000:24_000]).all()
    assert (read_audio(io.BytesIO((tmp_path / "a.m4a").read_bytes())) == whole).all()


def test_webm_is_read_through_pyav(tmp_path):
    write_m4a(tmp_path / "a.webm", container="webm", codec="libopus", rate=48_000)
    assert abs(len(read_audio(tmp_path / "a.webm")) - SAMPLE_RATE) < 0.1 * SAMPLE_RATE


def test_m4a_without_pyav_is_refused_with_its_name_and_the_remedy(tmp_path, monkeypatch):
    write_m4a(tmp_path / "a.m4a")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(NeedsPyAVError, match="m4a/mp4 needs PyAV: pip install av"):
        read_audio(tmp_path / "a.m4a")
    with pytest.raises(NeedsPyAVError, match="m4a/mp4 needs PyAV"):
        read_audio(io.BytesIO((tmp_path / "a.m4a").read_bytes()))


@pytest.mark.parametrize("with_av", [True, False])
@pytest.mark.parametrize("name", ["a.mp3", "a.wav", "a.raw", "a"])
def test_bytes_that_are_no_audio_are_an_audio_error(tmp_path, monkeypatch, name, with_av):
    if not with_av:
        monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / name).write_bytes(b"this is no audio at all" * 100)
    with pytest.raises(AudioError):
        read_audio(tmp_path / name)


def test_an_empty_file_a_missing_file_and_a_folder_are_audio_errors(tmp_path):
    (tmp_path / "a.wav").touch()
    for path in (tmp_path / "a.wav", tmp_path / "missing.wav", tmp_path):
        with pytest.raises(AudioError):
            read_audio(path)


def test_samples_that_are_not_numbers_are_an_audio_error(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full(800, np.nan), 8_000, subtype="FLOAT")
    with pytest.raises(AudioError, match="not finite"):
        read_audio(tmp_path / "a.wav")
