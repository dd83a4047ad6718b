"""What eval_wer.py writes and prints: all texts, the scores, a table, a line for programs."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from common.bootstrap import REPLICAS, Interval
from common.files import write_json, write_text
from common.metrics import ClipCounts
from common.prepared import column
from evaluation import nonspeech
from evaluation.abilities import abilities_shown, has_abilities
from evaluation.leakage import leakage_shown
from evaluation.scores import Panel, Scores
from evaluation.statistics import Significance, significance


def write_results(
    folder: Path,
    scores: Scores,
    also: dict[str, Scores],
    adapters: dict[str, str],
    provenance: dict[str, Any],
) -> None:
    """Write predictions.jsonl and wer.json, and print the table.

    Args:
        also: of the other folders, by their names: predictions_NAME.jsonl, and short tables.
        adapters: folder of each adapter, by the name of its system.
    """
    folder.mkdir(parents=True, exist_ok=True)
    systems, tested = scores.systems, write_texts(folder / "predictions.jsonl", scores)
    tested_also = {
        name: write_texts(folder / f"predictions_{name}.jsonl", own) for name, own in also.items()
    }
    result = compared(systems, tested) | {
        "also": {name: compared(own.systems, tested_also[name]) for name, own in also.items()},
        "adapters": adapters,
        "recipe": provenance,
    }
    result |= {"audit": scores.audit} if scores.audit else {}
    write_panel(folder / nonspeech.FILE_NAME, scores.panel)
    write_json(folder / "wer.json", result)
    print(table(systems))
    print_findings(scores, tested)
    for name, own in also.items():
        print(f"also {name}")
        print_findings(own, tested_also[name])
    for name, system in systems.items():
        print(f"{name}: {key_values(system)}")
    print(f"scores {folder / 'wer.json'}, texts {folder / 'predictions.jsonl'}", flush=True)


def write_texts(path: Path, scores: Scores) -> Significance:
    """Write each clip with its texts as a line, and add intervals to the rates."""
    dataset, texts, counts = scores.dataset, scores.texts, scores.counts
    lines = []
    rows = dataset.select_columns(["id", "text", "seconds", "language", "speaker"])
    for index, row in enumerate(rows):
        clip = {name: predictions[row["id"]] for name, predictions in texts.items()}
        row |= {name: prediction.text for name, prediction in clip.items()}
        for name, prediction in clip.items():
            row |= {
                f"{name}_word_errors": counts[name]["raw"].words[index].errors,
                f"{name}_hit_cap": prediction.hit_cap,
                f"{name}_decoded_again": prediction.decoded_again,
                f"{name}_loops": prediction.loops,
                f"{name}_logprob": prediction.logprob,
            }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))
    if scores.other_counts:
        others = {name: system["other_window"] for name, system in scores.systems.items()}
        add_intervals(dataset, others, scores.other_counts)
    return add_intervals(dataset, scores.systems, counts)


def add_intervals(
    dataset: Dataset,
    systems: dict[str, dict[str, Any]],
    counts: dict[str, dict[str, ClipCounts]],
) -> Significance:
    """Put its interval beside every rate of the systems.

    Args:
        counts: that the rates are made of, by system and normaliser.
    """
    tested = significance(column(dataset, "id"), column(dataset, "speaker"), counts)
    for name, system in systems.items():
        for normaliser, rates in system["normalisers"].items():
            rates |= tested.intervals[name][normaliser]
    return tested


def print_findings(scores: Scores, tested: Significance) -> None:
    """Print intervals, and what else was examined on the clips of a folder."""
    print(intervals_shown(scores.systems, tested))
    if scores.panel:
        print(nonspeech.table(scores.systems))
    for name, system in scores.systems.items():
        print(leakage_shown(name, system))
    if has_abilities(scores.systems):
        print(abilities_shown(scores.systems))


def compared(systems: dict[str, dict[str, Any]], tested: Significance) -> dict[str, Any]:
    """Systems and their comparisons, as wer.json has them."""
    return systems | {"comparisons": tested.comparisons, "bootstrap": tested.bootstrap}


def write_panel(path: Path, panel: Panel | None) -> None:
    """Write nonspeech.jsonl; without a panel, remove that of an earlier evaluation."""
    if panel is None:
        path.unlink(missing_ok=True)
        return
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in nonspeech.rows(panel)]
    write_text(path, "".join(lines))


# ------ printed


def intervals_shown(systems: dict[str, dict[str, Any]], significance: Significance) -> str:
    """Raw rates and differences with their 95 % intervals, a line each.

    `base 164.7 [150.2, 179.9]`, `difference -96.0 [-109.1, -82.4], p <= 0.0002`
    """
    record = significance.bootstrap
    drawn = f"{record['replicas']:,} replicas of {record['units']} {record['unit']}s"
    lines = [f"95 % intervals, {drawn}"]
    if record["warning"]:
        lines.append(f"warning: {record['warning']}")
    for rate in ("wer", "cer"):
        lines.append(f"{rate.upper()} raw")
        for name, system in systems.items():
            raw = system["normalisers"]["raw"]
            beside = _shown(raw.get(f"{rate}_interval_clips"), ", over clips ")
            lines.append(f"{name} {raw[rate]:.1f}{_shown(raw[f'{rate}_interval'])}{beside}")
        for comparison in significance.comparisons:
            if (comparison["normaliser"], comparison["rate"]) == ("raw", rate):
                clips = systems[comparison["systems"][0]]["clips"]
                lines.append(difference_shown(comparison, clips, alone=len(systems) == 2))
    return "\n".join(lines)


def difference_shown(comparison: dict[str, Any], clips: int, *, alone: bool) -> str:
    """A line about two systems, which are named unless they are the only ones."""
    first, second = comparison["systems"]
    name = "difference" if alone else f"{second} - {first}"
    p, least = comparison["p"], 2 / (REPLICAS + 1)
    line = f"{name} {comparison['difference']:+.1f}{_shown(comparison['interval'])}"
    line += f", p <= {least:.4f}" if p <= least else f", p = {p:.4f}"
    line += _shown(comparison.get("interval_clips"), ", over clips ")
    if not comparison["distinguishable"]:
        return f"{line}: not distinguishable on {clips} clips"
    return f"{line}: worse" if comparison["difference"] > 0 else line


def _shown(interval: Interval, before: str = " ") -> str:
    """` [150.2, 179.9]`; nothing where there is no interval."""
    return f"{before}[{interval[0]:.1f}, {interval[1]:.1f}]" if interval else ""


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
    if "other_window" in first:
        others = [system["other_window"] for system in systems.values()]
        lines.append(f"{'other window':<22}" + "".join(f"{own['window']:>12}" for own in others))
        for rate in ("wer", "cer"):
            values = (own["normalisers"]["raw"][rate] for own in others)
            lines.append(
                f"{rate.upper()} {'raw':<18}" + "".join(f"{value:12.2f}" for value in values)
            )
    units = {name: rates["unit"] for name, rates in first["normalisers"].items()}
    by_letter = [f"{name} by {unit}" for name, unit in units.items() if unit != "word"]
    if by_letter:
        lines.append(f"WER is counted by word, but {', '.join(by_letter)}")
    if "whisper_openai" in units:
        lines.append(
            "whisper_basic lowers I and İ as Turkish and Azerbaijani do; published numbers are by "
            "whisper_openai"
        )
    lines += [_edits(systems, normaliser) for normaliser in first["normalisers"]]
    measures = (
        ("clips_at_cap", "12d"), ("clips_decoded_again", "12d"), ("clips_looping", "12d"),
        ("clips_empty", "12d"), ("real_time_factor", "12.3f"), ("peak_memory_gib", "12.2f"),
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
