"""What training clips are changed by, each time anew: their speed, and masks of their features.

Every draw is a function of the seed and of the epoch or step and the clip, so it does not depend on
processes, pieces or a resume. Each change is separate; validation and decoding never see any.

Legend: B clips, N samples at 16 kHz, M mel bins, F frames (10 ms), K masks.
"""

import math
import zlib
from collections.abc import Sequence

import numpy as np
import soxr
import torch

from common.audio import CHUNK_SECONDS, DYNAMIC_RANGE, LOG_FLOOR, SAMPLE_RATE, to_pcm

# SpecAugment (https://arxiv.org/abs/1904.08779): two masks of each kind. Its frequency masks have
# up to 27 of 80 bins; its time masks up to 1 s of clips of 12 s, here a share of any clip.
NUM_MASKS = 2
FREQUENCY_SHARE = 27 / 80
TIME_SHARE = 0.1
MAX_SPEED_CHANGE = 0.5  # twice as slow is no speech that anybody records


def problems(*, speed: float, spec_augment: bool, cache_encoder: bool) -> list[tuple[bool, str]]:
    """Rules for `cli.refuse` about what changes the clips."""
    given = {"speed": speed, "spec_augment": spec_augment}
    changing = [name for name, value in given.items() if value]
    return [
        (
            cache_encoder and bool(changing),
            "--cache_encoder true: its outputs are of the clips as they are, which "
            f"--{' and --'.join(changing)} would change in every epoch: give one or the other",
        ),
        (
            speed > MAX_SPEED_CHANGE,
            f"--speed {speed:g}: plays clips up to so much faster or slower: give at most "
            f"{MAX_SPEED_CHANGE:g}, such as 0.1",
        ),
    ]


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


def play(samples: np.ndarray, speed: float) -> np.ndarray:
    """Int16 (N,) played faster or slower, tempo and pitch together: N / speed samples.

    Resampled as float32: soxr would dither int16, and silence would be silent no more.
    """
    number = math.ceil(len(samples) / speed)
    wave = samples.astype(np.float32) / 32_768
    played = to_pcm(soxr.resample(wave, speed * SAMPLE_RATE, SAMPLE_RATE, quality="MQ"))
    return np.pad(played[:number], (0, max(0, number - len(played))))


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
