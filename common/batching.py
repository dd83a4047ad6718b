"""Which clips meet in which batch: pure functions of the clips' lengths.

Nothing here knows torch, files or processes' ranks until `micro_batches` cuts a global batch up, so
the same clips pass in the same order on 1, 2 or 16 processes.
"""

import math
from dataclasses import dataclass

import numpy as np

from common.windows import (
    FULL_WINDOW,
    POSITIONS_PER_SECOND,
    TRAIN_MARGIN,
    WINDOW_MULTIPLE,
    DecodeMargin,
    DecodeWindowMode,
    WindowMode,
    decode_windows,
    full_share,
    round_up,
    window_of,
)

LENGTH_BUCKET_SECONDS = 0.32  # clips within one bucket count as equally long and are shuffled


@dataclass(frozen=True)
class GlobalBatch:
    """The clips of one optimizer step and the window they share."""

    clips: tuple[int, ...]  # row numbers of the dataset
    window: int  # encoder positions


@dataclass(frozen=True)
class MicroBatch:
    """What one process computes at once. `None` is filler that keeps shapes equal on all ranks."""

    clips: tuple[int | None, ...]
    window: int  # encoder positions
    label_length: int  # T, tokens that label rows are padded to


@dataclass(frozen=True)
class DecodeBatch:
    """Clips that are decoded together, each at its own window."""

    clips: tuple[int, ...]
    windows: tuple[int, ...]  # positions of each

    label_length = 0  # decoding has no labels

    @property
    def window(self) -> int:
        return max(self.windows)


# ------ training


def default_batch_size(num_clips: int) -> int:
    """Clips per optimizer step for a training split of so many clips.

    A function of the corpus, never of the machine: the loss curve is the same on any number of
    GPUs. 8 gives an hour of speech about 65 steps per epoch, which are enough to learn from once;
    with 64, from about 15 hours on, each of 8 GPUs has 8 clips to compute at once.

    >>> default_batch_size(523), default_batch_size(10_000)
    (8, 64)
    """
    return 8 if num_clips < 10_000 else 64


def plan(
    seconds: np.ndarray,
    *,
    global_batch_size: int,
    seed: int,
    epoch: int,
    window_mode: WindowMode = "auto",
    windows: np.ndarray | None = None,
) -> list[GlobalBatch]:
    """Order the clips of one epoch into global batches of similar length, each clip once.

    Args:
        seconds: (N,) length of each clip.
        global_batch_size: clips an optimizer step; the last batch made may have fewer.
        seed, epoch: everything random is drawn from these two.
        window_mode: "auto" gives each batch its longest clip plus a random margin, and a few the
            full window; "full" gives all the full window.
        windows: (N,) positions of each clip's own window, for cached encoder outputs: clips of
            equal windows meet, without a random margin.

    Returns:
        Batches in the order of training.
    """
    random = np.random.default_rng((seed, epoch))
    shuffled = random.permutation(len(seconds))
    lengths = np.floor(seconds / LENGTH_BUCKET_SECONDS) if windows is None else windows
    buckets = lengths[shuffled]
    ordered = shuffled[np.argsort(buckets, kind="stable")]
    groups = [
        ordered[start : start + global_batch_size]
        for start in range(0, len(ordered), global_batch_size)
    ]
    order = random.permutation(len(groups))
    if windows is not None:
        return [_batch(groups[i], int(windows[groups[i]].max())) for i in order]
    margins = random.integers(TRAIN_MARGIN[0], TRAIN_MARGIN[1] + 1, size=len(groups))
    chosen = [
        FULL_WINDOW
        if window_mode == "full"
        else window_of(seconds[group].max(), int(margin), WINDOW_MULTIPLE)
        for group, margin in zip(groups, margins, strict=True)
    ]
    # Rounded at random, so that the share is exact on the average of many epochs.
    num_full = int(full_share(chosen) * len(groups) + random.random())
    for i in random.choice(len(groups), size=num_full, replace=False):
        chosen[i] = FULL_WINDOW
    return [_batch(groups[i], chosen[i]) for i in order]


def _batch(group: np.ndarray, window: int) -> GlobalBatch:
    return GlobalBatch(tuple(int(clip) for clip in group), window)


def micro_batches(
    batch: GlobalBatch,
    *,
    rank: int,
    num_processes: int,
    max_batch_seconds: float,
    label_lengths: np.ndarray,
    windows: np.ndarray | None = None,
) -> list[MicroBatch]:
    """Cut one rank's share of a global batch into pieces of at most `max_batch_seconds`.

    Seconds are those of the window, padding included; a piece holds at least one clip. All ranks
    get the same number of pieces with the same shapes: where clips run out, `None` fills up.

    Args:
        label_lengths: (N,) tokens of each clip of the dataset after the start token is cut.
        windows: (N,) positions of each clip's own window, for cached encoder outputs: clips of
            different windows never share a piece.
    """
    if windows is not None:
        own: dict[int, list[int]] = {}
        for clip in batch.clips:
            own.setdefault(int(windows[clip]), []).append(clip)
        return [
            piece
            for window, clips in own.items()
            for piece in micro_batches(
                GlobalBatch(tuple(clips), window),
                rank=rank,
                num_processes=num_processes,
                max_batch_seconds=max_batch_seconds,
                label_lengths=label_lengths,
            )
        ]
    share = math.ceil(len(batch.clips) / num_processes)
    filled = batch.clips + (None,) * (share * num_processes - len(batch.clips))
    mine = filled[rank::num_processes]
    most = max(1, int(max_batch_seconds * POSITIONS_PER_SECOND / batch.window))
    size = math.ceil(share / math.ceil(share / most))  # pieces as even as can be
    longest = int(label_lengths[list(batch.clips)].max())
    return [
        MicroBatch(mine[start : start + size], batch.window, longest)
        for start in range(0, share, size)
    ]


# ------ decoding


def decode_plan(
    seconds: np.ndarray,
    *,
    batch_seconds: float,
    window_mode: DecodeWindowMode,
    margin: DecodeMargin,
    num_processes: int = 1,
) -> list[DecodeBatch]:
    """Batches of similar clips, longest first, as even as can be, as many on each process.

    Args:
        seconds: (N,) length of each clip.
        batch_seconds: of window in a batch; exceeded by at most one clip.
    """
    order = np.argsort(-seconds, kind="stable")
    windows = decode_windows(seconds[order], window_mode, margin)
    total = windows.sum()
    most = batch_seconds * POSITIONS_PER_SECOND
    number = round_up(math.ceil(total / most), num_processes)
    assigned = (np.cumsum(windows) - windows / 2) * number // total  # by each clip's middle
    rows_of_batch = (np.flatnonzero(assigned == batch) for batch in range(number))
    return [
        DecodeBatch(tuple(order[rows].tolist()), tuple(windows[rows].tolist()))
        for rows in rows_of_batch
        if len(rows)
    ]


def window_plan(
    seconds: np.ndarray,
    windows: np.ndarray,
    *,
    batch_seconds: float,
    label_lengths: np.ndarray | None = None,
) -> list[MicroBatch]:
    """Batches of clips that share one window, longest clip first.

    Args:
        seconds: (N,) length of each clip.
        windows: (N,) positions of each clip; a longer clip never has fewer.
        label_lengths: (N,) tokens of each clip after the start token is cut, for a loss on these
            batches; without them no labels can be collated.
    """
    groups: list[list[int]] = []
    for clip in np.argsort(-seconds, kind="stable").tolist():
        most = max(1, int(batch_seconds * POSITIONS_PER_SECOND / windows[clip]))
        if not groups or windows[groups[-1][0]] != windows[clip] or len(groups[-1]) >= most:
            groups.append([])
        groups[-1].append(clip)
    longest = [0 if label_lengths is None else int(label_lengths[group].max()) for group in groups]
    return [
        MicroBatch(tuple(group), int(windows[group[0]]), length)
        for group, length in zip(groups, longest, strict=True)
    ]
