"""What eval_wer.py prints of scores: a table, a line for programs, the worst clips."""

from typing import Any

from datasets import Dataset

from common import metrics
from common.predictions import Prediction, written_languages
from common.prepared import column

WORST_CLIPS = 20


def worst_clips(
    dataset: Dataset, predictions: dict[str, Prediction], task: str
) -> list[dict[str, Any]]:
    """The clips with the most word errors (marks kept), worst first."""
    rows = []
    told = column(dataset, "id"), column(dataset, "text"), written_languages(dataset, task)
    for clip_id, text, language in zip(*told, strict=True):
        said = predictions[str(clip_id)]
        counts = metrics.count_errors(
            metrics.keep_marks(str(text), language),
            metrics.keep_marks(said.text, language),
            "word",
        )
        rows.append(
            {
                "id": said.id,
                "word_errors": counts.errors,
                "reference_words": counts.reference_length,
                "reference": str(text),
                "hypothesis": said.text,
                "hit_cap": said.hit_cap,
                "decoded_again": said.decoded_again,
            }
        )
    return sorted(rows, key=lambda row: (-row["word_errors"], row["id"]))[:WORST_CLIPS]


def table(systems: dict[str, dict[str, Any]]) -> str:
    """Rates of all systems side by side, a line a measure."""
    first = next(iter(systems.values()))
    lines = [" " * 22 + "".join(f"{name:>12}" for name in systems)]
    lines.append(f"{'window':<22}" + "".join(f"{one['window']:>12}" for one in systems.values()))
    for rate in ("wer", "cer"):
        for normaliser in first["normalisers"]:
            values = (one["normalisers"][normaliser][rate] for one in systems.values())
            lines.append(
                f"{rate.upper()} {normaliser:<18}" + "".join(f"{value:12.2f}" for value in values)
            )
    units = {name: rates["unit"] for name, rates in first["normalisers"].items()}
    by_letter = [f"{name} by {unit}" for name, unit in units.items() if unit != "word"]
    if by_letter:
        lines.append(f"WER is counted by word, but {', '.join(by_letter)}")
    lines += [_edits(systems, normaliser) for normaliser in first["normalisers"]]
    last = (
        ("clips_at_cap", "12d"), ("clips_decoded_again", "12d"), ("real_time_factor", "12.3f"),
        ("peak_memory_gib", "12.2f"),
    )  # fmt: skip
    for measure, form in last:
        values = (one[measure] for one in systems.values())
        lines.append(f"{measure:<22}" + "".join(f"{value:{form}}" for value in values))
    return "\n".join(lines)


def key_values(system: dict[str, Any]) -> str:
    """Rates in one line, as a program reads them: `wer_raw=68.7 cer_raw=28.7 ...`."""
    return " ".join(
        f"{rate}_{name}={rates[rate]:.5g}"
        for name, rates in system["normalisers"].items()
        for rate in ("wer", "cer")
    )


def _edits(systems: dict[str, dict[str, Any]], normaliser: str) -> str:
    """Word substitutions + deletions + insertions of all systems."""
    words = (one["normalisers"][normaliser]["words"] for one in systems.values())
    edits = (f"{w['substitutions']}+{w['deletions']}+{w['insertions']}" for w in words)
    return f"S+D+I {normaliser:<16}" + "".join(f"{edit:>12}" for edit in edits)
