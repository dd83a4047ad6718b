"""Reads any audio container as 16 kHz mono, whole or in part."""

import io
import itertools
import math
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
import soxr

from common.audio import SAMPLE_RATE, AudioError
from prepare import containers, streams

UNKNOWN_FORMAT = 1  # libsndfile's SF_ERR_UNRECOGNISED_FORMAT
MAX_VALUES = 100_000_000  # values of one read; 30 s of 8 channels at 192 kHz are 47 million
# Containers that PyAV reads and libsndfile does not: name, offset and value of their first bytes.
AV_CONTAINERS = (
    ("m4a/mp4", 4, b"ftyp"),
    ("webm/mka", 0, b"\x1a\x45\xdf\xa3"),
    ("wma", 0, b"\x30\x26\xb2\x75"),
    ("amr", 0, b"#!AMR"),
    ("aac", 0, b"\xff\xf1"),
    ("aac", 0, b"\xff\xf9"),
)


class NeedsPyAVError(AudioError):
    """A container that PyAV would read, but PyAV is not installed."""


class NoChannelError(AudioError):
    """A channel that the file does not have, or that is not one of it alone."""


def read_audio(
    source: Path | str | BinaryIO,
    *,
    start_seconds: float = 0.0,
    end_seconds: float | None = None,
    max_seconds: float | None = None,
    channels: Sequence[int] = (),
) -> np.ndarray:
    """Decode audio, or a part of it, from any container that soundfile or PyAV reads.

    Args:
        source: path, or an open binary file.
        start_seconds, end_seconds: the part to read; `None` is the end of the file.
        max_seconds: decoding stops half a second later, so that a file of hours takes no more
            memory than a clip. A result that is longer than `max_seconds` is not the whole clip.
        channels: exactly one of these, from 0, must be in the file, and is read; none: the mean of
            all.

    Returns:
        float32 (N,) at 16 kHz, in [-1, 1] except for overshoot of the resampler.

    Raises:
        NeedsPyAVError: the container needs PyAV, which is not installed.
        NoChannelError: none of `channels` is in the file, or several are.
        AudioError: the audio is unreadable or damaged, or the part ends before it starts.
    """
    if end_seconds is not None and end_seconds <= start_seconds:
        raise AudioError(f"end {end_seconds} s is not after start {start_seconds} s")
    duration = None if end_seconds is None else end_seconds - start_seconds
    if max_seconds is not None:
        duration = min(duration or math.inf, max_seconds + 0.5)
    try:
        return _read_soundfile(source, start_seconds, duration, channels)
    except AudioError:
        raise
    except (RuntimeError, OSError, TypeError, ValueError) as error:  # TypeError: headerless .raw
        return _read_av(source, start_seconds, duration, channels, reason=_reason(error))


def _to_mono(samples: np.ndarray, rate: int, channels: Sequence[int]) -> np.ndarray:
    """Samples (N, channels) at any rate as (N,) at 16 kHz: one of `channels`, or the mean."""
    if channels:
        mono = samples[:, _choose(channels, samples.shape[1])]
    else:
        mono = samples.mean(axis=1, dtype=np.float32)
    if not np.isfinite(mono).all():
        raise AudioError("samples are not finite numbers")
    if rate == SAMPLE_RATE or not len(mono):
        return mono
    return soxr.resample(mono, rate, SAMPLE_RATE).astype(np.float32, copy=False)


def _choose(channels: Sequence[int], count: int) -> int:
    """The only one of `channels` that a file of `count` channels has."""
    present = [channel for channel in channels if channel < count]
    if not present:
        raise NoChannelError(f"is not in the file, which has {count} channels")
    if len(present) > 1:
        raise NoChannelError(
            "is the first or the second: no other row tells which: write left or right"
        )
    return present[0]


def _reason(error: Exception) -> str:
    """The message of libsndfile or FFmpeg, without the path."""
    return getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)


def _read_soundfile(
    source: Path | str | BinaryIO,
    start_seconds: float,
    duration: float | None,
    channels: Sequence[int],
) -> np.ndarray:
    """Read as much as the header announces, and all streams of a file that has more than that."""
    if hasattr(source, "read"):
        source.seek(0)
        return _read_open(source, source, start_seconds, duration, channels)
    with Path(source).open("rb", buffering=0) as file:
        try:
            return _read_open(file, file.fileno(), start_seconds, duration, channels)
        except soundfile.LibsndfileError as error:
            if error.code != UNKNOWN_FORMAT:
                raise
    with soundfile.SoundFile(source) as sound:  # by its suffix, such as mp3 behind other bytes
        samples = _read_part(sound, sound.frames, start_seconds, duration)
        return _to_mono(samples, sound.samplerate, channels)


def _read_open(
    file: BinaryIO,
    handle: int | BinaryIO,
    start_seconds: float,
    duration: float | None,
    channels: Sequence[int],
) -> np.ndarray:
    """Read an open file. Its position afterwards shows whether the decoder reached its end."""
    try:
        with soundfile.SoundFile(handle, closefd=False) as sound:
            container = streams.container_of(sound.format)
            if sound.frames != streams.NO_LENGTH:
                samples = _read_part(sound, sound.frames, start_seconds, duration)
                is_complete = duration is not None and len(samples) == round(
                    duration * sound.samplerate
                )
                if is_complete or not streams.has_more(_content(file), container, file.tell()):
                    return _to_mono(samples, sound.samplerate, channels)
    except soundfile.LibsndfileError as error:
        container = streams.container_of("", _content(file)[:12])
        if error.code == UNKNOWN_FORMAT or not container:
            raise
    return _read_streams(_content(file)[:], container, start_seconds, duration, channels)


def _read_streams(
    data: bytes,
    container: str,
    start_seconds: float,
    duration: float | None,
    channels: Sequence[int],
) -> np.ndarray:
    """Read a file whose header announces too little, stream by stream."""
    pieces, before = [np.zeros(0, np.float32)], 0.0  # before: seconds of earlier streams
    for stream, num_frames in streams.repair(data, container):
        with soundfile.SoundFile(stream) as sound:
            start = max(start_seconds - before, 0.0)
            left = None if duration is None else start_seconds + duration - before - start
            if left is None or left > 0:
                samples = _read_part(sound, num_frames, start, left)
                pieces.append(_to_mono(samples, sound.samplerate, channels))
            before += num_frames / sound.samplerate
    return np.concatenate(pieces)


def _content(file: BinaryIO) -> bytes | mmap.mmap:
    """All bytes of an open file, whose position does not change."""
    if isinstance(file, io.BytesIO):
        return file.getvalue()
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _read_part(
    sound: soundfile.SoundFile, num_frames: int, start_seconds: float, duration: float | None
) -> np.ndarray:
    """Read a part of `num_frames` frames: float32 (N, channels)."""
    start = min(round(start_seconds * sound.samplerate), num_frames)
    if start:
        sound.seek(start)
    frames = num_frames - start
    if duration is not None:
        frames = min(frames, round(duration * sound.samplerate))
    if frames * sound.channels > MAX_VALUES:
        raise AudioError(f"{sound.channels} channels at {sound.samplerate} Hz are no speech")
    return sound.read(frames, dtype="float32", always_2d=True)


def _read_av(
    source: Path | str | BinaryIO,
    start_seconds: float,
    duration: float | None,
    channels: Sequence[int],
    *,
    reason: str,
) -> np.ndarray:
    """Read m4a, webm and other containers that libsndfile does not know."""
    try:
        import av
    except ImportError:
        container = _container(source)
        if not container:
            raise AudioError(f"soundfile cannot read it: {reason}") from None
        raise NeedsPyAVError(f"{container} needs PyAV: pip install av") from None
    start = round(start_seconds * SAMPLE_RATE)
    stop = math.inf if duration is None else start + round(duration * SAMPLE_RATE)
    pieces, position = [np.zeros(0, np.float32)], 0  # position: samples decoded so far
    try:
        data = _content(source) if hasattr(source, "read") else _mapped(source)
        for piece in _av_pieces(source, data, channels):
            pieces.append(piece[max(start - position, 0) :])
            position += len(piece)
            if position >= stop:
                break
    except (av.FFmpegError, OSError, IndexError, ValueError) as error:
        raise AudioError(
            f"neither soundfile ({reason}) nor PyAV ({_reason(error)}) reads it"
        ) from error
    if position < stop:
        containers.refuse_rest(data, containers.name_of(data), len(data))
    samples = np.concatenate(pieces)
    return _to_mono(samples[: None if duration is None else stop - start, None], SAMPLE_RATE, ())


def _mapped(path: Path | str) -> mmap.mmap:
    """All bytes of a file."""
    with Path(path).open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _av_pieces(
    source: Path | str | BinaryIO, data: bytes | mmap.mmap, channels: Sequence[int]
) -> Iterator[np.ndarray]:
    """Yield float32 (n,) pieces of the first audio stream of each file in a source of bytes."""
    import av

    files = containers.files_in(data)
    if hasattr(source, "seek"):
        source.seek(0)
    alone = source if hasattr(source, "read") else str(source)
    for start, end in files:
        with av.open(alone if len(files) == 1 else io.BytesIO(data[start:end])) as container:
            chosen = _choose(channels, container.streams.audio[0].channels) if channels else 0
            resampler = av.AudioResampler("fltp", None if channels else "mono", SAMPLE_RATE)
            for frame in itertools.chain(container.decode(audio=0), [None]):  # None: what is left
                yield from (part.to_ndarray()[chosen] for part in resampler.resample(frame))


def _container(source: Path | str | BinaryIO) -> str:
    """The name of a container that PyAV would read, or `""`."""
    try:
        if hasattr(source, "seek"):
            source.seek(0)
            head = source.read(16)
        else:
            with Path(source).open("rb") as file:
                head = file.read(16)
    except OSError:
        return ""
    matches = (name for name, offset, magic in AV_CONTAINERS if head.startswith(magic, offset))
    return next(matches, "")


# ------ arrays of samples


def encode_wav(samples: Any, rate: int) -> bytes:
    """Encode lists or arrays of samples, (N,) or (channels, N), as a wav file of floats.

    Raises:
        ValueError: not numbers between -1 and 1, nor whole numbers of 16 bits.
    """
    array = np.asarray(samples)
    if array.dtype.kind in "iu" and np.abs(array.astype(np.int64)).max(initial=0) <= 32768:
        array = array / 32768.0
    if array.dtype.kind != "f" or array.ndim not in (1, 2):
        raise ValueError("the audio array is not one of samples, or of channels of samples")
    if array.ndim == 2 and array.shape[0] < array.shape[1]:
        array = array.T
    buffer = io.BytesIO()
    soundfile.write(buffer, array.astype(np.float32), rate, format="WAV", subtype="FLOAT")
    return buffer.getvalue()
