"""Stored audio: 16 kHz mono FLAC in and out, and the log-mel features of a batch's own window.

Legend: B clips, N samples, F frames (10 ms), M mel bins.
"""

import io

import numpy as np
import soundfile
import torch

SAMPLE_RATE = 16_000
CHUNK_SECONDS = 30  # Whisper's window
N_SAMPLES = CHUNK_SECONDS * SAMPLE_RATE  # 480,000 samples in a 30-second window
N_FFT = 400  # samples of a spectrum, 25 ms
HOP_LENGTH = 160  # samples of a frame, 10 ms
SAMPLES_PER_POSITION = 2 * HOP_LENGTH  # the encoder halves the number of frames
N_FRAMES = N_SAMPLES // HOP_LENGTH  # 3,000 frames in a 30-second window
LOG_FLOOR = 1e-10  # power below which log10 is clamped
DYNAMIC_RANGE = 8.0  # decades that a clip's features reach below its maximum


class AudioError(ValueError):
    """Audio that cannot be read; the message says why."""


# ------ FLAC


def to_pcm(samples: np.ndarray) -> np.ndarray:
    """Round float (N,) to int16 (N,), clipped to [-1, 1]; 16-bit input comes back bit-equal."""
    return np.clip((samples * 32768.0).round(), -32768, 32767).astype(np.int16)


def keep_bits(pcm: np.ndarray, bits: int) -> np.ndarray:
    """Round samples so that a clip's loudest sample takes `bits` significant bits.

    FLAC stores the zeros below them at no cost: with 13 bits a quarter of the bytes is saved. The
    rounding noise of 13 bits is 83 dB below the clip's peak. Whisper's features end 80 dB below the
    loudest mel bin of the clip, and speech recorded outside a studio has more noise than either.

    Args:
        pcm: int16 (N,).
        bits: 2 to 16, including the sign; 16 keeps every sample as it is.

    Returns:
        int16 (N,).

    >>> keep_bits(np.array([32_767, 100, 3], np.int16), 13).tolist()
    [32760, 104, 0]
    >>> keep_bits(np.array([4_000, 100, 3], np.int16), 13).tolist()
    [4000, 100, 3]
    """
    peak = int(np.abs(pcm.astype(np.int32)).max(initial=0))
    step = 1 << max(0, peak.bit_length() + 1 - bits)
    rounded = (pcm.astype(np.int32) + step // 2) // step * step
    return np.clip(rounded, -32768, 32768 - step).astype(np.int16)


def encode_flac(samples: np.ndarray) -> bytes:
    """Encode samples at 16 kHz, float (N,) or int16 (N,), as 16-bit FLAC."""
    pcm = samples if samples.dtype == np.int16 else to_pcm(samples)
    buffer = io.BytesIO()
    soundfile.write(
        buffer, pcm, SAMPLE_RATE, format="FLAC", subtype="PCM_16", compression_level=1.0
    )
    return buffer.getvalue()


def decode_flac(data: bytes) -> np.ndarray:
    """Decode what `encode_flac` wrote, at most the 30 seconds of a window.

    Returns:
        int16 (N,) at 16 kHz.

    Raises:
        AudioError: the data is damaged, or not 16 kHz mono.
    """
    try:
        samples, rate = soundfile.read(io.BytesIO(data), frames=N_SAMPLES, dtype="int16")
    except (RuntimeError, TypeError) as error:
        raise AudioError(getattr(error, "error_string", None) or str(error)) from error
    if rate != SAMPLE_RATE or samples.ndim != 1:
        raise AudioError(f"{rate} Hz, {samples.ndim} channels")
    return samples


# ------ log-mel


def log_mel(waves: torch.Tensor, mel_filters: torch.Tensor) -> torch.Tensor:
    """Whisper's log-mel spectrograms of clips that are padded with zeros to one window.

    Each frame is equal to that of the same clip padded to 30 seconds, including the silence after
    the speech: its features are not 0.0, which stands for loud noise, but 8 decades below the
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
