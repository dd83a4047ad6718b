"""Who belongs to which split, and who occurs twice: pure functions of a few numbers a clip."""

import hashlib
import math
from collections.abc import Sequence

import numpy as np

NONE, TRAIN, VALIDATION, TEST = range(4)
HELD_OUT = (TEST, VALIDATION)
ORDERS = 64  # of speakers, tried where whole speakers do not fit the fractions
NEAR = 0.01  # of the clips: fits
PRIORITY = np.array([0, 0, 2, 1])  # of a clip in several splits training keeps it, then test
# What is known of a clip besides its sound and text: 46 bytes.
FACTS = np.dtype(
    [
        ("id_hash", "u8"),
        ("pcm_hash", "u8"),
        ("text_hash", "u8"),
        ("speaker_hash", "u8"),  # 0: no speaker
        ("seconds", "f8"),
        ("tokens", "u4"),  # of the text, and its end
        ("split", "u1"),
        ("reason", "u1"),  # 0: kept
    ]
)


def hash64(data: bytes) -> int:
    """64 bits; two of 10 million different clips collide with a probability of 3 in a million."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def repeats(hashes: np.ndarray) -> np.ndarray:
    """How often each value (rows,) has occurred before, as int64 (rows,).

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
    """Clips whose audio a kept clip has already: in their own split, and in another.

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


def cut(facts: np.ndarray, fractions: Sequence[float], seed: int) -> tuple[np.ndarray, str]:
    """Cut kept clips into splits: whole speakers, in an order that the seed decides.

    A speaker goes where this brings the split nearer to its fraction of the clips; each split gets
    one at least. Where an order misses a fraction, others are tried and the nearest cut is taken.
    Clips without a speaker stay together. With fewer speakers than splits the cut is by clip.

    Args:
        facts: kept clips, FACTS (clips,).
        fractions: of test and validation; 0 cuts none.
        seed: a speaker's place in the order depends on nothing else.

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
    for attempt in range(ORDERS):
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
    """The split (units,) of each unit: in this order, to where most of the target is missing."""
    codes, filled = np.full(len(sizes), TRAIN, np.uint8), dict.fromkeys(targets, 0)
    num_left, empty = len(sizes), len(targets)
    for at in order:
        waiting = [split for split, target in targets.items() if filled[split] < target]
        if not waiting:
            break
        for split in sorted(waiting, key=lambda split: filled[split] / targets[split]):
            reserved = 1 + empty - (filled[split] == 0)  # for training and for splits still empty
            is_nearer = filled[split] + sizes[at] - targets[split] < targets[split] - filled[split]
            if is_nearer and num_left > reserved:
                empty -= filled[split] == 0
                num_left -= 1
                codes[at], filled[split] = split, filled[split] + sizes[at]
                break
    for split in (split for split in targets if not filled[split]):
        left = [at for at in order if codes[at] == TRAIN]
        if len(left) > 1:
            codes[min(left, key=lambda at: sizes[at])] = split
    return codes


def far_off(num_clips: int, fraction: float, num_all: int) -> bool:
    """Whether a split of `num_clips` misses its fraction by half of it, and by more than a clip."""
    target = fraction * num_all
    return abs(num_clips - target) > max(1, target / 2)
