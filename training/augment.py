"""What training clips are changed by, each time anew: speed, gain, noise, and masks of features.

Every draw is a function of the seed and of the epoch or step and the clip, so it does not depend on
processes, pieces or a resume. Each change is separate; validation and decoding never see any.

Legend: B clips, N samples at 16 kHz, M mel bins, F frames (10 ms), K masks.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import soxr
import torch

from common.audio import CHUNK_SECONDS, DYNAMIC_RANGE, LOG_FLOOR, SAMPLE_RATE, to_pcm
from common.levels import INAUDIBLE, at_level, level
from training.sounds import NOISES

NOISY_SHARE = 0.5  # of the clips get noise: the others stay as they were recorded
NOISE_SPREAD = 30.0  # dB that noise is quieter than the loudest allowed, at most
# SpecAugment (https://arxiv.org/abs/1904.08779): two masks of each kind. Its frequency masks have
# up to 27 of 80 bins; its time masks up to 1 s of clips of 12 s, here a share of any clip.
NUM_MASKS = 2
FREQUENCY_SHARE = 27 / 80
TIME_SHARE = 0.1


@dataclass(frozen=True)
class Augmentation:
    """What a run changes its clips by; nothing by default."""

    speed: float = 0.0  # clips are played at 1 - speed, 1 or 1 + speed
    gain_db: float = 0.0  # most that a clip is made louder or quieter by
    noise_db: float = 0.0  # least ratio of clip to noise; 0: no noise
    spec: bool = False  # masks of features

    @property
    def changes_waves(self) -> bool:
        return any((self.speed, self.gain_db, self.noise_db))


NO_AUGMENTATION = Augmentation()


def generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """Of one draw, so that what is drawn for another purpose does not change it."""
    return np.random.default_rng((seed, zlib.crc32(purpose.encode()), *numbers))


# ------ waves


def speeds(seconds: np.ndarray, change: float, *, seed: int, epoch: int) -> np.ndarray:
    """Speed (clips,) that each clip of so many seconds is played at in an epoch.

    Three speeds as in Ko et al. 2015 (https://www.isca-archive.org/interspeech_2015/ko15_interspeech.html).
    No clip becomes longer than Whisper's window.
    """
    if not change:
        return np.ones(len(seconds))
    drawn = 1 + change * generator(seed, "speed", epoch).integers(-1, 2, len(seconds))
    return np.maximum(drawn, np.minimum(seconds / CHUNK_SECONDS, 1.0))


def change_wave(
    pcm: np.ndarray, options: Augmentation, *, speed: float, seed: int, epoch: int, clip: int
) -> np.ndarray:
    """A clip int16 (N,) as it is in an epoch: int16, N / speed samples."""
    rng = generator(seed, "wave", epoch, clip)
    samples = pcm.astype(np.float32) / 32_768
    if speed != 1.0:
        samples = play(samples, speed)
    if options.gain_db:
        samples = change_gain(samples, float(rng.uniform(-options.gain_db, options.gain_db)))
    if options.noise_db:
        samples = add_noise(samples, rng, options.noise_db)
    return to_pcm(samples)


def play(samples: np.ndarray, speed: float) -> np.ndarray:
    """Samples (N,) played faster or slower, tempo and pitch together: N / speed samples."""
    number = math.ceil(len(samples) / speed)
    played = soxr.resample(samples, speed * SAMPLE_RATE, SAMPLE_RATE, quality="MQ")
    return np.pad(played[:number], (0, max(0, number - len(played))))


def change_gain(samples: np.ndarray, gain_db: float) -> np.ndarray:
    """Samples (N,) louder by `gain_db`, or by as much of it as does not clip them."""
    peak = float(np.abs(samples).max(initial=0.0))
    return samples * min(10 ** (gain_db / 20), max(1.0, 1 / max(peak, 1e-6)))


def add_noise(samples: np.ndarray, rng: np.random.Generator, least_db: float) -> np.ndarray:
    """Samples (N,), half the time with noise `least_db` or more below their level."""
    own = float(level(samples))
    if rng.random() >= NOISY_SHARE or own <= INAUDIBLE:
        return samples
    noise = NOISES[rng.integers(len(NOISES))](rng, len(samples) / SAMPLE_RATE)
    return samples + at_level(noise, own - rng.uniform(least_db, least_db + NOISE_SPREAD))


# ------ features


def spec_masks(
    clips: Sequence[int | None], seconds: np.ndarray, *, seed: int, step: int
) -> torch.Tensor:
    """Masks (B, 2, K, 2) of a piece: of frames, then of mel bins, as begin and end in shares.

    Frames are shares of 30 seconds, within the clip itself: what follows it is silence already.

    Args:
        clips: rows; `None` is filler.
        seconds: length of each row.
    """
    masks = np.zeros((len(clips), 2, NUM_MASKS, 2), np.float32)
    for i, clip in enumerate(clips):
        if clip is None:
            continue
        rng = generator(seed, "masks", step, clip)
        most = np.array([[TIME_SHARE], [FREQUENCY_SHARE]])
        width = rng.uniform(0, 1, (2, NUM_MASKS)) * most
        begin = rng.uniform(0, 1, (2, NUM_MASKS)) * (1 - width)
        masks[i] = np.stack([begin, begin + width], axis=-1)
        masks[i, 0] *= seconds[clip] / CHUNK_SECONDS
    return torch.from_numpy(masks)


def mask_features(features: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Put silence where masks (B, 2, K, 2) are in features (B, M, F)."""
    _, num_bins, num_frames = features.shape
    frames = torch.arange(num_frames, device=features.device) / (CHUNK_SECONDS * 100)  # (F)
    bins = torch.arange(num_bins, device=features.device) / num_bins  # (M)
    in_time, in_frequency = (
        ((own[..., :1] <= places) & (places < own[..., 1:])).any(dim=1)
        for own, places in ((masks[:, 0], frames), (masks[:, 1], bins))
    )  # (B, F), (B, M)
    masked = in_time[:, None] | in_frequency[:, :, None]  # (B, M, F)
    return torch.where(masked, silence_value(features), features)


def silence_value(features: torch.Tensor) -> torch.Tensor:
    """What silence has in each clip's log-mel features (B, M, F): (B, 1, 1).

    `common.audio.log_mel` gives it the floor of the logarithm, or `DYNAMIC_RANGE` decades below the
    clip's maximum where that is higher.
    """
    floor = (math.log10(LOG_FLOOR) + 4.0) / 4.0
    return (features.amax(dim=(1, 2), keepdim=True) - DYNAMIC_RANGE / 4.0).clamp(min=floor)
