"""One clip as its source gives it, and the names that sources give to splits."""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import PurePath

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    **dict.fromkeys(
        ("validation", "valid", "validate", "val", "dev", "eval", "evaluation"), "validation"
    ),
}


@dataclass(frozen=True)
class Row:
    """One clip as the source gives it; no audio has been opened yet."""

    id: str  # not unique yet
    path: str = ""  # audio file
    audio: bytes = b""  # content of the audio file, if a Hub dataset holds it
    text: str = ""
    split: str = ""  # train, validation, test or nothing
    speaker: str = ""
    language: str = ""  # as the source spells it
    start_seconds: float = 0.0
    end_seconds: float | None = None
    channel: str = ""  # as the source writes it
    channels: tuple[int, ...] = ()  # which of the file's it may be, from 0; none: their mean
    problem: str = ""  # why the row cannot be used, a member of REASONS
    detail: str = ""  # of the problem

    def key(self) -> bytes:
        """Bytes that change when the row or its audio file (size, modification time) changes."""
        facts = asdict(replace(self, audio=b""))
        facts["audio"] = hashlib.sha256(self.audio).hexdigest() if self.audio else ""
        try:
            stat = os.stat(self.path) if self.path else None  # noqa: PTH116 (a hot loop)
            facts["file"] = [stat.st_size, stat.st_mtime_ns] if stat else None
        except OSError:  # whoever reads the audio reports it
            facts["file"] = None
        return json.dumps(facts, sort_keys=True).encode()


def split_of(name: str) -> str:
    """train for `Train`, `train.clean.100` and `train-other`; `""` for `other`."""
    return SPLIT_NAMES.get(re.split(r"[-_. ]", name.lower())[0], "")


def split_from_folders(path: PurePath, root: PurePath) -> str:
    """The split that the first folder below `root` on the way to `path` is named after, or `""`."""
    folders = path.relative_to(root).parts[:-1] if path.is_relative_to(root) else ()
    return next((split_of(name) for name in folders if split_of(name)), "")


def is_inside(path: str, real_root: str) -> bool:
    """Whether a path is in `real_root`, a path without links, once its own links are followed."""
    return os.path.realpath(path).startswith(real_root.rstrip("/") + "/")
