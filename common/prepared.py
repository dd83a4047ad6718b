"""The prepared dataset on disk: written batch by batch, memory-mapped back.

`OUTPUT_DIR/{train,validation,test}/` are what `datasets.load_from_disk` reads: Arrow stream files
in small record batches, and two JSON files. They are written with pyarrow directly, because
`Dataset.save_to_disk` would need the whole corpus in a dataset of its own first. `preprocess.json`
is written last: a folder without it is not finished.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common import files
from common.cli import UserError

SPLITS = ("train", "validation", "test")
RECIPE_NAME = "preprocess.json"
FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "audio": datasets.Value("binary"),  # FLAC, 16 kHz, mono
        "seconds": datasets.Value("float64"),
        "text": datasets.Value("string"),
        "labels": datasets.List(datasets.Value("int32")),
        "language": datasets.Value("string"),
        "speaker": datasets.Value("string"),
    }
)
BATCH_ROWS = 64  # of a record batch: the least that is mapped at once
FILE_BYTES = 400 * 2**20  # a file is closed when it has reached this: one S3 object, one mmap


# ------ writing


@dataclass
class SplitWriter:
    """The files of one split, being written."""

    folder: Path
    file_bytes: int = FILE_BYTES
    buffered: list[pa.RecordBatch] = field(default_factory=list)
    num_files: int = 0
    num_rows: int = 0
    num_bytes: int = 0
    sink: BinaryIO | None = None
    stream: pa.RecordBatchStreamWriter | None = None


def add_rows(writer: SplitWriter, batch: pa.RecordBatch) -> None:
    """Append rows (columns as in FEATURES); they reach the disk in batches of BATCH_ROWS."""
    writer.buffered.append(batch)
    if sum(part.num_rows for part in writer.buffered) >= BATCH_ROWS:
        _flush(writer, BATCH_ROWS)


def _flush(writer: SplitWriter, least: int) -> None:
    """Write whole batches of BATCH_ROWS, and the rest as well if it is `least` rows or more."""
    table = pa.Table.from_batches(writer.buffered).combine_chunks()
    writer.buffered = []
    for batch in table.to_batches(max_chunksize=BATCH_ROWS):
        if batch.num_rows < least:
            writer.buffered.append(batch)
            continue
        if writer.stream is None:
            writer.folder.mkdir(parents=True, exist_ok=True)
            writer.sink = (writer.folder / _name(writer.num_files)).open("wb")
            writer.stream = pa.ipc.new_stream(writer.sink, FEATURES.arrow_schema)
            writer.num_files += 1
        writer.stream.write_batch(batch)
        writer.num_rows += batch.num_rows
        if writer.sink.tell() >= writer.file_bytes:
            _close_file(writer)


def _name(number: int) -> str:
    """A file's name while it is written: the last says how many there are."""
    return f"data-{number:05d}.arrow"


def _close_file(writer: SplitWriter) -> None:
    writer.stream.close()
    writer.num_bytes += writer.sink.tell()
    writer.sink.flush()
    os.fsync(writer.sink.fileno())
    writer.sink.close()
    writer.stream = writer.sink = None


def close_split(writer: SplitWriter, fingerprint: str) -> None:
    """Write what is buffered and the JSON files; a split without rows leaves no folder.

    Args:
        writer: its `num_rows` and `num_bytes` are final afterwards.
        fingerprint: 16 hex digits that name the content, for the caches of `datasets`.
    """
    if writer.buffered:
        _flush(writer, 1)
    if writer.stream is not None:
        _close_file(writer)
    total = writer.num_files
    names = [f"data-{number:05d}-of-{total:05d}.arrow" for number in range(total)]
    for number, name in enumerate(names):
        (writer.folder / _name(number)).rename(writer.folder / name)
    if names:
        _write_state(writer.folder, names, fingerprint)


def _write_state(folder: Path, names: list[str], fingerprint: str) -> None:
    """Write the JSON files that make a split of Arrow files, in this order."""
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": folder.name,
    }
    info = {"citation": "", "description": "", "features": FEATURES.to_dict()}
    files.write_json(folder / "state.json", state)
    files.write_json(folder / "dataset_info.json", {**info, "homepage": "", "license": ""})


# ------ reading


def read_recipe(data_dir: Path) -> dict[str, Any] | None:
    """`preprocess.json` of a folder; `None` where there is none that preprocess.py wrote."""
    try:
        recipe = json.loads((data_dir / RECIPE_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return recipe if isinstance(recipe, dict) and "config" in recipe else None


def load_prepared(
    data_dir: str, option: str = "--data_dir"
) -> tuple[datasets.DatasetDict, dict[str, Any]]:
    """Memory-map what preprocess.py wrote.

    Returns:
        The splits that exist, and the content of `preprocess.json`.

    Raises:
        UserError: no such folder, one that preprocess.py did not write or did not finish, or files
            missing or damaged since.
    """
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise UserError(f"{option} {data_dir} does not exist: give the folder preprocess.py wrote")
    recipe = read_recipe(folder)
    if recipe is None:
        raise UserError(
            f"{option} {data_dir} holds no readable {RECIPE_NAME}, so preprocess.py did not write "
            "or finish it: give its --output_dir"
        )
    try:
        return datasets.DatasetDict.load_from_disk(str(folder)), recipe
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{option} {data_dir} is incomplete or damaged ({reason}): "
            "copy it again or run preprocess.py again"
        ) from error


def column(dataset: datasets.Dataset, name: str) -> np.ndarray:
    """A column of numbers or strings as an array (rows,); no other column is read."""
    return _arrow_column(dataset, name).to_numpy()


def label_lengths(dataset: datasets.Dataset) -> np.ndarray:
    """Number of labels of every row, int32 (rows,), from the list offsets alone."""
    return pc.list_value_length(_arrow_column(dataset, "labels")).to_numpy()


def _arrow_column(dataset: datasets.Dataset, name: str) -> pa.ChunkedArray:
    """A column in the dataset's order, `select` and `shard` included."""
    return dataset.with_format("arrow").select_columns(name)[:][name]
