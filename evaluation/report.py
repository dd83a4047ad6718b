"""What eval_wer.py writes and prints: all texts, the scores, a table, a line for programs."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from common import metrics
from common.files import write_json, write_text
from common.predictions import Prediction, written_languages
from common.prepared import column

WORST_CLIPS = 20


def write_results(
    folder: Path,
    dataset: Dataset,
    systems: dict[str, dict[str, Any]],
    texts: dict[str, dict[str, Prediction]],
    provenance: dict[str, Any],
) -> None:
    """Write predictions.jsonl and wer.json, and print the table.

    Args:
        systems: scores and figures of each system, by its name.
        texts: predictions of each system by clip id.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in dataset.select_columns(["id", "text", "seconds", "language"]):
        clip = {name: predictions[row["id"]] for name, predictions in texts.items()}
        row |= {name: prediction.text for name, prediction in clip.items()}
        row |= {f"{name}_hit_cap": prediction.hit_cap for name, prediction in clip.items()}
        row |= {
            f"{name}_decoded_again": prediction.decoded_again for name, prediction in clip.items()
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(folder / "predictions.jsonl", "".join(lines))
    write_json(folder / "wer.json", systems | {"recipe": provenance})
    print(table(systems))
    for name, system in systems.items():
        print(f"{name}: {key_values(system)}")
    print(f"scores {folder / 'wer.json'}, texts {folder / 'predictions.jsonl'}", flush=True)


def worst_clips(
    dataset: Dataset, predictions: dict[str, Prediction], task: str
) -> list[dict[str, Any]]:
    """The clips with the most word errors (marks kept), worst first."""
    rows = []
    columns = column(dataset, "id"), column(dataset, "text"), written_languages(dataset, task)
    for clip_id, text, language in zip(*columns, strict=True):
        prediction = predictions[str(clip_id)]
        counts = metrics.count_errors(
            metrics.keep_marks(str(text), language),
            metrics.keep_marks(prediction.text, language),
            "word",
        )
        rows.append(
            {
                "id": prediction.id,
                "word_errors": counts.errors,
                "reference_words": counts.reference_length,
                "reference": str(text),
                "hypothesis": prediction.text,
                "hit_cap": prediction.hit_cap,
                "decoded_again": prediction.decoded_again,
            }
        )
    return sorted(rows, key=lambda row: (-row["word_errors"], row["id"]))[:WORST_CLIPS]


def table(systems: dict[str, dict[str, Any]]) -> str:
    """Rates of all systems side by side, a line a measure."""
    first = next(iter(systems.values()))
    lines = [" " * 22 + "".join(f"{name:>12}" for name in systems)]
    lines.append(
        f"{'window':<22}" + "".join(f"{system['window']:>12}" for system in systems.values())
    )
    for rate in ("wer", "cer"):
        for normaliser in first["normalisers"]:
            values = (system["normalisers"][normaliser][rate] for system in systems.values())
            lines.append(
                f"{rate.upper()} {normaliser:<18}" + "".join(f"{value:12.2f}" for value in values)
            )
    units = {name: rates["unit"] for name, rates in first["normalisers"].items()}
    by_letter = [f"{name} by {unit}" for name, unit in units.items() if unit != "word"]
    if by_letter:
        lines.append(f"WER is counted by word, but {', '.join(by_letter)}")
    lines += [_edits(systems, normaliser) for normaliser in first["normalisers"]]
    measures = (
        ("clips_at_cap", "12d"), ("clips_decoded_again", "12d"), ("real_time_factor", "12.3f"),
        ("peak_memory_gib", "12.2f"),
    )  # fmt: skip
    for measure, form in measures:
        values = (system[measure] for system in systems.values())
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
    words = (system["normalisers"][normaliser]["words"] for system in systems.values())
    edits = (
        f"{counts['substitutions']}+{counts['deletions']}+{counts['insertions']}"
        for counts in words
    )
    return f"S+D+I {normaliser:<16}" + "".join(f"{edit:>12}" for edit in edits)
