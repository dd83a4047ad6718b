"""Files and folders that are complete or absent: written under another name, flushed, renamed.

SageMaker copies the folder of a run to S3 while the run writes it, and puts markers beside the
files. It does not copy files whose names end in `.sagemaker-ignore`.
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
MARKERS = (".sagemaker-uploading", ".sagemaker-uploaded", IGNORED)  # files that are no results
REMOVAL_TRIES = 50
REMOVAL_PAUSE_SECONDS = 0.1


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8; `path` is complete or as before."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content`; `path` is complete or as before."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.write_bytes(content)
        _flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Write `value` as JSON, without escapes for letters beyond ASCII."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def has_content(folder: Path) -> bool:
    """Whether `folder` has content, or is a file."""
    return any(folder.iterdir()) if folder.is_dir() else folder.exists()


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`, which takes its place when the block succeeds.

    If the block fails, `folder` stays as it was. What a killed run left is removed first.
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
    """Remove a folder; readers see all of it or nothing, because it is renamed first."""
    _remove_tree(_set_aside(folder))


def _set_aside(folder: Path) -> Path:
    """Rename `folder`, if it exists, to the name under which it is removed."""
    old = folder.with_name(folder.name + OLD)
    _remove_tree(old)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(old)
    return old


def _remove_tree(folder: Path) -> None:
    """Remove a folder, a link or a file, even if files appear and vanish in it meanwhile."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    for _ in range(REMOVAL_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(REMOVAL_PAUSE_SECONDS)
    shutil.rmtree(folder)  # once more, to raise the error


def _flush(path: Path) -> None:
    """Flush the content of a file, or the list of names of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
