"""Sounds without speech that the panel judges by, pure functions of a generator and a duration.

None of them is trained on: those are in `training.sounds`.
Legend: N samples at 16 kHz.
"""

import numpy as np

from common.audio import SAMPLE_RATE
from common.levels import BELOW_SPEECH, FRAME, at_level, frame_levels, num_samples

MAINS_HZ = 50.0
HARMONICS = 10  # of mains hum: to 500 Hz, where a rectifier's buzz has most of its power
CLICKS_PER_SECOND = 3.0
CLICK_SECONDS = 0.005
NOTES_PER_SECOND = 2.0
SCALE = (0, 2, 4, 7, 9)  # semitones of a pentatonic scale: any of its notes go together
LOWEST_NOTE_HZ = 220.0
PARTIALS = 4  # of a note


def silence(_rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Digital zeros, float32 (N,)."""
    return np.zeros(num_samples(seconds), np.float32)


def white_noise(rng: np.random.Generator, seconds: float, *, dbfs: float) -> np.ndarray:
    """Noise of equal power at all frequencies, float32 (N,)."""
    return at_level(rng.standard_normal(num_samples(seconds)), dbfs)


def pink_noise(rng: np.random.Generator, seconds: float, *, dbfs: float) -> np.ndarray:
    """Noise whose power falls with frequency, by 3 dB an octave, float32 (N,)."""
    number = num_samples(seconds)
    spectrum = np.fft.rfft(rng.standard_normal(number))
    spectrum[0] = 0.0
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    return at_level(np.fft.irfft(spectrum, number), dbfs)


def hum(rng: np.random.Generator, seconds: float, *, dbfs: float = -40.0) -> np.ndarray:
    """Mains hum: 50 Hz and harmonics whose amplitude falls with their number, float32 (N,)."""
    time = np.arange(num_samples(seconds)) / SAMPLE_RATE
    phases = rng.uniform(0, 2 * np.pi, HARMONICS)
    waves = (
        np.sin(2 * np.pi * MAINS_HZ * number * time + phase) / number
        for number, phase in enumerate(phases, 1)
    )
    return at_level(sum(waves), dbfs)


def clicks(rng: np.random.Generator, seconds: float, *, peak: float = 0.3) -> np.ndarray:
    """Short bursts at random times in digital silence, float32 (N,)."""
    samples = np.zeros(num_samples(seconds))
    length = num_samples(CLICK_SECONDS)
    fading = np.exp(-np.linspace(0, 5, length))
    number = max(1, rng.poisson(CLICKS_PER_SECOND * seconds))
    for start in rng.integers(0, max(len(samples) - length, 1), number):
        burst = rng.uniform(-1, 1, length) * fading
        part = samples[start : start + length]
        part += burst[: len(part)]
    return (samples * peak / np.abs(samples).max()).astype(np.float32)


def music(rng: np.random.Generator, seconds: float, *, dbfs: float = -20.0) -> np.ndarray:
    """Notes of a scale that follow each other, each struck and fading, float32 (N,)."""
    samples = np.zeros(num_samples(seconds))
    for start in range(0, len(samples), num_samples(1 / NOTES_PER_SECOND)):
        semitones = 12 * rng.integers(0, 2) + SCALE[rng.integers(len(SCALE))]
        pitch = LOWEST_NOTE_HZ * 2 ** (semitones / 12)
        time = np.arange(len(samples) - start) / SAMPLE_RATE
        envelope = np.minimum(time / 0.01, 1) * np.exp(-3 * time)
        for partial in range(1, PARTIALS + 1):
            samples[start:] += envelope * np.sin(2 * np.pi * pitch * partial * time) / partial**2
    return at_level(samples, dbfs)


def speech_start(samples: np.ndarray) -> int:
    """The sample of a clip, float (N,), at which its first loud frame begins."""
    levels = frame_levels(samples)
    if not len(levels):
        return 0
    return FRAME * int(np.argmax(levels >= np.percentile(levels, 95) - BELOW_SPEECH))
