"""Output folders that are either whole or not there, and the JSON files in them."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import cli


def has_content(output_dir: Path) -> bool:
    """Whether something stands where `output_dir` is to be written; an empty folder does not."""
    if output_dir.is_dir():
        return any(output_dir.iterdir())
    return output_dir.exists()


@contextlib.contextmanager
def build(output_dir: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `output_dir`, which becomes it when the block succeeds.

    A block that fails leaves nothing behind; a leftover of a killed run is removed first.

    Raises:
        UserError: the folder cannot be made there.
    """
    target = output_dir.resolve()
    partial = target.with_name(f"{target.name}.partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise cli.UserError(
            f"--output_dir {output_dir} cannot be written ({error}): give a folder that can"
        ) from error
    try:
        yield partial
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, content: dict[str, Any], *, indent: int | None = 2) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=indent), encoding="utf-8")
