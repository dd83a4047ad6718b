"""report.html: an evaluation on one page, written from wer.json and predictions.jsonl.

The page makes no request: scripts, styles, charts and voices are in it, and its Content Security
Policy allows only what has the hashes of its own script and style. The same results give the same
bytes: neither clocks nor paths of the machine are on it.
"""

import base64
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from common.audio import decode_flac
from common.files import write_text
from common.prepared import column
from evaluation import charts, diff, nonspeech, voices
from evaluation.abilities import ability_rows, has_abilities
from evaluation.scores import WORST_CLIPS

NAME = "report.html"
BREAKDOWNS = {
    "duration": "By duration", "speaker": "By speaker", "language": "By language",
    "unseen_words": "By words not seen in training",
}  # fmt: skip
CURVES = (
    ({"loss": "training", "eval_loss": "validation"}, "loss per label token"),
    ({"wer_raw": "validation"}, "raw WER, %"),
)


@dataclass(frozen=True)
class Transcript:
    """What one system wrote for a clip."""

    system: str
    diff: diff.Diff
    hit_cap: bool
    decoded_again: bool
    loops: bool
    logprob: float | None  # average of the tokens


@dataclass
class Clip:
    """A row of the page's table."""

    index: int  # in predictions.jsonl or nonspeech.jsonl
    id: str
    seconds: float
    language: str
    speaker: str
    reference: str
    transcripts: list[Transcript]
    tags: list[str] = field(default_factory=list)  # the filters that show it
    voice: str = ""  # data: URI
    kind: str = ""  # of a clip of the panel

    @property
    def errors(self) -> int:
        """Word errors of the last system."""
        return self.transcripts[-1].diff.errors

    @property
    def change(self) -> int:
        """Word errors of the last system less those of the first."""
        return self.errors - self.transcripts[0].diff.errors


def write_report(
    folder: Path,
    dataset: Dataset,
    *,
    adapters: dict[str, str],
    audio_mb: float,
    panel: Dataset | None = None,
) -> str:
    """Write report.html beside wer.json and predictions.jsonl; return its headline and address.

    Args:
        dataset: the scored clips, for their audio.
        adapters: folder of each system's adapter, by the system's name; empty for the base.
        audio_mb: megabytes of voices at most; 0 leaves them out.
        panel: the clips of nonspeech.jsonl, if there are any, for their audio.
    """
    results = json.loads((folder / "wer.json").read_text(encoding="utf-8"))
    systems = list(systems_of(results))
    clips = read_clips(read_rows(folder / "predictions.jsonl"), systems)
    left = add_voices(clips, dataset, audio_mb)
    invented = []
    if panel is not None:
        invented = read_invented(read_rows(folder / nonspeech.FILE_NAME), systems)
        add_voices(invented, panel, left)
    runs = {
        name: read_metrics(Path(adapter).parent / "metrics.jsonl")
        for name, adapter in adapters.items()
        if adapter
    }
    path = folder / NAME
    write_text(path, render(results, clips, runs, invented))
    return f"{headline(results)}\nreport {path.resolve().as_uri()}"


def systems_of(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The scored systems of wer.json, by name."""
    return {
        name: value
        for name, value in results.items()
        if name != "also" and isinstance(value, dict) and "normalisers" in value
    }


def headline(results: dict[str, Any]) -> str:
    """`raw WER: base 164.7 [150.2, 179.9], adapter 68.7 [60.1, 77.5]`."""
    rates = []
    for name, system in systems_of(results).items():
        raw = system["normalisers"]["raw"]
        shown = f"{name} {raw['wer']:.1f}{show_interval(raw.get('wer_interval'))}"
        if raw.get("wer_interval_clips"):  # few speakers, who may happen to be alike
            shown += f" (over clips{show_interval(raw['wer_interval_clips'])})"
        rates.append(shown)
    return f"raw WER: {', '.join(rates)}"


# ------ clips


def read_rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def read_clips(rows: Sequence[dict[str, Any]], systems: Sequence[str]) -> list[Clip]:
    """Rows of predictions.jsonl as clips, those with the most errors of the last system first."""
    clips = []
    for index, row in enumerate(rows):
        transcripts = [
            Transcript(
                system=name,
                diff=diff.compare(row["text"], row[name]),
                hit_cap=row[f"{name}_hit_cap"],
                decoded_again=row[f"{name}_decoded_again"],
                loops=row[f"{name}_loops"],
                logprob=row.get(f"{name}_logprob"),
            )
            for name in systems
        ]
        clip = Clip(
            index, row["id"], row["seconds"], row["language"], row.get("speaker") or "",
            row["text"], transcripts,
        )  # fmt: skip
        clips.append(clip)
    clips.sort(key=lambda clip: (-clip.errors, clip.id))
    for rank, clip in enumerate(clips):
        if rank < WORST_CLIPS and clip.errors:
            clip.tags.append("worst")
        if clip.change:
            clip.tags.append("improved" if clip.change < 0 else "worsened")
        if any(transcript.loops or transcript.hit_cap for transcript in clip.transcripts):
            clip.tags.append("looping")
    return clips


def read_invented(rows: Sequence[dict[str, Any]], systems: Sequence[str]) -> list[Clip]:
    """Rows of nonspeech.jsonl for which a system invented a text, as clips."""
    columns = [(name, window) for name in systems for window in nonspeech.WINDOWS]
    clips = []
    for index, row in enumerate(rows):
        if not any(row[f"{name}_{window}_invented"] for name, window in columns):
            continue
        transcripts = [
            Transcript(
                system=f"{name}, {window} window",
                diff=diff.compare(row["text"], row[f"{name}_{window}"]),
                hit_cap=False,
                decoded_again=False,
                loops=row[f"{name}_{window}_loops"],
                logprob=None,
            )
            for name, window in columns
        ]
        clip = Clip(
            index, row["id"], row["seconds"], row["language"], "", row["text"], transcripts,
            kind=row["kind"],
        )  # fmt: skip
        clips.append(clip)
    return clips


def add_voices(clips: Sequence[Clip], dataset: Dataset, megabytes: float) -> float:
    """Give clips their audio, in their order, as long as it fits in so many megabytes.

    Returns:
        The megabytes that are left.
    """
    left = megabytes * 1e6
    rows = {str(name): row for row, name in enumerate(column(dataset, "id"))} if left else {}
    for clip in clips:
        if left <= 0 or clip.id not in rows:
            break
        uri = voices.data_uri(decode_flac(dataset[rows[clip.id]]["audio"]))
        if len(uri) > left:
            break
        clip.voice = uri
        left -= len(uri)
    return left / 1e6


# ------ the training run


def read_metrics(path: Path) -> list[dict[str, Any]] | None:
    """The records of a run; none if there is no such file, `None` if it cannot be read."""
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        records = [json.loads(line) for line in lines if line]
    except (OSError, ValueError):
        return None
    return records if all(isinstance(record, dict) for record in records) else None


def draw_run(records: list[dict[str, Any]] | None) -> list[Markup]:
    drawn = (charts.curves(records or [], keys, label) for keys, label in CURVES)
    return [chart for chart in drawn if chart]


# ------ groups of clips


def breakdowns_of(systems: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Groups of clips by kind of group and system, with a title and the groups in order."""
    tables = {}
    for kind, title in BREAKDOWNS.items():
        rows: dict[str, dict[str, dict[str, Any]]] = {}
        for name, system in systems.items():
            for group in system["breakdown"].get(kind, []):
                rows.setdefault(str(group["group"]), {})[name] = group
        if rows:
            tables[kind] = {"title": title, "rows": rows}
    return tables


def draw_durations(table: dict[str, Any], systems: Sequence[str]) -> Markup:
    rates = {
        name: [
            (own[name]["wer"], own[name].get("wer_interval")) if name in own else None
            for own in table["rows"].values()
        ]
        for name in systems
    }
    names = [
        f"{group} ({next(iter(own.values()))['clips']})" for group, own in table["rows"].items()
    ]
    return charts.groups(names, rates)


# ------ the panel


def panel_of(systems: dict[str, dict[str, Any]], invented: Sequence[Clip]) -> dict[str, Any] | None:
    """Counts by kind of clip, for each system and window, and the first clip of each kind."""
    columns = {
        (name, window): rates
        for name, system in systems.items()
        for window, rates in system.get("nonspeech", {}).items()
    }
    if not columns:
        return None
    kinds = {}
    for rates in columns.values():
        for row in rates["kinds"]:
            kinds.setdefault(row["kind"], []).append(row)
    return {
        "columns": list(columns),
        "totals": list(columns.values()),
        "kinds": kinds,
        "rows": {clip.kind: clip.index for clip in reversed(invented)},
    }


# ------ the page


@functools.cache
def template() -> Template:
    """report.html.j2, compiled."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"signed": signed, "interval": show_interval, "p_value": show_p}
    return environment.get_template("report.html.j2")


def render(
    results: dict[str, Any],
    clips: Sequence[Clip],
    runs: dict[str, list[dict[str, Any]] | None],
    invented: Sequence[Clip] = (),
) -> str:
    """The page, as a function of nothing but its arguments.

    Args:
        results: content of wer.json.
        clips: in the order of the table, with their voices.
        runs: the training records of each adapter, `None` where they cannot be read.
        invented: clips of the panel that got words that nobody spoke, with their audio.
    """
    systems, config = systems_of(results), results["recipe"]["config"]
    names = list(systems)
    tables = breakdowns_of(systems)
    panel = panel_of(systems, invented)
    dots = None
    if len(names) > 1:
        pairs = [(clip.transcripts[0].diff.wer, clip.transcripts[-1].diff.wer) for clip in clips]
        dots = charts.dots(pairs, names[0], names[-1])
    has_logprob = any(own.logprob is not None for clip in clips for own in clip.transcripts)
    parts = {name: read_part(f"report.{name}") for name in ("css", "js")}
    parts["css"] += label_cells(names, has_logprob)
    parts["start"] = 'document.documentElement.className = "js";'  # before the table is laid out
    also = {name: (own, systems_of(own)) for name, own in results.get("also", {}).items()}
    examined = [(config["split"], systems), *((name, own) for name, (_, own) in also.items())]
    return template().render(
        results=results,
        config=config,
        model=Path(config["model"]).name,  # no path of this machine
        systems=systems,
        names=names,
        headline=headline(results),
        clips=clips,
        minutes=sum(clip.seconds for clip in clips) / 60,
        counts={tag: sum(tag in clip.tags for clip in clips) for tag in filters(names)}
        | ({"invented": len(invented)} if panel else {}),
        panel=panel,
        invented=invented,
        correlations={
            name: own["logprob_error_correlation"]
            for name, own in systems.items()
            if own.get("logprob_error_correlation") is not None
        },
        has_logprob=has_logprob,
        num_voices=sum(bool(clip.voice and clip.reference) for clip in (*clips, *invented)),
        dots=dots,
        durations=draw_durations(tables["duration"], names) if "duration" in tables else None,
        tables=tables,
        also=also,
        abilities=[
            (name, next(iter(own.values()))["abilities"]["clips"], ability_rows(own))
            for name, own in examined
            if has_abilities(own)
        ],
        runs={name: (records, draw_run(records)) for name, records in runs.items()},
        parts={name: Markup(text) for name, text in parts.items()},  # noqa: S704 - our own files
        hashes={name: content_hash(text) for name, text in parts.items()},
    )


def filters(systems: Sequence[str]) -> list[str]:
    compared = ["improved", "worsened"] if len(systems) > 1 else []
    return ["worst", *compared, "looping"]


def read_part(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def label_cells(systems: Sequence[str], has_logprob: bool) -> str:
    """Style that names each cell of a clip on narrow screens, which show no headings of columns.

    In the style sheet once: as attributes of each cell, labels were a tenth of the page.
    """
    labels = ["seconds", *(f"WER {name}" for name in systems)]
    labels += ["change" if len(systems) > 1 else "errors"] + ["log-probability"] * has_logprob
    rules = []
    for number, label in enumerate(labels, start=2):
        text = re.sub(r"[^\w -]", lambda match: f"\\{ord(match[0]):x} ", label)
        rules.append(f'.clips td:nth-child({number}):not(:empty)::before {{ content: "{text} "; }}')
    return "\n".join(["@media (max-width: 50rem) {", *rules, "}\n"])


def content_hash(text: str) -> str:
    """What a Content Security Policy allows a script or style by."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def signed(value: float, digits: int = 0) -> str:
    """A number with its sign, a true minus; 0 has none."""
    text = f"{value:+.{digits}f}"
    return text.lstrip("+-") if not float(text) else text.replace("-", "−")


def show_interval(interval: Sequence[float] | None) -> str:
    """` [150.2, 179.9]`, empty where none is known."""
    if not interval:
        return ""
    low, high = (f"{value:.1f}".replace("-", "−") for value in interval)
    return f" [{low}, {high}]"


def show_p(value: float) -> str:
    """`p = 0.013`; a value so small that the number of replicas limits it is a bound."""
    return f"p = {value:.2g}" if value > 0.001 else f"p ≤ {max(value, 0.0001):.1g}"
