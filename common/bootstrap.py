"""Intervals of rates by bootstrap: speakers, or clips, are drawn with replacement.

Errors are counted once a clip. A replica draws as many speakers as there are, with replacement,
and divides the sums of their counts: the clips of a speaker fail together, so drawing clips would
give too narrow intervals (Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR
performance evaluation", 2004).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from common.metrics import ErrorCounts

REPLICAS = 10_000
SEED = 0
TAIL = 0.025  # on each side of a 95 % interval
FEW_SPEAKERS = 20  # below, intervals over speakers are too narrow
DRAWS_AT_ONCE = 1 << 20  # 8 MiB of indices
Interval = list[float] | None  # low and high; None: a single unit tells nothing


# ------ units


@dataclass(frozen=True)
class Units:
    """What is drawn: speakers, or clips."""

    kind: str  # "speaker" or "clip"
    members: np.ndarray  # (N,) the unit of each clip, from 0 on
    warning: str | None = None

    @property
    def number(self) -> int:
        return len(np.unique(self.members))


def clip_units(ids: Sequence[str], warning: str | None = None) -> Units:
    """Each clip is a unit, in the order of ids, so that the order of the clips does not count."""
    return Units("clip", np.unique(ids, return_inverse=True)[1], warning)


def choose_units(ids: Sequence[str], speakers: Sequence[str]) -> Units:
    """Speakers where they are known, else clips.

    Args:
        speakers: of each clip; empty: unknown, then the clip is a unit of its own.
    """
    unknown = sum(not speaker for speaker in speakers)
    if unknown == len(ids):
        return clip_units(
            ids, "no clip names its speaker: intervals are too narrow if speakers have several"
        )
    pairs = zip(ids, speakers, strict=True)
    names = [f"speaker {speaker}" if speaker else f"clip {clip}" for clip, speaker in pairs]
    units = Units("speaker", np.unique(names, return_inverse=True)[1])
    if units.number == 1:
        return clip_units(ids, "1 speaker: intervals over clips do not hold for other speakers")
    warnings = []
    if units.number < FEW_SPEAKERS:
        warnings.append(
            f"{units.number} speakers, fewer than {FEW_SPEAKERS}: intervals may be too narrow and "
            "p too small; those over clips are given beside them"
        )
    if unknown:
        warnings.append(f"{unknown} of {len(ids)} clips name no speaker: each counts as one")
    return Units("speaker", units.members, "; ".join(warnings) or None)


# ------ replicas


def resample(counts: np.ndarray, members: np.ndarray, replicas: int = REPLICAS) -> np.ndarray:
    """Sums of counts over units that are drawn with replacement.

    Sums of whole numbers below 2^53 are exact, so neither the order of the clips nor the linear
    algebra library changes a bit.

    Args:
        counts: (N, C) of each clip.
        members: (N,) the unit of each clip, from 0 on.

    Returns:
        (replicas, C).
    """
    number = int(members.max()) + 1
    units = np.zeros((number, counts.shape[1]))
    np.add.at(units, members, counts)
    generator, sums = np.random.default_rng(SEED), []
    rows = max(DRAWS_AT_ONCE // number, 1)
    for start in range(0, replicas, rows):
        shape = (min(rows, replicas - start), number)
        draws = generator.integers(number, size=shape)
        draws += np.arange(len(draws))[:, None] * number
        times = np.bincount(draws.ravel(), minlength=draws.size).reshape(shape)
        sums.append(times.astype(np.float64) @ units)
    return np.concatenate(sums)


def percent(errors: np.ndarray, reference_length: np.ndarray) -> np.ndarray:
    """Errors in 100 units of reference, as `ErrorCounts.rate` has it."""
    return 100.0 * errors / np.maximum(reference_length, 1)


def tail(units: int) -> float:
    """The tail on each side to cut off so that few units do not give too narrow an interval.

    The expanded percentile interval (Hesterberg, "What teachers should know about the bootstrap",
    2015, section 4.3): Student's t instead of the normal distribution, and n - 1 instead of n. The
    quantile of t is its expansion in 1 / (n - 1) (Abramowitz and Stegun 26.7.5).

    >>> round(tail(10_000), 4), round(tail(40), 4), tail(2) < 0.001
    (0.025, 0.0203, True)
    """
    z, freedom = NormalDist().inv_cdf(1 - TAIL), units - 1
    student = (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
    return NormalDist().cdf(-student * math.sqrt(units / freedom))


def interval(values: np.ndarray, units: int) -> Interval:
    """The 95 % percentile interval of replicas (R,); `None` where there was one unit to draw."""
    if units < 2:
        return None
    low, high = np.quantile(values, [tail(units), 1 - tail(units)])
    return [float(low), float(high)]


def count_table(clips: Sequence[ErrorCounts]) -> np.ndarray:
    """Errors and reference length of each clip, (N, 2)."""
    return np.array([[counts.errors, counts.reference_length] for counts in clips], np.float64)


def rate_interval(
    clips: Sequence[ErrorCounts], ids: Sequence[str], speakers: Sequence[str]
) -> Interval:
    """The 95 % interval of the rate of clips (N), over speakers where they are known.

    Few speakers may happen to be alike: below FEW_SPEAKERS it reaches as far as that over clips.
    """
    return _widest(lambda sums: percent(sums[:, 0], sums[:, 1]), count_table(clips), ids, speakers)


def difference_interval(
    first: Sequence[ErrorCounts],
    second: Sequence[ErrorCounts],
    ids: Sequence[str],
    speakers: Sequence[str],
) -> Interval:
    """The 95 % interval of the rate of `second` less that of `first` on the same clips (N).

    Both have the same draws; units are as in `rate_interval`.
    """
    table = np.concatenate([count_table(first), count_table(second)], axis=1)

    def difference(sums: np.ndarray) -> np.ndarray:
        return percent(sums[:, 2], sums[:, 3]) - percent(sums[:, 0], sums[:, 1])

    return _widest(difference, table, ids, speakers)


def _widest(
    value: Callable[[np.ndarray], np.ndarray],
    table: np.ndarray,
    ids: Sequence[str],
    speakers: Sequence[str],
) -> Interval:
    """The interval of a value (R) of sums (R, C) of counts (N, C)."""
    units, bounds = [choose_units(ids, speakers)], []
    if units[0].kind == "speaker" and units[0].number < FEW_SPEAKERS:
        units.append(clip_units(ids))
    for own in units:
        bounds.append(interval(value(resample(table, own.members)), own.number))
    known = [pair for pair in bounds if pair]
    return [min(low for low, _ in known), max(high for _, high in known)] if known else None
