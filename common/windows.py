"""How many encoder positions a clip is given: in training, in decoding, in a cache.

A window is the stretch of audio that the encoder computes for a clip, in encoder positions of 20
ms; Whisper's own is 30 seconds, whatever the clip's length.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

POSITIONS_PER_SECOND = 50  # one encoder position is two 10-ms frames
FULL_WINDOW = 1500  # positions of Whisper's 30-second window
WINDOW_MULTIPLE = 8  # windows are rounded up to it: tensor cores like it, and shapes repeat

# Training windows end this many positions after the longest clip, drawn anew for every batch, so
# that the model learns not to depend on where the window ends. Twice as much silence, 32 to 160
# positions, costs an eighth more and gives no lower validation loss (docs/results.md).
TRAIN_MARGIN = (16, 64)
# Batches at the full window, for runtimes that pad to 30 s: at most one in twenty, and so few that
# they add no more than this share to the encoder's positions. At a mean window of m positions a
# share s of full ones adds s (1500 / m - 1) of the cost, so s is FULL_COST / (1500 / m - 1).
FULL_SHARE = 0.05
FULL_COST = 0.1

# Windows of cached encoder outputs: a function of the clip alone.
CACHE_MARGIN = 32  # inside TRAIN_MARGIN
CACHE_MULTIPLE = 64  # windows must repeat to batch

WindowMode = Literal["auto", "full"]  # of training: following the clips, or 30 seconds
DecodeWindowMode = Literal["auto", "natural", "full"]  # of decoding; auto: as the model was trained


@dataclass(frozen=True)
class DecodeMargin:
    """How much longer than a clip its natural decoding window is, in positions."""

    margin: int
    floor: int  # minimum of the whole window


# A model never trained on short windows loops when they end with the speech.
# Loops in 8 runs of base models: 4 at a margin of 0 positions, 2 at 32, 1 at 64, 0 at 128.
UNTRAINED = DecodeMargin(margin=128, floor=250)
TRAINED = DecodeMargin(margin=32, floor=0)  # well inside TRAIN_MARGIN
OLDER_MARGIN = 64  # of adapters whose record does not say: they were trained with 32 to 160
DECODE_MULTIPLE = 32  # a clip's window depends on the clip alone, so windows must repeat to batch


def positions(seconds: float) -> int:
    """Encoder positions that a clip reaches into: its frames, and two for the width of a frame.

    >>> positions(5.0), positions(30.0)
    (251, 1500)
    """
    return min(math.ceil((math.ceil(seconds * 100 - 1e-6) + 2) / 2), FULL_WINDOW)


def round_up(number: int, multiple: int) -> int:
    """The next multiple, itself included."""
    return -(-number // multiple) * multiple


def window_of(seconds: float, margin: int, multiple: int, floor: int = 0) -> int:
    """Positions of a clip and a margin, at least `floor`, rounded up, at most the full window."""
    return min(round_up(max(positions(seconds) + margin, floor), multiple), FULL_WINDOW)


# ------ training


def window_policy(window_mode: WindowMode) -> dict[str, object]:
    """The windows that a run trains with, to be written beside its adapter."""
    if window_mode == "full":
        return {"context": "full", "positions": FULL_WINDOW}
    return {
        "context": "auto",
        "positions_per_second": POSITIONS_PER_SECOND,
        "train_margin": list(TRAIN_MARGIN),
        "train_full_share": FULL_SHARE,
        "train_full_cost": FULL_COST,
        "decode_margin": TRAINED.margin,
        "decode_floor": TRAINED.floor,
    }


def full_share(windows: Sequence[int]) -> float:
    """Share of batches with windows (N,) that get the full window instead."""
    cost = FULL_WINDOW / float(np.mean(windows)) - 1  # of one, in windows of mean length
    return min(FULL_SHARE, FULL_COST / max(cost, FULL_COST))


def cache_windows(seconds: np.ndarray, window_mode: WindowMode) -> np.ndarray:
    """Positions (N,) of the windows that encoder outputs of clips (N,) are cached at."""
    if window_mode == "full":
        return np.full(len(seconds), FULL_WINDOW)
    return np.array([window_of(float(length), CACHE_MARGIN, CACHE_MULTIPLE) for length in seconds])


# ------ decoding


def is_trained_on_short_windows(policy: Mapping[str, object] | None) -> bool:
    """Whether a model's record says so: that of any model but ours is `None`."""
    return policy is not None and policy.get("context") == "auto"


def trained_mode(policy: Mapping[str, object] | None) -> DecodeWindowMode:
    """The windows that a model was trained for; Whisper itself knows 30 seconds only."""
    return "natural" if is_trained_on_short_windows(policy) else "full"


def decode_margin(policy: Mapping[str, object] | None) -> DecodeMargin:
    """How much longer than a clip its natural window is, for a model with this record."""
    if not is_trained_on_short_windows(policy):
        return UNTRAINED
    margin = policy.get("decode_margin", OLDER_MARGIN)
    return DecodeMargin(int(margin), int(policy.get("decode_floor", TRAINED.floor)))


def decode_window(seconds: float, window_mode: DecodeWindowMode, margin: DecodeMargin) -> int:
    """Encoder positions a clip is decoded with: a function of the clip alone, never of its batch.

    Args:
        window_mode: "full" is 30 seconds; "natural" follows the clip, and so does "auto", as in
            training.

    >>> [decode_window(seconds, "natural", UNTRAINED) for seconds in (1.0, 5.0)]
    [256, 384]
    >>> [decode_window(seconds, "natural", TRAINED) for seconds in (1.0, 5.0)]
    [96, 288]
    >>> decode_window(5.0, "full", TRAINED)
    1500
    """
    if window_mode == "full":
        return FULL_WINDOW
    return window_of(seconds, margin.margin, DECODE_MULTIPLE, margin.floor)


def decode_windows(
    seconds: np.ndarray, window_mode: DecodeWindowMode, margin: DecodeMargin
) -> np.ndarray:
    """`decode_window` (N,) of clips (N,)."""
    return np.array([decode_window(float(length), window_mode, margin) for length in seconds])
