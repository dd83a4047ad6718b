"""Decides splits and duplicates, from a few numbers per clip alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.prepared import hash64
from prepare.reasons import AUDIO_OVERLAP, DUPLICATE, REASONS, TEXT_OVERLAP

NONE, TRAIN, VALIDATION, TEST = range(4)
HELD_OUT = (TEST, VALIDATION)
MAX_ORDERS = 64  # orders of speakers that are tried
NEAR = 0.01  # a cut that misses its fractions by less of the clips is good enough
PRIORITY = np.array([0, 0, 2, 1])  # of a clip in several splits training keeps it, then test
KEPT_SPLITS = "found"  # how the splits came about: as the source has them
# What the second pass knows of a clip: 46 bytes, so that it fits in memory for any corpus.
FACTS = np.dtype(
    [
        ("id_hash", "u8"),
        ("pcm_hash", "u8"),
        ("text_hash", "u8"),
        ("speaker_hash", "u8"),  # 0: no speaker
        ("seconds", "f8"),
        ("tokens", "u4"),  # of the text, and its end
        ("split", "u1"),
        ("reason", "u1"),  # index into REASONS; 0: kept
    ]
)


@dataclass(frozen=True)
class SplitOptions:
    """How clips are divided into splits: options of preprocess.py with the same names."""

    test_fraction: float
    validation_fraction: float
    seed: int
    forbid_text_overlap: bool


# ------ all decisions


def decide(facts: np.ndarray, options: SplitOptions) -> tuple[str, dict[int, int]]:
    """Fill in, in place, the split of every clip and the reason of every clip that is dropped.

    Returns:
        How the splits came about ("found", "speaker", "clip", or "found, validation by speaker" or
        "... by clip"), and for every clip that is dropped for its audio: its row -> the row of the
        clip that is kept.
    """
    kept = np.flatnonzero(facts["reason"] == 0)
    has_held_out = bool((facts["split"][kept] > TRAIN).any())
    if not has_held_out:
        facts["split"] = TRAIN
    facts["split"][facts["split"] == NONE] = TRAIN
    originals = _drop_duplicates(facts, kept)
    kept = np.flatnonzero(facts["reason"] == 0)
    splits_by = _cut_missing(facts, kept, has_held_out, options)
    if options.forbid_text_overlap:
        facts["reason"][kept[text_overlaps(facts[kept])]] = REASONS.index(TEXT_OVERLAP)
    return splits_by, originals


def _drop_duplicates(facts: np.ndarray, kept: np.ndarray) -> dict[int, int]:
    """Mark clips whose audio occurs twice; the row of each -> the row of the clip that is kept."""
    same, other, first = duplicates(facts[kept])
    facts["reason"][kept[same]] = REASONS.index(DUPLICATE)
    facts["reason"][kept[other]] = REASONS.index(AUDIO_OVERLAP)
    dropped = np.flatnonzero(same | other)
    return dict(zip(kept[dropped].tolist(), kept[first[dropped]].tolist(), strict=True))


def _cut_missing(
    facts: np.ndarray, kept: np.ndarray, has_held_out: bool, options: SplitOptions
) -> str:
    """Cut the splits that the source lacks; returns how the splits came about."""
    if not has_held_out:
        fractions = (options.test_fraction, options.validation_fraction)
        if not any(fractions):
            return KEPT_SPLITS
        facts["split"][kept], unit = cut(facts[kept], fractions, options.seed)
        return unit
    if (facts["split"][kept] == VALIDATION).any():
        return KEPT_SPLITS
    train = kept[facts["split"][kept] == TRAIN]  # training chooses by validation loss: it needs one
    if len(train) < 2 or not options.validation_fraction:
        return KEPT_SPLITS
    fractions = (0.0, options.validation_fraction)
    facts["split"][train], unit = cut(facts[train], fractions, options.seed)
    return f"{KEPT_SPLITS}, validation by {unit}"


# ------ duplicates


def repeats(hashes: np.ndarray) -> np.ndarray:
    """How often each value (rows,) has occurred before: int64 (rows,).

    >>> repeats(np.array([5, 7, 5, 5])).tolist()
    [0, 0, 1, 2]
    """
    order = np.argsort(hashes, kind="stable")
    is_first = np.ones(len(hashes), bool)
    is_first[1:] = hashes[order][1:] != hashes[order][:-1]
    starts = np.maximum.accumulate(np.where(is_first, np.arange(len(hashes)), 0))
    counts = np.empty(len(hashes), np.int64)
    counts[order] = np.arange(len(hashes)) - starts
    return counts


def duplicates(facts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clips whose audio another clip has: in the same split, and in another split.

    Args:
        facts: kept clips, FACTS (clips,), in the order of the source.

    Returns:
        Two masks, bool (clips,), and the row of the clip that is kept instead, int64 (clips,).
    """
    order = np.lexsort((np.arange(len(facts)), PRIORITY[facts["split"]], facts["pcm_hash"]))
    pcm, split = facts["pcm_hash"][order], facts["split"][order]
    is_first = np.ones(len(facts), bool)
    is_first[1:] = pcm[1:] != pcm[:-1]
    starts = np.maximum.accumulate(np.where(is_first, np.arange(len(facts)), 0))
    same, other = np.zeros(len(facts), bool), np.zeros(len(facts), bool)
    same[order] = ~is_first & (split == split[starts])
    other[order] = ~is_first & (split != split[starts])
    originals = np.empty(len(facts), np.int64)
    originals[order] = order[starts]
    return same, other, originals


def text_overlaps(facts: np.ndarray) -> np.ndarray:
    """Held-out clips whose text is also in training: bool (clips,) for FACTS (clips,)."""
    is_train = facts["split"] == TRAIN
    return ~is_train & np.isin(facts["text_hash"], facts["text_hash"][is_train])


# ------ the cut


def cut(facts: np.ndarray, fractions: Sequence[float], seed: int) -> tuple[np.ndarray, str]:
    """Cut kept clips into splits by whole speakers, in an order that the seed decides.

    A speaker joins a held-out split if this brings the split closer to its fraction of the clips;
    each split gets at least one speaker. If the cut misses a fraction, other orders are tried, and
    the closest cut is taken. Clips without a speaker stay together. With fewer speakers than splits
    the cut is by clip.

    Args:
        facts: kept clips, FACTS (clips,).
        fractions: of test and validation; 0 cuts none.
        seed: decides the order; a speaker's place in it depends on nothing else.

    Returns:
        Split codes, uint8 (clips,), and "speaker" or "clip".
    """
    pairs = zip(HELD_OUT, fractions, strict=True)
    targets = {split: fraction * len(facts) for split, fraction in pairs if fraction > 0}
    units, by = facts["speaker_hash"], "speaker"
    if len(np.unique(units)) <= len(targets):
        units, by = facts["id_hash"], "clip"
    names, unit_of_clip, sizes = np.unique(units, return_inverse=True, return_counts=True)
    best, least = np.full(len(names), TRAIN, np.uint8), math.inf
    for attempt in range(MAX_ORDERS):
        key = f"{seed}" if attempt == 0 else f"{seed} {attempt}"
        places = [hash64(f"{key} {name}".encode()) for name in names]
        codes = _assigned(np.argsort(places).tolist(), sizes.tolist(), targets)
        counts = np.bincount(codes, weights=sizes, minlength=4)
        missed = [abs(counts[split] - target) for split, target in targets.items()]
        if sum(miss**2 for miss in missed) < least:
            best, least = codes, sum(miss**2 for miss in missed)
        if max(missed, default=0) <= max(1, NEAR * len(facts)):
            break
    return best[unit_of_clip], by


def _assigned(order: list[int], sizes: list[int], targets: dict[int, float]) -> np.ndarray:
    """The split of each unit, uint8 (units,): each in turn joins the split that is least filled."""
    codes, filled = np.full(len(sizes), TRAIN, np.uint8), dict.fromkeys(targets, 0)
    num_left, empty = len(sizes), len(targets)
    for unit in order:
        waiting = [split for split, target in targets.items() if filled[split] < target]
        if not waiting:
            break
        for split in sorted(waiting, key=lambda split: filled[split] / targets[split]):
            reserved = 1 + empty - (filled[split] == 0)  # for training and for splits still empty
            excess = filled[split] + sizes[unit] - targets[split]
            is_nearer = excess < targets[split] - filled[split]
            if is_nearer and num_left > reserved:
                empty -= filled[split] == 0
                num_left -= 1
                codes[unit], filled[split] = split, filled[split] + sizes[unit]
                break
    for split in (split for split in targets if not filled[split]):
        left = [unit for unit in order if codes[unit] == TRAIN]
        if len(left) > 1:
            codes[min(left, key=lambda unit: sizes[unit])] = split
    return codes


def misses_fraction(num_clips: int, fraction: float, num_all: int) -> bool:
    """Whether a split of `num_clips` is half its fraction off, and by more than a clip."""
    target = fraction * num_all
    return abs(num_clips - target) > max(1, target / 2)
