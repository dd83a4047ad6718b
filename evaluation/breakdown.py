"""Where a system fails: raw word error rate by duration, speaker, language and unseen words."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from common.bootstrap import (
    REPLICAS,
    Units,
    choose_units,
    clip_units,
    count_table,
    interval,
    percent,
    resample,
)
from common.metrics import ErrorCounts, keep_marks
from common.prepared import column

DURATIONS = (0, 2, 5, 10, 20)  # seconds from which a group reaches to the next; the last to 30
MANY_UNSEEN = 3  # clips with as many words that are unseen in training, or more, are one group
SPEAKER_REPLICAS = 1000  # for each of up to thousands of speakers
UNKNOWN = "unknown"  # the group of the clips that name no speaker


def breakdown(
    dataset: Dataset,
    languages: Sequence[str],
    seen: set[str] | None,
    words: dict[str, Sequence[ErrorCounts]],
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Raw word error rates of groups of clips, each with its count and interval.

    A group of a single speaker has intervals over its clips; a group of one clip has none.

    Args:
        languages: of the clips' texts (N).
        seen: words of the training clips (`words_of`); `None`: unknown, so no such groups.
        words: system -> counts of the clips (N).

    Returns:
        system -> duration, speaker, language and unseen_words -> rows.
    """
    speakers = [str(speaker or "") for speaker in column(dataset, "speaker")]
    ids = [str(clip_id) for clip_id in column(dataset, "id")]
    groups: dict[str, list[str]] = {
        "duration": [duration_group(seconds) for seconds in column(dataset, "seconds")],
        "speaker": [speaker or UNKNOWN for speaker in speakers] if any(speakers) else [],
        "language": list(languages),
        "unseen_words": unseen_groups(dataset, languages, seen) if seen is not None else [],
    }
    result: dict[str, dict[str, list[dict[str, Any]]]] = {system: {} for system in words}
    tables = np.concatenate([count_table(counts) for counts in words.values()], axis=1)
    for kind, labels in groups.items():
        for system in result:
            result[system][kind] = []
        members: dict[str, list[int]] = {}
        for clip, label in enumerate(labels):
            members.setdefault(label, []).append(clip)
        for group, clips in sorted(members.items(), key=lambda item: _order(item[0])):
            own = [ids[clip] for clip in clips]
            units, replicas = clip_units(own), SPEAKER_REPLICAS
            if kind != "speaker":
                units = choose_units(own, [speakers[clip] for clip in clips])
                replicas = REPLICAS
            rows = _rates(tables[clips], units, replicas)
            for system, rates in zip(result, rows, strict=True):
                result[system][kind].append({"group": group, "clips": len(clips)} | rates)
    return result


def _rates(tables: np.ndarray, units: Units, replicas: int) -> list[dict[str, Any]]:
    """Rate and interval of each system, from errors and words of clips (N, 2 * systems)."""
    sums, totals = resample(tables, units.members, replicas), tables.sum(axis=0)
    rows = []
    for column_index in range(0, tables.shape[1], 2):
        pair = slice(column_index, column_index + 2)
        errors, length = totals[pair]
        rates = percent(*sums[:, pair].T)
        rows.append(
            {
                "reference_words": int(length),
                "wer": float(percent(errors, length)),
                "wer_interval": interval(rates, units.number),
            }
        )
    return rows


def _order(group: str) -> tuple[float, str]:
    """Durations and numbers by their value, then names."""
    number = group.split("-")[0].split(" ")[0]
    return int(number) if number.isascii() and number.isdigit() else math.inf, group


def duration_group(seconds: float) -> str:
    """The group of a clip; one of just 2 seconds is in the second.

    >>> duration_group(1.99), duration_group(2.0), duration_group(30.0)
    ('0-2 s', '2-5 s', '20-30 s')
    """
    start = max(second for second in DURATIONS if second <= seconds)
    end = next((second for second in DURATIONS if second > start), 30)
    return f"{start}-{end} s"


def words_of(dataset: Dataset, languages: Sequence[str]) -> set[str]:
    """All words of the clips, under `keep_marks`: punctuation makes no new word."""
    words: set[str] = set()
    for text, language in zip(column(dataset, "text"), languages, strict=True):
        words.update(keep_marks(str(text), language).split())
    return words


def unseen_groups(dataset: Dataset, languages: Sequence[str], seen: set[str]) -> list[str]:
    """The group of each clip: how many of its words were not seen, 0, 1, 2, or 3 or more."""
    groups = []
    for text, language in zip(column(dataset, "text"), languages, strict=True):
        unseen = sum(word not in seen for word in keep_marks(str(text), language).split())
        groups.append(f"{MANY_UNSEEN} or more" if unseen >= MANY_UNSEEN else str(unseen))
    return groups
