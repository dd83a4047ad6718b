"""Files and folders that are either whole or not there: written aside, flushed, renamed.

SageMaker copies the folder of a run to S3 while the run writes it, and puts markers beside the
files. What it is not to copy has a name that ends in `.sagemaker-ignore`.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

IGNORED = ".sagemaker-ignore"
PARTIAL = f".partial{IGNORED}"  # what is being written
OLD = f".old{IGNORED}"  # what is being removed
MARKERS = (".sagemaker-uploading", ".sagemaker-uploaded", IGNORED)  # no results
REMOVAL_TRIES = 50
REMOVAL_PAUSE_SECONDS = 0.1


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 `text` to `path` at once."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` at once."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.write_bytes(content)
        _flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Write `value` as JSON, text as it is."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def has_content(folder: Path) -> bool:
    """Whether something stands where `folder` is to be written; an empty folder does not."""
    return any(folder.iterdir()) if folder.is_dir() else folder.exists()


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`, which takes its place when the block succeeds.

    A block that fails leaves `folder` as it was; what a killed run left is removed first.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    _remove_tree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in partial.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # a marker that is gone again
                _flush(path)
        _flush(partial)
        old = _set_aside(folder)
        partial.rename(folder)
        _remove_tree(old)
        _flush(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder, out of the sight of whoever reads it; half of it is never there."""
    _remove_tree(_set_aside(folder))


def _set_aside(folder: Path) -> Path:
    """Rename `folder`, if it is there, to what is about to be removed."""
    old = folder.with_name(folder.name + OLD)
    _remove_tree(old)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(old)
    return old


def _remove_tree(folder: Path) -> None:
    """Remove a folder although files appear and vanish in it meanwhile; a link or a file, too."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    for _ in range(REMOVAL_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(REMOVAL_PAUSE_SECONDS)
    shutil.rmtree(folder)  # once more: now it says what is in the way


def _flush(path: Path) -> None:
    """Have the disk hold what was written to a file or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
