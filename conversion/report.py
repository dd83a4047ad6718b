"""What each export is worth beside the original: rates, differences, the verdict, the table."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from common import predictions
from common.bootstrap import difference_interval, rate_interval
from common.metrics import ClipCounts
from common.prepared import column
from conversion.scoring import Decoded

NORMALISER = "raw"
RATES = {"wer": "words", "cer": "characters"}
IDENTICAL = ("hf", "ct2_float32")  # exports that compute what the original does
HEADER = ("export", "MB", "window", "WER", "CER", "WER less the original's", "same texts", "CPU s")


@dataclass(frozen=True)
class Clips:
    """The clips that are scored."""

    dataset: Dataset
    tokenizer: PreTrainedTokenizerBase
    task: str

    @property
    def ids(self) -> list[str]:
        return [str(clip) for clip in column(self.dataset, "id")]

    @property
    def speakers(self) -> list[str]:
        return [str(speaker or "") for speaker in column(self.dataset, "speaker")]

    def counts(self, decoded: Decoded) -> ClipCounts:
        counts = predictions.count_errors(
            self.dataset, decoded.texts, self.tokenizer, task=self.task
        )
        return counts[NORMALISER]


def megabytes(folder: Path) -> float:
    """Size of all files of a folder, 10^6 bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def score(
    clips: Clips, decoded: dict[str, Decoded], original: dict[str, Decoded]
) -> dict[str, dict[str, Any]]:
    """Rates at each window, beside those of the original on the same clips.

    Args:
        decoded, original: texts by window.
    """
    rows = {}
    for mode, own in decoded.items():
        counts, before = clips.counts(own), clips.counts(original[mode])
        pairs = [(text.text, original[mode].texts[clip].text) for clip, text in own.texts.items()]
        row: dict[str, Any] = {
            "clips": len(pairs),
            "identical_texts": sum(text == other for text, other in pairs),
            "cpu_seconds": round(own.cpu_seconds, 2),
        }
        for rate, unit in RATES.items():
            mine, other = getattr(counts, unit), getattr(before, unit)
            row |= {
                rate: counts.rates()[rate],
                f"{rate}_interval": rate_interval(mine, clips.ids, clips.speakers),
                f"{rate}_difference": counts.rates()[rate] - before.rates()[rate],
                f"{rate}_difference_interval": difference_interval(
                    other, mine, clips.ids, clips.speakers
                ),
            }
        rows[mode] = row
    return rows


def problems(scores: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Why exports are worse than the original; whisper.cpp decodes in a way of its own.

    Args:
        scores: of `score`, by export.
    """
    found = []
    for name, mode, row in rows_of(scores):
        where = f"{name} at the {mode} window"
        changed = row["clips"] - row["identical_texts"]
        if name in IDENTICAL and changed:
            found.append(f"{where}: {changed} of {row['clips']} texts are not the original's")
        if name == "ct2_int8":
            for rate in RATES:
                difference, interval = (
                    row[f"{rate}_difference{suffix}"] for suffix in ("", "_interval")
                )
                low = interval[0] if interval else difference
                if low > 0:
                    found.append(
                        f"{where}: {rate.upper()} is {difference:.2f} points higher, beyond chance"
                    )
    return found


def rows_of(
    scores: dict[str, dict[str, dict[str, Any]]],
) -> list[tuple[str, str, dict[str, Any]]]:
    """Export, window and its figures."""
    return [(name, mode, row) for name, modes in scores.items() for mode, row in modes.items()]


def table(scores: dict[str, dict[str, dict[str, Any]]], sizes: dict[str, float]) -> str:
    """The table that is printed, in Markdown.

    Args:
        sizes: megabytes of each export.
    """
    lines = [HEADER, ["---"] * len(HEADER)]
    for name, mode, row in rows_of(scores):
        low_high = row["wer_difference_interval"]
        difference = f"{row['wer_difference']:+.2f}"
        if low_high:
            difference += f" [{low_high[0]:+.2f}, {low_high[1]:+.2f}]"
        lines.append(
            (
                name,
                f"{sizes[name]:.1f}" if name in sizes else "",
                mode,
                f"{row['wer']:.2f}",
                f"{row['cer']:.2f}",
                difference if name in sizes else "",
                f"{row['identical_texts']} / {row['clips']}" if name in sizes else "",
                f"{row['cpu_seconds']:.1f}",
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
