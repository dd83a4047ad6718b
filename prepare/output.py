"""The output folder: whether it holds this preparation already, and the lock on its working folder.

The dataset is written in OUTPUT_DIR.partial and appears by one rename.
"""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import prepared
from common.cli import UserError


def read_finished(
    output_dir: str, options: dict[str, Any], source_name: str, source_sha256: str
) -> dict[str, Any] | None:
    """The record of a finished preparation with the same options; `None` if there is no output.

    Args:
        output_dir: --output_dir.
        options: that decide what is written.
        source_name: --source.
        source_sha256: of its tables.

    Raises:
        UserError: the folder holds anything else, or cannot be replaced.
    """
    folder, place = Path(output_dir).expanduser(), f"--output_dir {output_dir}"
    if folder.is_file():
        raise UserError(f"{place} is a file: give a folder")
    if folder.is_mount():
        raise UserError(
            f"{place} is a mount point, which cannot be replaced by a rename: give a folder in it"
        )
    if not folder.exists() or not any(folder.iterdir()):
        return None
    record = prepared.read_record(folder)
    if record is None:
        raise UserError(f"{place} holds files that preprocess.py did not write: give a new folder")
    _refuse_other_preparation(record, place, options)
    if record["source"]["sha256"] != source_sha256:
        raise UserError(
            f"{place} was prepared from --source {source_name} before its tables changed: "
            "give another folder or remove it"
        )
    return record


def _refuse_other_preparation(record: dict[str, Any], place: str, options: dict[str, Any]) -> None:
    differing = [
        f"--{key} ({record['config'].get(key, '')!r} there, {value!r} here)"
        for key, value in options.items()
        if record["config"].get(key, "") != value  # records from before --exclude lack it
    ]
    if differing:
        raise UserError(
            f"{place} holds another preparation: {', '.join(differing)} differ: "
            "give another folder or remove it"
        )


@contextlib.contextmanager
def locked(work: Path, output_dir: str) -> Iterator[None]:
    """Create the working folder and hold a lock on it, which ends with the process in any case.

    Raises:
        UserError: the folder cannot be written, or another process holds the lock.
    """
    try:
        work.mkdir(parents=True, exist_ok=True)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UserError(
            f"--output_dir {output_dir} cannot be written ({error}): give another"
        ) from error
    with (work / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"--output_dir {output_dir} is being written by another preprocess.py: wait for it"
            ) from error
        try:
            yield
        except UserError:
            if not any(work.glob("parts/*.arrow")):
                shutil.rmtree(work)  # nothing worth keeping for a restart
            raise


def empty_result(work: Path) -> Path:
    """An empty folder in the working folder; what a killed run left there is removed."""
    result = work / "result"
    shutil.rmtree(result, ignore_errors=True)
    result.mkdir()
    return result
