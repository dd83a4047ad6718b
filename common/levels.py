"""Levels of sounds, and the pauses of a clip: what is measured, and what is made at a level.

Levels are those of the root mean square in dBFS: 0 is that of a full-scale square wave.
Legend: N samples at 16 kHz.
"""

import numpy as np

from common.audio import SAMPLE_RATE

FRAME = 320  # samples whose level is measured together, 20 ms
INAUDIBLE = -100.0  # dBFS, below the smallest step of 16 bits; a digital zero is at it
# A pause is so far below a clip's loud frames, and so close to its quiet ones, in dB: a vowel fades
# by 30 dB before it ends, and what is left of it is above the noise of the room.
BELOW_SPEECH = 30.0
ABOVE_NOISE = 10.0
MIN_PAUSE_SECONDS = 0.3  # shorter ones are within words


def num_samples(seconds: float) -> int:
    return round(seconds * SAMPLE_RATE)


def level(samples: np.ndarray) -> np.ndarray:
    """Level in dBFS of float (..., N), over the last axis; at least INAUDIBLE."""
    power = np.mean(np.square(samples, dtype=np.float64), axis=-1)
    return 10 * np.log10(np.maximum(power, 10 ** (INAUDIBLE / 10)))


def frame_levels(samples: np.ndarray) -> np.ndarray:
    """Level in dBFS of each whole frame of a clip, (N // FRAME,)."""
    frames = len(samples) // FRAME
    return level(samples[: frames * FRAME].reshape(frames, FRAME))


def at_level(samples: np.ndarray, dbfs: float) -> np.ndarray:
    """Samples (N,) scaled to a level, float32."""
    return (samples * 10 ** ((dbfs - level(samples)) / 20)).astype(np.float32)


def longest_pause(samples: np.ndarray) -> np.ndarray:
    """The longest stretch of a clip, float (N,), that holds nothing but the noise of the room.

    Of a stretch that is mostly digital zeros nothing could be heard: there is none then.

    Returns:
        A part of `samples`, empty if there is no pause.
    """
    levels = frame_levels(samples)
    is_audible = levels > INAUDIBLE
    if not is_audible.any():
        return samples[:0]
    noise, speech = np.percentile(levels[is_audible], (5, 95))
    is_quiet = levels < min(noise + ABOVE_NOISE, speech - BELOW_SPEECH)
    edges = np.flatnonzero(np.diff(is_quiet.astype(int), prepend=0, append=0))
    stretches = [
        (end - start, start, end)
        for start, end in edges.reshape(-1, 2).tolist()
        if is_audible[start:end].mean() >= 0.5
    ]
    _, start, end = max(stretches, default=(0, 0, 0))
    return samples[start * FRAME : end * FRAME]


def lengthen(pause: np.ndarray, seconds: float) -> np.ndarray:
    """A pause (N,) forwards, backwards, forwards and so on, without a jump, to a duration."""
    number = num_samples(seconds)
    return np.pad(pause[:number], (0, max(0, number - len(pause))), mode="symmetric")
