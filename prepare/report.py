"""What a preparation made, measured for `preprocess.json` and printed for people."""

import math
from collections import Counter
from typing import Any

import numpy as np

from common import audio
from common.prepared import SPLITS
from prepare.reasons import REASONS
from prepare.splits import KEPT_SPLITS, TEST, SplitOptions, misses_fraction, text_overlaps

HISTOGRAM_SECONDS = (0, 1, 2, 3, 5, 7, 10, 15, 20, 25)  # lower edges


# ------ measured


def describe(
    facts: np.ndarray, splits_by: str, options: SplitOptions, num_bytes: int, mel_bins: int
) -> dict[str, Any]:
    """The measured half of `preprocess.json`.

    Args:
        facts: FACTS (clips,), decided.
        splits_by: how the splits came about, as `splits.decide` returns it.
        options: the fractions that were asked for.
        num_bytes: of the Arrow files.
        mel_bins: of the model's features, to compare the size with.
    """
    kept = facts[facts["reason"] == 0]
    dropped = Counter(REASONS[code] for code in facts["reason"] if code)
    by_split = {name: kept[kept["split"] == code] for code, name in enumerate(SPLITS, start=1)}
    padded = len(kept) * mel_bins * audio.N_FRAMES * 4  # bytes of float32
    return {
        "clips": {"read": len(facts), "kept": len(kept), "dropped": len(facts) - len(kept)},
        "dropped": dict(dropped.most_common()),
        "splits_by": splits_by,
        "fractions_missed": fractions_missed(kept, splits_by, options),
        "splits": {name: describe_split(split) for name, split in by_split.items() if len(split)},
        "all": describe_split(kept),
        "held_out_texts_in_training": int(text_overlaps(kept).sum()),
        "tokens_per_second": token_rates(kept),
        "disk": {
            "bytes": num_bytes,
            "padded_float32_bytes": padded,
            "padded_float32_mel_bins": mel_bins,
            "times_smaller": round(padded / num_bytes, 2),
        },
    }


def describe_split(facts: np.ndarray) -> dict[str, Any]:
    """Counts, hours and a histogram of lengths of kept clips."""
    seconds = float(facts["seconds"].sum())
    counts = np.histogram(facts["seconds"], [*HISTOGRAM_SECONDS, math.inf])[0]
    speakers = facts["speaker_hash"][facts["speaker_hash"] > 0]
    return {
        "clips": len(facts),
        "seconds": round(seconds, 3),
        "hours": round(seconds / 3600, 3),
        "speakers": len(np.unique(speakers)),
        "tokens": int(facts["tokens"].sum()),
        "clips_from_seconds": dict(zip(map(str, HISTOGRAM_SECONDS), counts.tolist(), strict=True)),
    }


def token_rates(facts: np.ndarray) -> dict[str, float]:
    """Tokens per second, end tokens included: over all clips, and percentiles of the clips."""
    rates = facts["tokens"] / facts["seconds"]
    p50, p999 = np.percentile(rates, [50, 99.9])
    mean = facts["tokens"].sum() / facts["seconds"].sum()
    return {"mean": round(float(mean), 3), "p50": round(p50, 3), "p999": round(p999, 3)}


def fractions_missed(
    kept: np.ndarray, splits_by: str, options: SplitOptions
) -> dict[str, list[float]]:
    """Splits that are far from the fraction asked for: name -> [fraction asked for, fraction]."""
    if splits_by == KEPT_SPLITS:
        return {}
    fractions = {"test": options.test_fraction, "validation": options.validation_fraction}
    if splits_by.startswith(KEPT_SPLITS):  # validation was cut from training
        kept = kept[kept["split"] != TEST]
        del fractions["test"]
    missed = {}
    for name, fraction in fractions.items():
        num_clips = int((kept["split"] == SPLITS.index(name) + 1).sum())
        if misses_fraction(num_clips, fraction, len(kept)):
            missed[name] = [fraction, round(num_clips / len(kept), 3)]
    return missed


# ------ printed


def show(report: dict[str, Any], output_dir: str) -> None:
    """Print a report, as `describe` made it or `preprocess.json` has it."""
    _show_splits(report)
    counts = report["all"]["clips_from_seconds"].items()
    print("clips from seconds: " + "  ".join(f"{edge}: {count:,}" for edge, count in counts))
    rates = report["tokens_per_second"]
    print(
        f"tokens per second: mean {rates['mean']:.1f}, half of the clips below {rates['p50']:.1f}, "
        f"99.9 % below {rates['p999']:.1f}"
    )
    _show_drops(report, output_dir)
    disk = report["disk"]
    print(
        f"disk: {disk['bytes'] / 1e6:,.1f} MB; as float32 log-mel padded to 30 s "
        f"({disk['padded_float32_mel_bins']} bins) {disk['padded_float32_bytes'] / 1e6:,.1f} MB, "
        f"{disk['times_smaller']:.1f} times as much"
    )


def _show_splits(report: dict[str, Any]) -> None:
    """Print the table of splits, and how they came about."""
    print(f"{'split':<12}{'clips':>9}{'hours':>9}{'speakers':>10}")
    for name, split in [*report["splits"].items(), ("all", report["all"])]:
        print(f"{name:<12}{split['clips']:>9,}{split['hours']:>9.2f}{split['speakers']:>10,}")
    splits_by = report["splits_by"]
    if splits_by.startswith(f"{KEPT_SPLITS}, "):
        print(
            "the source has no validation split: cut from training, "
            f"{splits_by.removeprefix(f'{KEPT_SPLITS}, ')} (--validation_fraction 0 cuts none)"
        )
    elif splits_by != KEPT_SPLITS:
        print(f"the source has no test or validation split: cut by {splits_by}")
    for name, (expected, actual) in report.get("fractions_missed", {}).items():
        print(
            f"warning: {name} has {actual:.1%} of the clips instead of --{name}_fraction "
            f"{expected:.1%}, as close as whole speakers come; to choose the splits yourself, add "
            "a column named split to the source"
        )


def _show_drops(report: dict[str, Any], output_dir: str) -> None:
    """Print how many clips were dropped for which reason, and how many texts occur twice."""
    total = report["clips"]
    print(f"kept {total['kept']:,} of {total['read']:,} clips, dropped {total['dropped']:,}")
    for reason, count in report["dropped"].items():
        print(f"{count:>9,}  {reason}")
    _show_excluded(report.get("exclude"))
    if total["dropped"]:
        print(f"dropped clips are listed in {output_dir.rstrip('/')}/dropped.jsonl")
    overlaps = report["held_out_texts_in_training"]
    if overlaps:
        print(
            f"{overlaps:,} held-out clips have a text that is also in training, from another "
            "recording: --forbid_text_overlap true drops them"
        )


def _show_excluded(counts: dict[str, int] | None) -> None:
    """Print what became of the ids of --exclude, and warn of those that are of no clip."""
    if counts is None:
        return
    print(
        f"--exclude: {counts['ids']:,} ids, {counts['excluded']:,} of them of clips that are left "
        f"out, {counts['dropped_before']:,} of clips dropped for other reasons"
    )
    if counts["unknown"]:
        print(
            f"warning: {counts['unknown']:,} ids of --exclude are of no clip: were they edited, or "
            "changed by a spreadsheet (00012 to 12)?"
        )
