"""What a result was made with: options, library versions and git commit, to lie beside it."""

import importlib.metadata
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")


def recipe(config: Any) -> dict[str, Any]:
    """Describe a run: `config` is the script's dataclass of options."""
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {
        "config": asdict(config),
        "versions": {"python": platform.python_version(), **versions},
        "commit": git_commit(),
    }


def git_commit() -> str:
    """The commit of the scripts, with `+` when they were changed since; empty outside git."""
    folder = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        return commit + "+" if commit and git("status", "--porcelain", "-uno") else commit
    except FileNotFoundError:  # no git on this machine
        return ""
