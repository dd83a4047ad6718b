"""The model card: README.md beside an adapter, from wer.json and what its training recorded.

The same results give the same bytes: neither clocks nor paths of the machine are in it, nor texts,
voices or names of speakers. A README.md that this file did not write, or that was edited since, is
kept.
"""

import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template, select_autoescape
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from common.cli import first_line
from common.files import write_text
from common.prepared import read_record as read_preparation
from common.provenance import hub_id, read_record
from evaluation.abilities import ability_rows, has_abilities
from evaluation.html_report import show_interval, show_p, signed, systems_of
from evaluation.leakage import leakage_shown

NAME = "README.md"
MARKER = "<!-- Written by eval_wer.py, sha256 of the lines above: "
HUB_CODES = {"jw": "jv"}  # Whisper's code for Javanese is not in ISO 639
KEY_OPTIONS = (
    "tune", "lora_rank", "lora_alpha", "lora_targets", "lora_scope", "lora_dropout",
    "nospeech_share", "learning_rate", "schedule", "warmup_ratio", "weight_decay",
    "global_batch_size", "quantize", "precision", "context", "seed",
)  # fmt: skip
# Options that change no weight, and those that name places of the machine.
OMITTED_OPTIONS = {
    "model", "data_dir", "output_dir", "cache_dir", "init_adapter", "max_minutes",
    "max_batch_seconds", "memory_gib", "save_every", "save_every_minutes", "keep_checkpoints",
    "log_every", "resume", "resume_changed", "collective_timeout", "num_workers",
}  # fmt: skip
BREAKDOWNS = {
    "duration": "duration of the clip", "language": "language",
    "unseen_words": "words unseen in training",
}  # fmt: skip


def write_cards(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Write a card for every scored adapter, or for a full fine-tune that was scored alone.

    Args:
        folder: of wer.json, and of a card whose adapter's folder cannot be written.

    Returns:
        The README.md of each system, which may be another program's, and lines to print.
    """
    results = json.loads((folder / "wer.json").read_text(encoding="utf-8"))
    config = results["recipe"]["config"]
    trained = results["adapters"]
    if not trained and read_record(config["model"], "--model"):
        trained = {"base": config["model"]}
    data = read_preparation(Path(config["data_dir"]).expanduser()) or {}
    cards, lines = {}, []
    for name, adapter in trained.items():
        path = Path(adapter) / NAME
        option = "--adapter" if results["adapters"] else "--model"
        record, own_name = read_record(adapter, option), Path(adapter).resolve().name
        text = render(results, name, record, data, own_name)
        reason = "" if is_own(path) else "was edited, or is another program's, and is kept"
        if not reason:
            try:
                write_text(path, text)
            except OSError as error:
                reason = f"cannot be written ({first_line(error)})"
        cards[name] = path
        if reason:
            elsewhere = folder / f"model_card_{name}.md"
            write_text(elsewhere, text)
            lines.append(f"{path} {reason}: model card {elsewhere}")
            cards[name] = path if path.is_file() and not is_own(path) else elsewhere
        else:
            lines.append(f"model card {path}")
    return cards, lines


def is_own(path: Path) -> bool:
    """Whether a card can be overwritten: there is none, or it is as `render` wrote it."""
    try:
        text, marker, digest = path.read_text(encoding="utf-8").rpartition(MARKER)
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False
    return bool(marker) and digest == f"{digest_of(text)} -->\n"


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ------ the card


@functools.cache
def template() -> Template:
    """card.md.j2, compiled."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(),  # not in Markdown: others' words go through `plain`
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "interval": show_interval, "p_value": show_p, "signed": signed, "plain": plain,
        "quoted": quoted,
    }  # fmt: skip
    return environment.get_template("card.md.j2")


def render(
    results: dict[str, Any],
    name: str,
    record: dict[str, Any] | None,
    data: dict[str, Any],
    folder: str,
) -> str:
    """The card of a system, as a function of nothing but its arguments.

    Args:
        results: content of wer.json.
        name: of the system.
        record: its recipe.json; `None` for an adapter that was trained elsewhere.
        data: preprocess.json of the scored clips.
        folder: name of the adapter's folder.
    """
    config, systems = results["recipe"]["config"], systems_of(results)
    own, base = systems[name], systems.get("base") if name != "base" else None
    base_id, base_name = name_base(config["model"], record, is_adapter=name != "base")
    codes = [group["group"] for group in own["breakdown"].get("language", [])]
    repo = config.get("push_to_hub", "")
    shown = {"base": base, name: own} if base else {name: own}
    facts = {
        "kind": "adapter" if name != "base" else "fine-tune",
        "repo": repo or folder,
        "base_id": base_id,
        "base_name": base_name,
        "languages": [LANGUAGES.get(code, code).title() for code in codes],
        "code": codes[0] if codes else "",
        "task": data.get("config", {}).get("task", "transcribe"),
        "dataset": name_dataset(data),
        "license": config.get("license", ""),
    }
    text = template().render(
        facts,
        metadata=metadata(facts, own, codes, config["split"]),
        config=config,
        own=own,
        base=base,
        split=data.get("splits", {}).get(config["split"], {}),
        comparisons=[
            own for own in results.get("comparisons", []) if own["systems"] == ["base", name]
        ],
        bootstrap=results.get("bootstrap"),
        record=record,
        trained_on=(record or {}).get("data"),
        options=shown_options(record),
        breakdowns={
            title: groups
            for kind, title in BREAKDOWNS.items()
            if len(groups := own["breakdown"].get(kind, [])) > 1
        },
        nonspeech=nonspeech_rows(base, own) if "nonspeech" in own else [],
        abilities=ability_rows(shown) if has_abilities(shown) else [],
        leakage=leakage_shown(name, own).partition(": ")[2] if "leakage" in own else "",
        overlap=data.get("held_out_texts_in_training", 0),
        versions=results["recipe"]["versions"],
        commit=results["recipe"]["commit"],
    )
    return f"{text}{MARKER}{digest_of(text)} -->\n"


def metadata(facts: dict[str, Any], own: dict[str, Any], codes: list[str], split: str) -> str:
    """The card's YAML, as the Hub specifies it (hub-docs, modelcard.md): raw rates first."""
    is_adapter = facts["kind"] == "adapter"
    results = [
        EvalResult(
            task_type="automatic-speech-recognition",
            task_name="Speech recognition",
            dataset_type=facts["dataset"],
            dataset_name=facts["dataset"],
            dataset_split=split,
            metric_type=rate,
            metric_name=f"{rate.upper()} ({normaliser})",
            metric_value=round(rates[rate], 2),
        )
        for normaliser, rates in own["normalisers"].items()
        for rate in ("wer", "cer")
    ]
    return ModelCardData(
        language=[HUB_CODES.get(code, code) for code in codes],
        license=facts["license"] or "unknown",
        base_model=facts["base_id"] or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="automatic-speech-recognition",
        tags=["whisper", *(["lora"] if is_adapter else []), "speech-recognition"],
        metrics=["wer", "cer"],
        model_name=facts["repo"].rpartition("/")[2],
        eval_results=results,
    ).to_yaml()


def name_base(model: str, record: dict[str, Any] | None, *, is_adapter: bool) -> tuple[str, str]:
    """The base's id on the Hub, empty if it is a folder of this machine, and a name for it.

    An adapter was scored on `--model`, so that is its base; the base of a full fine-tune is in its
    record alone.
    """
    if is_adapter:
        return hub_id(model), hub_id(model) or Path(model).resolve().name
    known = (record or {}).get("base_id", "")
    return known, known or Path((record or {})["config"]["model"]).name


def name_dataset(data: dict[str, Any]) -> str:
    """The source of the clips: an id on the Hub, or the name of a folder or file."""
    source = data.get("config", {}).get("source", "")
    if data.get("source", {}).get("form") == "hub":
        return source
    return Path(source.rstrip("/")).name or "unnamed data"


def shown_options(record: dict[str, Any] | None) -> dict[str, Any]:
    """Options of the training: those that matter most, and all that differ from their defaults."""
    if record is None:
        return {}
    config = record["config"]
    names = [*KEY_OPTIONS, *(set(record.get("changed", [])) - set(KEY_OPTIONS))]
    if config.get("tune", "lora") != "lora":
        names = [name for name in names if not name.startswith("lora_")]
    shown = KEY_OPTIONS + tuple(sorted(set(names) - set(KEY_OPTIONS) - OMITTED_OPTIONS))
    return {name: config[name] for name in shown if name in names and name in config}


def nonspeech_rows(
    base: dict[str, Any] | None, own: dict[str, Any]
) -> list[tuple[str, dict[str, Any], dict[str, Any] | None]]:
    """What was written on clips without speech at each window, with that of the base."""
    beside = (base or {}).get("nonspeech", {})
    return [(window, counts, beside.get(window)) for window, counts in own["nonspeech"].items()]


def quoted(text: str) -> str:
    """A string of Python and JSON."""
    return json.dumps(text, ensure_ascii=False)


def plain(text: Any) -> str:
    """What others wrote, as one line without Markdown's and HTML's signs.

    >>> plain("a|b <i>\\n`c`")
    'a b i c'
    """
    return " ".join(re.sub(r"[|<>`*\[\]\\#&\s]+", " ", str(text)).split())
