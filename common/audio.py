"""Sound in, log-mel out: any container to 16 kHz mono, and a batch's features at its own window.

Legend: B clips, N samples, F frames (10 ms), M mel bins.
"""

import io
import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
import soxr
import torch

from common import streams
from common.streams import AudioError

SAMPLE_RATE = 16_000
CHUNK_SECONDS = 30  # Whisper's window
N_SAMPLES = CHUNK_SECONDS * SAMPLE_RATE  # 480,000 samples in a 30-second window
N_FFT = 400  # 25 ms
HOP_LENGTH = 160  # 10 ms, one frame
UNKNOWN_FORMAT = 1  # libsndfile's SF_ERR_UNRECOGNISED_FORMAT
MAX_VALUES = 100_000_000  # read at once: 30 s of 8 channels at 192 kHz are 47 million
SAMPLES_PER_POSITION = 2 * HOP_LENGTH  # the encoder halves the number of frames
N_FRAMES = N_SAMPLES // HOP_LENGTH  # 3,000 frames in a 30-second window
LOG_FLOOR = 1e-10  # power below which log10 is clamped
DYNAMIC_RANGE = 8.0  # decades that a clip's features reach below its maximum


# ------ reading

# What libsndfile does not know and PyAV does: name, offset and value of the first bytes.
AV_CONTAINERS = (
    ("m4a/mp4", 4, b"ftyp"),
    ("webm/mka", 0, b"\x1a\x45\xdf\xa3"),
    ("wma", 0, b"\x30\x26\xb2\x75"),
    ("amr", 0, b"#!AMR"),
    ("aac", 0, b"\xff\xf1"),
    ("aac", 0, b"\xff\xf9"),
)


class NeedsPyAVError(AudioError):
    """A container that PyAV would read, where it is not installed."""


def read_audio(
    source: Path | str | BinaryIO,
    *,
    start_seconds: float = 0.0,
    end_seconds: float | None = None,
    max_seconds: float | None = None,
) -> np.ndarray:
    """Decode any container soundfile or PyAV reads, or a part of it, to 16 kHz mono.

    Args:
        source: path, or an open binary file.
        start_seconds, end_seconds: the part to read; `None` is the end of the file.
        max_seconds: stop decoding soon after this many seconds, so that a file of hours costs no
            more memory than a clip; a result longer than `max_seconds` means that the clip is.

    Returns:
        float32 (N,), in [-1, 1] but for overshoot of the resampler.

    Raises:
        NeedsPyAVError: a container that needs PyAV where it is not installed.
        AudioError: unreadable or damaged, or a part that ends before it starts.
    """
    if end_seconds is not None and end_seconds <= start_seconds:
        raise AudioError(f"end {end_seconds} s is not after start {start_seconds} s")
    wanted = None if end_seconds is None else end_seconds - start_seconds
    if max_seconds is not None:
        wanted = min(wanted or math.inf, max_seconds + 0.5)
    try:
        return _read_soundfile(source, start_seconds, wanted)
    except AudioError:
        raise
    except (RuntimeError, OSError, TypeError, ValueError) as error:  # TypeError: headerless .raw
        return _read_av(source, start_seconds, wanted, reason=_reason(error))


def _to_mono(samples: np.ndarray, rate: int) -> np.ndarray:
    """Samples (N, channels) at any rate as (N,) at 16 kHz."""
    mono = samples.mean(axis=1, dtype=np.float32)
    if not np.isfinite(mono).all():
        raise AudioError("samples are not finite numbers")
    if rate == SAMPLE_RATE or not len(mono):
        return mono
    return soxr.resample(mono, rate, SAMPLE_RATE).astype(np.float32, copy=False)


def _reason(error: Exception) -> str:
    """What libsndfile or FFmpeg says, without the path."""
    return getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)


def _read_soundfile(
    source: Path | str | BinaryIO, start_seconds: float, wanted: float | None
) -> np.ndarray:
    """Read what the header announces; all streams of a file that has more than that."""
    if hasattr(source, "read"):
        source.seek(0)
        return _read_open(source, source, start_seconds, wanted)
    with Path(source).open("rb", buffering=0) as file:
        try:
            return _read_open(file, file.fileno(), start_seconds, wanted)
        except soundfile.LibsndfileError as error:
            if error.code != UNKNOWN_FORMAT:
                raise
    with soundfile.SoundFile(source) as sound:  # the suffix may tell: mp3 behind other bytes
        return _to_mono(_read_part(sound, sound.frames, start_seconds, wanted), sound.samplerate)


def _read_open(
    file: BinaryIO, handle: int | BinaryIO, start_seconds: float, wanted: float | None
) -> np.ndarray:
    """Read an open file, whose position tells afterwards whether the decoder came to its end."""
    try:
        with soundfile.SoundFile(handle, closefd=False) as sound:
            container = streams.kind(sound.format)
            if sound.frames != streams.NO_LENGTH:
                samples = _read_part(sound, sound.frames, start_seconds, wanted)
                is_all = wanted is not None and len(samples) == round(wanted * sound.samplerate)
                if is_all or not streams.has_more(_content(file), container, file.tell()):
                    return _to_mono(samples, sound.samplerate)
    except soundfile.LibsndfileError as error:
        container = streams.kind("", _content(file)[:12])
        if error.code == UNKNOWN_FORMAT or not container:
            raise
    pieces, before = [np.zeros(0, np.float32)], 0.0  # before: seconds of the streams before
    for stream, frames in streams.mend(_content(file)[:], container):
        with soundfile.SoundFile(stream) as sound:
            start = max(start_seconds - before, 0.0)
            left = None if wanted is None else start_seconds + wanted - before - start
            if left is None or left > 0:
                samples = _read_part(sound, frames, start, left)
                pieces.append(_to_mono(samples, sound.samplerate))
            before += frames / sound.samplerate
    return np.concatenate(pieces)


def _content(file: BinaryIO) -> bytes | mmap.mmap:
    """All bytes of an open file; its position stays."""
    if isinstance(file, io.BytesIO):
        return file.getvalue()
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _read_part(
    sound: soundfile.SoundFile, num_frames: int, start_seconds: float, wanted: float | None
) -> np.ndarray:
    """Read a part of `num_frames` frames: float32 (N, channels)."""
    start = min(round(start_seconds * sound.samplerate), num_frames)
    if start:
        sound.seek(start)
    frames = num_frames - start
    if wanted is not None:
        frames = min(frames, round(wanted * sound.samplerate))
    if frames * sound.channels > MAX_VALUES:
        raise AudioError(f"{sound.channels} channels at {sound.samplerate} Hz are no speech")
    return sound.read(frames, dtype="float32", always_2d=True)


def _read_av(
    source: Path | str | BinaryIO, start_seconds: float, wanted: float | None, *, reason: str
) -> np.ndarray:
    """Read m4a, webm and the like, which libsndfile does not know."""
    try:
        import av
    except ImportError:
        container = _container(source)
        if not container:
            raise AudioError(f"soundfile cannot read it: {reason}") from None
        raise NeedsPyAVError(f"{container} needs PyAV: pip install av") from None
    if hasattr(source, "seek"):
        source.seek(0)
    start = round(start_seconds * SAMPLE_RATE)
    stop = math.inf if wanted is None else start + round(wanted * SAMPLE_RATE)
    pieces, position = [np.zeros(0, np.float32)], 0  # position: samples decoded so far
    try:
        with av.open(source if hasattr(source, "read") else str(source)) as container:
            for piece in _av_pieces(container, av.AudioResampler("fltp", "mono", SAMPLE_RATE)):
                pieces.append(piece[max(start - position, 0) :])
                position += len(piece)
                if position >= stop:
                    break
    except (av.FFmpegError, OSError, IndexError, ValueError) as error:
        raise AudioError(
            f"neither soundfile ({reason}) nor PyAV ({_reason(error)}) reads it"
        ) from error
    samples = np.concatenate(pieces)
    return _to_mono(samples[: None if wanted is None else stop - start, None], SAMPLE_RATE)


def _av_pieces(container: Any, resampler: Any) -> Iterator[np.ndarray]:
    """Yield float32 (n,) pieces of the first audio stream, the resampler's rest last."""
    for frame in container.decode(audio=0):
        yield from (part.to_ndarray()[0] for part in resampler.resample(frame))  # (1, n) -> (n,)
    yield from (part.to_ndarray()[0] for part in resampler.resample(None))


def _container(source: Path | str | BinaryIO) -> str:
    """Name the container that PyAV would read, or `""`."""
    try:
        if hasattr(source, "seek"):
            source.seek(0)
            head = source.read(16)
        else:
            with Path(source).open("rb") as file:
                head = file.read(16)
    except OSError:
        return ""
    matches = (name for name, at, magic in AV_CONTAINERS if head[at:].startswith(magic))
    return next(matches, "")


def to_pcm(samples: np.ndarray) -> np.ndarray:
    """Round float (N,) to int16 (N,), clipped to [-1, 1]; 16-bit input comes back bit-equal."""
    return np.clip((samples * 32768.0).round(), -32768, 32767).astype(np.int16)


def keep_bits(pcm: np.ndarray, bits: int) -> np.ndarray:
    """Round samples so that a clip's loudest takes `bits` significant bits; FLAC packs the rest.

    The noise that 13 bits leave is 83 dB below the clip's peak; Whisper's features end 80 dB
    below the loudest mel bin of the clip, and speech recorded anywhere but in a studio is noisier
    than either. A quarter of the bytes go.

    Args:
        pcm: int16 (N,).
        bits: 2 to 16, the sign included; 16 keeps every sample as it is.

    >>> keep_bits(np.array([32_767, 100, 3], np.int16), 13).tolist()
    [32760, 104, 0]
    >>> keep_bits(np.array([4_000, 100, 3], np.int16), 13).tolist()
    [4000, 100, 3]
    """
    peak = int(np.abs(pcm.astype(np.int32)).max(initial=0))
    step = 1 << max(0, peak.bit_length() + 1 - bits)
    rounded = (pcm.astype(np.int32) + step // 2) // step * step
    return np.clip(rounded, -32768, 32768 - step).astype(np.int16)


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


def encode_flac(samples: np.ndarray) -> bytes:
    """Encode float (N,), or what `to_pcm` made of it, at 16 kHz as 16-bit FLAC."""
    pcm = samples if samples.dtype == np.int16 else to_pcm(samples)
    buffer = io.BytesIO()
    soundfile.write(
        buffer, pcm, SAMPLE_RATE, format="FLAC", subtype="PCM_16", compression_level=1.0
    )
    return buffer.getvalue()


def decode_flac(data: bytes) -> np.ndarray:
    """Decode what `encode_flac` wrote: int16 (N,) at 16 kHz, at most the 30 seconds of a window.

    Raises:
        AudioError: it is damaged, or not that.
    """
    try:
        samples, rate = soundfile.read(io.BytesIO(data), frames=N_SAMPLES, dtype="int16")
    except (RuntimeError, TypeError) as error:
        raise AudioError(_reason(error)) from error
    if rate != SAMPLE_RATE or samples.ndim != 1:
        raise AudioError(f"{rate} Hz, {samples.ndim} channels")
    return samples


# ------ log-mel


def log_mel(waves: torch.Tensor, mel_filters: torch.Tensor) -> torch.Tensor:
    """Whisper's log-mel spectrograms of clips that are padded with zeros to one window.

    Equal, frame for frame, to the first frames of the same clips padded to 30 seconds, silence
    after the speech included: it is not 0.0, which is loud noise, but lies 8 decades below the
    clip's maximum, or at the floor of the logarithm.

    Args:
        waves: float32 (B, N) at 16 kHz, N a multiple of `HOP_LENGTH`, at most `N_SAMPLES`.
        mel_filters: (M, 1 + N_FFT // 2), on the same device.

    Returns:
        float32 (B, M, F), F = N / HOP_LENGTH.
    """
    frames = waves.shape[1] // HOP_LENGTH
    if waves.shape[1] < N_SAMPLES:  # silence goes on; at 30 s stock mirrors the end, as stft does
        waves = torch.nn.functional.pad(waves, (0, N_FFT))
    window = torch.hann_window(N_FFT, device=waves.device)
    spectrum = torch.stft(waves, N_FFT, HOP_LENGTH, window=window, return_complex=True)
    power = spectrum[..., :frames].abs() ** 2  # (B, 1 + N_FFT // 2, F)
    log = (mel_filters @ power).clamp(min=LOG_FLOOR).log10()  # (B, M, F)
    log = torch.maximum(log, log.amax(dim=(1, 2), keepdim=True) - DYNAMIC_RANGE)
    return (log + 4.0) / 4.0
