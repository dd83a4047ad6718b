"""`.eval_results/NAME.yaml` beside an adapter: a score for a leaderboard of the Hub, only if asked.

Which benchmark the scored clips are of is the user's word: a prepared folder does not know it.
https://huggingface.co/docs/hub/eval-results
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from common.cli import first_line
from common.files import write_text
from common.metrics import NORMALISERS
from evaluation.push import is_repo

FOLDER = ".eval_results"


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's task, as --benchmark names it."""

    dataset: str  # OWNER/NAME
    task: str
    normaliser: str  # of the rate that the leaderboard compares


def parse(value: str) -> Benchmark | None:
    """Read OWNER/NAME:TASK or OWNER/NAME:TASK:NORMALIZER; `None` if it is neither.

    >>> parse("google/fleurs:mr_in")
    Benchmark(dataset='google/fleurs', task='mr_in', normaliser='raw')
    >>> parse("google/fleurs:mr_in:whisper_basic").normaliser, parse("fleurs:mr"), parse("a/b")
    ('whisper_basic', None, None)
    """
    dataset, _, rest = value.partition(":")
    task, _, normaliser = rest.partition(":")
    normaliser = normaliser or "raw"
    if not is_repo(dataset) or not re.fullmatch(r"[\w.-]+", task) or normaliser not in NORMALISERS:
        return None
    return Benchmark(dataset, task, normaliser)


def rules(value: str, *, has_card: bool) -> list[tuple[bool, str]]:
    """Rules of `cli.refuse` for --benchmark; none is broken where it is empty."""
    option = f"--benchmark {value}:"
    return [
        (
            bool(value) and parse(value) is None,
            f"{option} give OWNER/NAME:TASK of a benchmark, or OWNER/NAME:TASK:NORMALIZER "
            f"with one of {', '.join(NORMALISERS)}",
        ),
        (
            bool(value) and not has_card,
            f"{option} goes with a model card: score all of --split test, with --model_card true",
        ),
    ]


def write_entries(value: str, folder: Path, cards: dict[str, Path]) -> list[str]:
    """Write the entry of every system that has a card, beside the card.

    Args:
        value: of --benchmark; empty: nothing is written.
        folder: of wer.json.
        cards: the card of each system, README.md unless its folder cannot be written.

    Returns:
        Lines to print: a file each, or why there is none.
    """
    if not value:
        return []
    results = json.loads((folder / "wer.json").read_text(encoding="utf-8"))
    benchmark, lines = parse(value), []
    for name, card in cards.items():
        text = render(benchmark, results, name)
        if text is None:
            lines.append(f"--benchmark {value}: no WER {benchmark.normaliser} in these languages")
            continue
        parts = [*benchmark.dataset.split("/"), benchmark.task]
        parts += [] if card.name == "README.md" else [name]
        path = card.parent / FOLDER / f"{'_'.join(parts)}.yaml"
        try:
            path.parent.mkdir(exist_ok=True)
            write_text(path, text)
        except OSError as error:
            lines.append(f"{path}: cannot be written ({first_line(error)})")
        else:
            lines.append(f"leaderboard entry {path}")
    return lines


def render(benchmark: Benchmark, results: dict[str, Any], name: str) -> str | None:
    """The YAML of a system's word error rate; `None` where it has none under this normalizer."""
    own, config = results[name], results["recipe"]["config"]
    rates = own["normalisers"].get(benchmark.normaliser)
    if rates is None:
        return None
    low, high = rates.get("wer_interval") or (None, None)
    interval = f", 95 % interval {low:.2f} to {high:.2f}" if low is not None else ""
    entry = EvalResultEntry(
        dataset_id=benchmark.dataset,
        task_id=benchmark.task,
        value=round(rates["wer"], 2),
        notes=f"WER {benchmark.normaliser} in per cent (by {rates['unit']}){interval}; "
        f"{own['clips']} clips; beams: {config['num_beams']}, window: {own['window']}",
    )
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, width=1000)
