"""The record of a preparation, `preprocess.json`: what decided the content, and what came of it."""

import contextlib
import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
from soundfile import __libsndfile_version__ as libsndfile_version
from transformers import PreTrainedTokenizerBase

from common import files, labels
from common.prepared import RECORD_NAME
from common.provenance import git_commit

LIBRARIES = ("datasets", "numpy", "pyarrow", "soundfile", "soxr", "tokenizers", "transformers")


def describe_settings(
    options: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """All that decides, beside the source, what is written."""
    return {
        "config": options,
        "tokenizer_fingerprint": labels.tokenizer_fingerprint(tokenizer),
        "labels": labels.VERSION,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of what decodes, resamples and tokenizes; `av` may be absent."""
    libraries = {name: importlib.metadata.version(name) for name in LIBRARIES}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        libraries["av"] = importlib.metadata.version("av")
    return {"python": platform.python_version(), "libsndfile": libsndfile_version, **libraries}


def serialize(settings: dict[str, Any]) -> bytes:
    """The settings as bytes, for hashes; names of parts depend on them."""
    return json.dumps(settings, sort_keys=True).encode()


def identify(settings: dict[str, Any], facts: np.ndarray) -> str:
    """A digest that names the content that settings and facts make."""
    digest = hashlib.sha256(serialize(settings))
    digest.update(facts.view(np.uint8))
    return digest.hexdigest()


def write(
    folder: Path,
    settings: dict[str, Any],
    source: dict[str, str],
    languages: set[str],
    report: dict[str, Any],
) -> dict[str, Any]:
    """Write `preprocess.json`, which must come after all other files, and return its content.

    Args:
        folder: of the prepared dataset.
        settings: of `describe_settings`.
        source: the source's form, and the sha256 of its tables.
        languages: codes.
        report: of `report.describe`.
    """
    about = {"commit": git_commit(), "source": source, "languages": sorted(languages)}
    record = {**settings, **about, **report}
    files.write_json(folder / RECORD_NAME, record)
    return record
