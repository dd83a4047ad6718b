"""Scored clips that a system has met in training: same text, same audio, or nearly the text."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from common import trained_on
from common.metrics import ClipCounts
from common.prepared import column
from common.trained_on import ClipHashes
from evaluation.scores import Scores

NEAR = 0.1  # edit distance of near-duplicates, as a share of the longer text's length
RECORDED, TRAIN_SPLIT = "recorded", "train split"  # what the clips are compared with


def describe_leakage(scores: Scores, model: str, adapters: dict[str, str]) -> None:
    """Add `leakage` to every system: how many of its scored clips its training had.

    Exact repeats are counted against what is recorded beside an adapter or model; where nothing
    is, against the train split of --data_dir. Near-duplicate texts need the texts of that split.

    Args:
        model: --model, which may be a fine-tune itself.
        adapters: folder of each system's adapter; empty for none.
    """
    task, dataset = scores.options.task, scores.dataset
    texts, clips = trained_on.normalised(dataset, task), trained_on.hash_clips(dataset, task)
    near, train = None, None
    if scores.train is not None:
        near = near_duplicates(texts, trained_on.normalised(scores.train, task))
        train = trained_on.hash_clips(scores.train, task)
    of_model = trained_on.read(model, "--model")
    for name, system in scores.systems.items():
        records = [of_model]
        if adapters[name]:
            records.append(trained_on.read(adapters[name], "--adapter"))
        known = [record for record in records if record is not None]
        system["leakage"] = leakage(
            [str(clip_id) for clip_id in column(dataset, "id")],
            clips, known, train, near, scores.counts[name],
        )  # fmt: skip


def leakage(
    ids: Sequence[str],
    clips: ClipHashes,
    records: Sequence[ClipHashes],
    train: ClipHashes | None,
    near: np.ndarray | None,
    counts: dict[str, ClipCounts],
) -> dict[str, Any]:
    """What wer.json says of one system.

    Args:
        ids, clips: of the scored clips (N).
        records: what its adapter and its model were trained on, as far as it is recorded.
        train: of the train split of --data_dir.
        near: bool (N,), clips with nearly the text of a clip of that split.
        counts: errors of the clips by normaliser.
    """
    against = records or ([] if train is None else [train])
    if not against:
        return {"against": None}
    known = {
        kind: _is_in(getattr(clips, kind), [getattr(other, kind) for other in against])
        for kind in ("texts", "audio", "speakers")
    }
    is_near = np.zeros(len(ids), bool) if near is None else near & ~known["texts"]
    leaked = known["texts"] | known["audio"] | is_near
    speakers = clips.speakers[known["speakers"]]
    return {
        "against": RECORDED if records else TRAIN_SPLIT,
        "is_train_split": train is not None and any(
            trained_on.same_clips(record, train) for record in records
        ),
        "training_clips": sum(len(other.texts) for other in against),
        "clips": int(leaked.sum()),
        "same_text": _named(ids, known["texts"]),
        "same_audio": _named(ids, known["audio"]),
        "near_text": None if near is None else _named(ids, is_near),
        "shared_speakers": len(np.unique(speakers)),
        "clips_of_shared_speakers": int(known["speakers"].sum()),
        "without": without(counts, leaked) if leaked.any() and not leaked.all() else None,
    }  # fmt: skip


def _is_in(values: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """Which values (N,) are known and among others: bool (N,)."""
    return (values > 0) & np.isin(values, np.concatenate(others))


def _named(ids: Sequence[str], mask: np.ndarray) -> list[str]:
    return [ids[row] for row in np.flatnonzero(mask)]


def without(counts: dict[str, ClipCounts], leaked: np.ndarray) -> dict[str, Any]:
    """Rates by normaliser of the clips that were not met in training."""
    rows, rates = np.flatnonzero(~leaked), {}
    for name, own in counts.items():
        words, characters = ([clips[row] for row in rows] for clips in (own.words, own.characters))
        of_corpus = ClipCounts(own.unit, words, characters).rates()
        rates[name] = {rate: of_corpus[rate] for rate in ("wer", "cer")}
    return {"clips": len(rows), "normalisers": rates}


def near_duplicates(texts: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """Which texts (N) are within NEAR of one of the others, equal ones included: bool (N,).

    Only texts of similar length are compared: two whose lengths differ by more than NEAR of the
    longer are further apart than that.

    >>> near_duplicates(["abcdefghij", "abcdefghxx"], ["abcdefghix"]).tolist()
    [True, True]
    >>> near_duplicates(["abcdefghij", ""], ["abcdefgxyz", ""]).tolist()
    [False, False]
    """
    by_length, rows = defaultdict(set), defaultdict(list)
    for text in others:
        by_length[len(text)].add(text)
    for row, text in enumerate(texts):
        rows[len(text)].append(row)
    is_near = np.zeros(len(texts), bool)
    for length, waiting in rows.items():
        for other_length, bucket in by_length.items():
            most = int(NEAR * max(length, other_length))
            if not length or abs(length - other_length) > most:
                continue
            waiting = [row for row in waiting if not is_near[row]]
            distances = cdist(
                [texts[row] for row in waiting], sorted(bucket), scorer=Levenshtein.distance,
                score_cutoff=most, dtype=np.uint16,
            )  # fmt: skip
            is_near[waiting] |= (distances <= most).any(axis=1)
    return is_near


# ------ printed


def leakage_shown(name: str, system: dict[str, Any]) -> str:
    """A line about a system.

    `leakage adapter: 3 clips have a text of training, 0 its audio, 2 nearly a text; ...`
    """
    own = system["leakage"]
    if own["against"] is None:
        return f"leakage {name}: unknown: neither the model nor --data_dir has the training clips"
    near = own["near_text"]
    line = (
        f"leakage {name}: of {system['clips']} clips {len(own['same_text'])} have the text of a "
        f"training clip, {len(own['same_audio'])} the audio, "
        f"{'an unknown number' if near is None else len(near)} nearly the text; "
        f"{own['clips_of_shared_speakers']} are of speakers in training"
    )
    if own["without"]:
        rates = own["without"]["normalisers"]["raw"]
        line += f"; raw WER of the other {own['without']['clips']} clips {rates['wer']:.1f}"
    if own["against"] == TRAIN_SPLIT:
        line += " (against the train split of --data_dir: the model records no training clips)"
    elif near is not None and not own["is_train_split"]:
        line += " (nearly: against the train split of --data_dir, which is not what it records)"
    return line
