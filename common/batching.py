"""Which clips meet in which batch, and how many encoder positions they get: pure functions of the
clips' lengths.

Nothing here knows torch, files or processes' ranks until `micro_batches` cuts a global batch up, so
the same clips pass in the same order on 1, 2 or 16 processes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

POSITIONS_PER_SECOND = 50  # one encoder position is two 10-ms frames
FULL_CONTEXT = 1500  # positions of Whisper's 30-second window
CONTEXT_MULTIPLE = 8  # contexts are rounded up to it: tensor cores like it, and shapes repeat

# Training windows end this many positions after the longest clip, drawn anew for every batch, so
# that the model learns not to depend on where the window ends.
TRAIN_MARGIN = (32, 160)
# Batches at the full window, for runtimes that pad to 30 s: at most one in twenty, and so few that
# they add no more than this share to the encoder's positions.
FULL_SHARE = 0.05
FULL_COST = 0.1

LENGTH_BUCKET_SECONDS = 0.32  # clips within one bucket count as equally long and are shuffled

# Windows of cached encoder outputs: a function of the clip alone.
CACHE_MARGIN = 96  # the middle of TRAIN_MARGIN
CACHE_MULTIPLE = 64  # windows must repeat to batch

Context = Literal["auto", "full"]
DecodeContext = Literal["auto", "natural", "full"]


@dataclass(frozen=True)
class DecodeWindow:
    """How much longer than a clip its decoding window is, in positions."""

    margin: int
    floor: int  # of the whole window


# A model never trained on short windows loops when they end with the speech.
# Loops seen in 8 runs of base models: 4 at +0 positions, 2 at +32, 1 at +64, 0 at +128.
UNTRAINED = DecodeWindow(margin=128, floor=250)
TRAINED = DecodeWindow(margin=64, floor=0)  # well inside TRAIN_MARGIN
DECODE_MULTIPLE = 32  # a clip's window depends on the clip alone, so windows must repeat to batch


@dataclass(frozen=True)
class GlobalBatch:
    """The clips of one optimizer step and the window they share."""

    clips: tuple[int, ...]  # row numbers of the dataset
    context: int  # encoder positions


@dataclass(frozen=True)
class MicroBatch:
    """What one process computes at once. `None` is filler that keeps shapes equal on all ranks."""

    clips: tuple[int | None, ...]
    context: int  # encoder positions
    label_length: int  # T, tokens that label rows are padded to


@dataclass(frozen=True)
class DecodeBatch:
    """Clips that are decoded together, each at its own window."""

    clips: tuple[int, ...]
    windows: tuple[int, ...]  # positions of each

    label_length = 0  # decoding has no labels

    @property
    def context(self) -> int:
        return max(self.windows)


def positions(seconds: float) -> int:
    """Encoder positions that a clip reaches into: its frames, and two for the width of a frame.

    >>> positions(5.0), positions(30.0)
    (251, 1500)
    """
    return min(math.ceil((math.ceil(seconds * 100 - 1e-6) + 2) / 2), FULL_CONTEXT)


def round_up(number: int, multiple: int) -> int:
    """The next multiple, itself included."""
    return -(-number // multiple) * multiple


def window_policy(context: Context) -> dict[str, object]:
    """The windows that a run trains with, to be written beside its adapter."""
    if context == "full":
        return {"context": "full", "positions": FULL_CONTEXT}
    return {
        "context": "auto",
        "positions_per_second": POSITIONS_PER_SECOND,
        "train_margin": list(TRAIN_MARGIN),
        "train_full_share": FULL_SHARE,
        "train_full_cost": FULL_COST,
        "decode_margin": TRAINED.margin,
        "decode_floor": TRAINED.floor,
    }


# ------ training


def default_batch_size(num_clips: int) -> int:
    """Clips per optimizer step for a training split of so many clips.

    A function of the corpus, never of the machine: the loss curve is the same on any number of
    GPUs. 16 gives an hour of speech about 40 steps per epoch; with 64, from about 15 hours on, each
    of 8 GPUs has 8 clips to compute at once.

    >>> default_batch_size(523), default_batch_size(10_000)
    (16, 64)
    """
    return 16 if num_clips < 10_000 else 64


def plan(
    seconds: np.ndarray,
    *,
    global_batch_size: int,
    seed: int,
    epoch: int,
    context: Context = "auto",
    windows: np.ndarray | None = None,
) -> list[GlobalBatch]:
    """Order the clips of one epoch into global batches of similar length, each clip once.

    Args:
        seconds: (N,) length of each clip.
        global_batch_size: clips an optimizer step; the last batch made may have fewer.
        seed, epoch: everything random is drawn from these two.
        context: "auto" gives each batch its longest clip plus a random margin, and a few the full
            window; "full" gives all the full window.
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
    contexts = [
        FULL_CONTEXT
        if context == "full"
        else _window(seconds[group].max(), int(margin), CONTEXT_MULTIPLE)
        for group, margin in zip(groups, margins, strict=True)
    ]
    share = min(FULL_SHARE, FULL_COST / max(FULL_CONTEXT / np.mean(contexts) - 1, FULL_COST))
    num_full = int(share * len(groups) + random.random())  # exact on the average of many epochs
    for i in random.choice(len(groups), size=num_full, replace=False):
        contexts[i] = FULL_CONTEXT
    return [_batch(groups[i], contexts[i]) for i in order]


def _batch(group: np.ndarray, context: int) -> GlobalBatch:
    return GlobalBatch(tuple(int(clip) for clip in group), context)


def cache_windows(seconds: np.ndarray, context: Context) -> np.ndarray:
    """Positions (N,) of the windows that encoder outputs of clips (N,) are cached at."""
    if context == "full":
        return np.full(len(seconds), FULL_CONTEXT)
    return np.array([_window(float(one), CACHE_MARGIN, CACHE_MULTIPLE) for one in seconds])


def _window(seconds: float, margin: int, multiple: int, floor: int = 0) -> int:
    """Positions of a clip and a margin, at least `floor`, rounded up, at most the full window."""
    return min(round_up(max(positions(seconds) + margin, floor), multiple), FULL_CONTEXT)


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
            for context, clips in own.items()
            for piece in micro_batches(
                GlobalBatch(tuple(clips), context),
                rank=rank,
                num_processes=num_processes,
                max_batch_seconds=max_batch_seconds,
                label_lengths=label_lengths,
            )
        ]
    share = math.ceil(len(batch.clips) / num_processes)
    filled = batch.clips + (None,) * (share * num_processes - len(batch.clips))
    mine = filled[rank::num_processes]
    most = max(1, int(max_batch_seconds * POSITIONS_PER_SECOND / batch.context))
    size = math.ceil(share / math.ceil(share / most))  # pieces as even as can be
    longest = int(label_lengths[list(batch.clips)].max())
    return [
        MicroBatch(mine[start : start + size], batch.context, longest)
        for start in range(0, share, size)
    ]


# ------ decoding


def is_trained_on_short_windows(policy: Mapping[str, object] | None) -> bool:
    """Whether a model's record says so: that of any model but ours is `None`."""
    return policy is not None and policy.get("context") == "auto"


def trained_context(policy: Mapping[str, object] | None) -> DecodeContext:
    """The windows that a model was trained for; Whisper itself knows 30 seconds only."""
    return "natural" if is_trained_on_short_windows(policy) else "full"


def natural_window(policy: Mapping[str, object] | None) -> DecodeWindow:
    """How much longer than a clip its natural window is, for a model with this record."""
    if not is_trained_on_short_windows(policy):
        return UNTRAINED
    margin = policy.get("decode_margin", TRAINED.margin)  # older records lack both
    return DecodeWindow(int(margin), int(policy.get("decode_floor", TRAINED.floor)))


def decode_context(seconds: float, context: DecodeContext, window: DecodeWindow) -> int:
    """Encoder positions a clip is decoded with: a function of the clip alone, never of its batch.

    Args:
        context: "full" is 30 seconds; "natural" follows the clip, and so does "auto", as training
            has it.

    >>> [decode_context(seconds, "natural", UNTRAINED) for seconds in (1.0, 5.0)]
    [256, 384]
    >>> [decode_context(seconds, "natural", TRAINED) for seconds in (1.0, 5.0)]
    [128, 320]
    >>> decode_context(5.0, "full", TRAINED)
    1500
    """
    if context == "full":
        return FULL_CONTEXT
    return _window(seconds, window.margin, DECODE_MULTIPLE, window.floor)


def decode_windows(seconds: np.ndarray, context: DecodeContext, window: DecodeWindow) -> np.ndarray:
    """`decode_context` (N,) of clips (N,)."""
    return np.array([decode_context(float(one), context, window) for one in seconds])


def decode_plan(
    seconds: np.ndarray,
    *,
    batch_seconds: float,
    context: DecodeContext,
    window: DecodeWindow,
    num_processes: int = 1,
) -> list[DecodeBatch]:
    """Batches of similar clips, longest first, as even as can be, as many on each process.

    Args:
        seconds: (N,) length of each clip.
        batch_seconds: of window in a batch; exceeded by at most one clip.
    """
    order = np.argsort(-seconds, kind="stable")
    windows = decode_windows(seconds[order], context, window)
    total = windows.sum()
    most = batch_seconds * POSITIONS_PER_SECOND
    number = round_up(math.ceil(total / most), num_processes)
    at = (np.cumsum(windows) - windows / 2) * number // total  # of each clip's middle
    found = (np.flatnonzero(at == batch) for batch in range(number))
    return [
        DecodeBatch(tuple(order[rows].tolist()), tuple(windows[rows].tolist()))
        for rows in found
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
