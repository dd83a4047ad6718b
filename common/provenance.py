"""What a result was made with: options, library versions and git commit."""

import importlib.metadata
import json
import os
import platform
import subprocess
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from common.cli import UserError

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")


def describe_run(config: Any) -> dict[str, Any]:
    """Describe a run with its options, the script's dataclass `config`."""
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {
        "config": asdict(config),
        "changed": [own.name for own in fields(config) if getattr(config, own.name) != own.default],
        "versions": {"python": platform.python_version(), **versions},
        "commit": git_commit(),
    }


def read_record(folder: str, option: str) -> dict[str, Any] | None:
    """What train_lora.py wrote beside an adapter or a model; `None` for one trained elsewhere."""
    file = Path(folder) / "recipe.json"
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{option} {folder}: its recipe.json is damaged ({error}): copy it again, or remove "
            "it to score at 30 seconds"
        ) from error
    is_ours = isinstance(record, dict) and {"base_probe", "window"} <= record.keys()
    return record if is_ours else None  # written by another program


def hub_id(model: str) -> str:
    """The id of a model on the Hub; empty for a folder of this machine."""
    return "" if Path(model).expanduser().exists() else model


def git_commit() -> str:
    """The commit of the scripts, with `+` if they have uncommitted changes.

    Outside a git checkout it is GIT_COMMIT, which docker/Dockerfile sets, or empty.
    """
    folder = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        changed = commit and git("status", "--porcelain", "-uno")
    except FileNotFoundError:  # no git on this machine
        commit = changed = ""
    return commit + "+" if changed else commit or os.environ.get("GIT_COMMIT", "")
