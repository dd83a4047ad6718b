"""transcribe.json in the output folder: what its transcripts were made with; failed.jsonl."""

import json
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.files import PARTIAL, write_json, write_text
from common.provenance import describe_run
from transcription.output import is_finished
from transcription.recordings import Recording, changed
from transcription.runtimes import Runtime

FILE_NAME, FAILED_NAME = "transcribe.json", "failed.jsonl"
FREE = (  # may differ in a resumed run
    "audio", "output_dir", "formats", "batch_seconds", "manifest", "min_confidence", "min_language",
    "align", "min_match", "reference", "runtime",
)  # fmt: skip


def describe(config: Any, runtime: Runtime) -> dict[str, Any]:
    """What stands at the beginning of every json transcript."""
    return {
        "model": config.model,
        "adapter": config.adapter or None,
        "runtime": runtime.kind,
        "weights": runtime.weights,
        "window": runtime.window_mode,
        "precision": runtime.precision,
        "task": config.task,
    }


def open_folder(folder: Path, config: Any, runtime: Runtime) -> None:
    """Make the output folder and its record.

    Raises:
        UserError: it holds transcripts that were made with another model or other options.
    """
    decisive = {name: own for name, own in asdict(config).items() if name not in FREE}
    decisive |= {"weights": runtime.weights, "window": runtime.window_mode}
    file = folder / FILE_NAME
    if file.exists():
        try:
            before = json.loads(file.read_text(encoding="utf-8"))["decisive"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--output_dir {folder}: its {FILE_NAME} is damaged: give another folder"
            ) from error
        # An older version had fewer options: it worked by what is their default now.
        before = {own.name: own.default for own in fields(config)} | before
        changed = [name for name, own in decisive.items() if before.get(name) != own]
        if changed:
            name = changed[0]
            raise UserError(
                f"--output_dir {folder}: holds transcripts made with other options ({name} "
                f"{before.get(name)!r}, now {decisive[name]!r}): give another folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    for partial in folder.rglob(f"*{PARTIAL}"):  # of a run that was killed
        partial.unlink()
    write_json(file, describe_run(config) | {"decisive": decisive})


def read_failed(folder: Path) -> set[tuple[str, int]]:
    """Recordings that failed in an earlier run, each with when it was last changed."""
    file = folder / FAILED_NAME
    if not file.is_file():
        return set()
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return {(row["file"], row["changed"]) for row in rows}


def unfinished(
    groups: Iterable[list[Recording]], folder: Path, formats: list[str]
) -> list[list[Recording]]:
    """The groups that are left to do.

    A group is repeated as a whole, so that its bytes are the same, unless only recordings are left
    of it that failed before: these are tried again alone.
    """
    failed, left = read_failed(folder), []
    for group in groups:
        open_ones = [own for own in group if not is_finished(folder, own, formats)]
        if any((str(own.path), changed(own.path)) not in failed for own in open_ones):
            left.append(group)
        elif open_ones:
            left.append(open_ones)
    return left


def write_failed(folder: Path, failed: dict[Recording, str]) -> None:
    """List the recordings that failed, with reasons; no file where none did."""
    file = folder / FAILED_NAME
    if not failed:
        file.unlink(missing_ok=True)
        return
    rows = [
        {"file": str(own.path), "reason": reason, "changed": changed(own.path)}
        for own, reason in failed.items()
    ]
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
