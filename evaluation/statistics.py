"""How far rates, and differences of systems on the same clips, may be chance: a bootstrap.

All systems are drawn together (`common/bootstrap.py`), so differences are paired.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.bootstrap import (
    FEW_SPEAKERS,
    REPLICAS,
    SEED,
    Interval,
    Units,
    choose_units,
    clip_units,
    count_table,
    interval,
    percent,
    resample,
)
from common.metrics import ClipCounts, ErrorCounts

RATES = {"wer": "words", "cer": "characters"}  # rate -> the counts it is made of


def p_value(differences: np.ndarray) -> float:
    """Two-sided p that a difference is chance, from its replicas (R,): never 0.

    A tail with k of n replicas has probability (k + 1) / (n + 1) (Davison and Hinkley, "Bootstrap
    methods and their application", 1997, section 4.2).
    """
    rarer = min((differences <= 0).sum(), (differences >= 0).sum())
    return float(min(2 * (rarer + 1) / (len(differences) + 1), 1.0))


# ------ rates and differences


@dataclass(frozen=True)
class Significance:
    """Intervals of all rates and differences of systems."""

    intervals: dict[str, dict[str, dict[str, Interval]]]  # system -> normaliser -> wer_interval ...
    comparisons: list[dict[str, Any]]  # each pair of systems, normaliser and rate
    bootstrap: dict[str, Any]  # how they were computed


def significance(
    ids: Sequence[str], speakers: Sequence[str], counts: dict[str, dict[str, ClipCounts]]
) -> Significance:
    """Bootstrap every rate of every system, and every difference of two systems.

    Args:
        ids: of the clips (N).
        speakers: of the clips (N); empty: unknown.
        counts: system -> normaliser -> counts of the clips (N).
    """
    units = choose_units(ids, speakers)
    intervals, comparisons = _bootstrap(counts, units)
    if units.kind == "speaker" and units.number < FEW_SPEAKERS:
        beside, compared = _bootstrap(counts, clip_units(ids))
        for system, name in itertools.product(intervals, next(iter(intervals.values()))):
            own = beside[system][name]
            intervals[system][name] |= {f"{rate}_clips": own[rate] for rate in own}
        for mine, other in zip(comparisons, compared, strict=True):
            mine |= {"interval_clips": other["interval"], "p_clips": other["p"]}
            mine["distinguishable"] &= other["distinguishable"]
    record = {
        "replicas": REPLICAS,
        "seed": SEED,
        "unit": units.kind,
        "units": units.number,
        "warning": units.warning,
    }
    return Significance(intervals, comparisons, record)


def _bootstrap(
    counts: dict[str, dict[str, ClipCounts]], units: Units
) -> tuple[dict[str, dict[str, dict[str, Interval]]], list[dict[str, Any]]]:
    """Intervals of the rates, and the comparisons, over one kind of units."""
    systems, names = list(counts), list(next(iter(counts.values())))
    keys = list(itertools.product(systems, names, RATES))
    clips = [getattr(counts[system][name], RATES[rate]) for system, name, rate in keys]
    table = np.concatenate([count_table(column) for column in clips], axis=1)
    sums, totals = resample(table, units.members), table.sum(axis=0)
    replicas, rates = {}, {}
    for column, key in enumerate(keys):
        errors, length = 2 * column, 2 * column + 1
        replicas[key] = percent(sums[:, errors], sums[:, length])
        rates[key] = float(percent(totals[errors], totals[length]))

    number = units.number
    intervals = {
        system: {
            name: {
                f"{rate}_interval": interval(replicas[system, name, rate], number) for rate in RATES
            }
            for name in names
        }
        for system in systems
    }
    comparisons = []
    for (first, second), name, rate in itertools.product(
        itertools.combinations(systems, 2), names, RATES
    ):
        differences = replicas[second, name, rate] - replicas[first, name, rate]
        bounds = interval(differences, number)
        comparisons.append(
            {
                "systems": [first, second],
                "normaliser": name,
                "rate": rate,
                "difference": rates[second, name, rate] - rates[first, name, rate],
                "interval": bounds,
                "p": p_value(differences) if bounds else 1.0,
                "distinguishable": bounds is not None and not bounds[0] <= 0.0 <= bounds[1],
            }
        )
    return intervals, comparisons


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's coefficient, equal values sharing their mean rank; `None` if all are equal.

    >>> rank_correlation([1, 2, 3], [10, 20, 90]), rank_correlation([1, 2], [5, 5])
    (1.0, None)
    """
    ranks = []
    for values in (first, second):
        _, inverse, number = np.unique(values, return_inverse=True, return_counts=True)
        if len(number) < 2:
            return None
        ranks.append((number.cumsum() - (number - 1) / 2)[inverse])
    return round(float(np.corrcoef(*ranks)[0, 1]), 6)


def confidence_correlation(
    logprobs: Sequence[float | None], words: Sequence[ErrorCounts]
) -> float | None:
    """How well average log-probabilities predict which clips have errors: 1 ranks them perfectly.

    Args:
        logprobs: of each clip (N).
        words: of each clip (N).

    Returns:
        Rank correlation of -log-probability and word error rate; `None` without log-probabilities.
    """
    if any(logprob is None for logprob in logprobs):
        return None
    return rank_correlation([-logprob for logprob in logprobs], [own.rate for own in words])
