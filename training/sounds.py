"""Sounds without speech that are trained on, each a pure function of a generator and a duration.

The panel of eval_wer.py judges by others (`evaluation.sounds`), so that it measures what a model
has learned of silence and noise, not which sounds it has met: noise of other colors at other
levels, hum of another frequency and other harmonics, other clicks, and no music at all.

Levels are those of the root mean square in dBFS. Legend: N samples at 16 kHz.
"""

from collections.abc import Callable

import numpy as np

from common.audio import SAMPLE_RATE
from common.levels import at_level, num_samples

Sound = Callable[[np.random.Generator, float], np.ndarray]

# Levels are drawn between these; the panel judges at -20, -40 and -60.
LEVELS = ((-75.0, -65.0), (-55.0, -45.0), (-35.0, -25.0))
FFT_MULTIPLE = 4_000  # samples: its prime factors are 2 and 5, so transforms are fast
LOWEST_HZ = 50.0  # below it brown noise is flat: a random walk's power is nearly all inaudible
BANDS_HZ = (300.0, 3_000.0)  # centers of band noise
BAND_OCTAVES = (0.3, 1.0)  # widths of it
SWELLS_PER_SECOND = (0.3, 4.0)
MAINS_HZ = 60.0
MAINS_PERIODS = 3  # whole samples: the hum is these, again and again
KNOCKS_PER_SECOND = (0.5, 6.0)
KNOCK_HZ = (120.0, 900.0)
KNOCK_SECONDS = (0.02, 0.08)
RUSTLES_PER_SECOND = (1.0, 4.0)
RUSTLE_SECONDS = (0.1, 0.4)


def _uniform(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return float(rng.uniform(*bounds))


def _log_uniform(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return float(np.exp(rng.uniform(*np.log(bounds))))


def _at_drawn_level(rng: np.random.Generator, samples: np.ndarray) -> np.ndarray:
    return at_level(samples, _uniform(rng, LEVELS[rng.integers(len(LEVELS))]))


def _noise(
    rng: np.random.Generator, seconds: float, amplitude: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Noise (N,) with an amplitude for each frequency in Hz, at any level."""
    number = num_samples(seconds)
    length = -(-number // FFT_MULTIPLE) * FFT_MULTIPLE
    hz = np.fft.rfftfreq(length, 1 / SAMPLE_RATE).astype(np.float32)
    white = rng.standard_normal((len(hz), 2), np.float32).view(np.complex64)[:, 0]  # its spectrum
    return np.fft.irfft(white * amplitude(hz), length)[:number]


# ------ kinds


def dither(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Near silence, as 16-bit recorders leave it: high-pass noise of the last bit, float32 (N,)."""
    return np.diff(rng.random(num_samples(seconds) + 1, np.float32)) / 32_768


def brown_noise(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Noise whose power falls by 6 dB an octave, as of wind or a road, float32 (N,)."""
    return _at_drawn_level(rng, _noise(rng, seconds, lambda hz: 1 / np.maximum(hz, LOWEST_HZ)))


def blue_noise(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Noise whose power rises by 3 dB an octave, as of a cheap microphone, float32 (N,)."""
    return _at_drawn_level(rng, _noise(rng, seconds, np.sqrt))


def band_noise(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Noise of one band, as of a fan or water, float32 (N,)."""
    center, octaves = _log_uniform(rng, BANDS_HZ), _uniform(rng, BAND_OCTAVES)

    def band(hz: np.ndarray) -> np.ndarray:
        return np.exp(-0.5 * (np.log2(np.maximum(hz, 1.0) / center) / octaves) ** 2)

    return _at_drawn_level(rng, _noise(rng, seconds, band))


def swelling_noise(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Band noise that swells and fades, as of waves or passing cars, float32 (N,)."""
    samples = band_noise(rng, seconds)
    time = np.arange(len(samples), dtype=np.float32) / SAMPLE_RATE
    rate, phase = _log_uniform(rng, SWELLS_PER_SECOND), float(rng.uniform(0, 2 * np.pi))
    return _at_drawn_level(rng, samples * (1 + np.sin(2 * np.pi * rate * time + phase)) ** 2)


def hum(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Mains hum of 60 Hz, odd harmonics of random strength, float32 (N,)."""
    time = np.arange(num_samples(MAINS_PERIODS / MAINS_HZ)) / SAMPLE_RATE
    harmonics = np.arange(1, 20, 2)[:, None]
    strengths, phases = rng.uniform(0, (1.0, 2 * np.pi), (len(harmonics), 2)).T[..., None]
    samples = (strengths * np.sin(2 * np.pi * MAINS_HZ * harmonics * time + phases)).sum(axis=0)
    return _at_drawn_level(rng, np.resize(samples, num_samples(seconds)))


def knocks(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Knocks at random times in faint noise, each a damped oscillation, float32 (N,)."""
    samples = dither(rng, seconds)
    rate, peak = _log_uniform(rng, KNOCKS_PER_SECOND), rng.uniform(0.02, 0.6)
    for start in rng.integers(0, len(samples), max(1, rng.poisson(rate * seconds))):
        decay = _uniform(rng, KNOCK_SECONDS) / 5
        part = samples[start : start + num_samples(5 * decay)]
        time = np.arange(len(part)) / SAMPLE_RATE
        pitch = _log_uniform(rng, KNOCK_HZ)
        part += (
            peak * rng.uniform(0.3, 1) * np.exp(-time / decay) * np.sin(np.pi * 2 * pitch * time)
        )
    return np.clip(samples, -1, 1)


def rustle(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Bursts of high noise that swell and fade, as of cloth or paper, float32 (N,)."""
    envelope = np.zeros(num_samples(seconds), np.float32)
    rate = _log_uniform(rng, RUSTLES_PER_SECOND)
    for start in rng.integers(0, len(envelope), max(1, rng.poisson(rate * seconds))):
        burst = np.hanning(num_samples(_uniform(rng, RUSTLE_SECONDS)))
        part = envelope[start : start + len(burst)]
        part += rng.uniform(0.3, 1) * burst[: len(part)]
    noise = _noise(rng, seconds, lambda hz: hz)
    return _at_drawn_level(rng, envelope * noise) + dither(rng, seconds)


KINDS: dict[str, Sound] = {
    "dither": dither,
    "brown noise": brown_noise,
    "blue noise": blue_noise,
    "band noise": band_noise,
    "swelling noise": swelling_noise,
    "hum of 60 Hz": hum,
    "knocks": knocks,
    "rustle": rustle,
}
