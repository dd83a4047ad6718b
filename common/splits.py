"""Who belongs to which split, and who occurs twice: pure functions of a few numbers a clip."""

import hashlib
from collections.abc import Sequence

import numpy as np

NONE, TRAIN, VALIDATION, TEST = range(4)
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

    A speaker goes where this brings the split nearer to its fraction of the clips; clips without a
    speaker stay together. With fewer speakers than splits the cut is by clip.

    Args:
        facts: kept clips, FACTS (clips,).
        fractions: of test and validation.
        seed: a speaker's place in the order depends on nothing else.

    Returns:
        Split codes, uint8 (clips,), and "speaker" or "clip".
    """
    num_splits = 1 + sum(fraction > 0 for fraction in fractions)
    units, by = facts["speaker_hash"], "speaker"
    if len(np.unique(units)) < num_splits:
        units, by = facts["id_hash"], "clip"
    names, unit_of_clip, sizes = np.unique(units, return_inverse=True, return_counts=True)
    order = sorted(range(len(names)), key=lambda at: hash64(f"{seed} {names[at]}".encode()))
    split_of_unit = np.full(len(names), TRAIN, np.uint8)
    for split, fraction in zip((TEST, VALIDATION), fractions, strict=True):
        left = [at for at in order if split_of_unit[at] == TRAIN]
        if fraction > 0 and len(left) > 1:
            split_of_unit[_chosen(left, sizes, fraction * len(facts))] = split
    return split_of_unit[unit_of_clip], by


def _chosen(units: list[int], sizes: np.ndarray, target: float) -> list[int]:
    """Units of about `target` clips together: at least one, and never all."""
    chosen, filled = [], 0
    for at in units:
        if abs(filled + sizes[at] - target) < abs(filled - target) and len(chosen) < len(units) - 1:
            chosen.append(at)
            filled += sizes[at]
    return chosen or [min(units, key=lambda at: sizes[at])]
