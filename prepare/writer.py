"""Writes one split of the prepared dataset, batch by batch.

The Arrow files are written with pyarrow, because `Dataset.save_to_disk` would first need the whole
corpus as a dataset of its own. `datasets.load_from_disk` reads the result.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from common import files
from common.prepared import FEATURES

BATCH_ROWS = 64  # rows in a record batch, the smallest unit that a reader maps
FILE_BYTES = 400 * 2**20  # a file that reaches this size is closed: one S3 object, one mmap


@dataclass
class SplitWriter:
    """A split that is being written: its open file, and the rows that wait for a whole batch."""

    folder: Path
    file_bytes: int = FILE_BYTES
    buffered: list[pa.RecordBatch] = field(default_factory=list)
    num_files: int = 0
    num_rows: int = 0
    num_bytes: int = 0
    sink: BinaryIO | None = None
    stream: pa.RecordBatchStreamWriter | None = None


def add_rows(writer: SplitWriter, batch: pa.RecordBatch) -> None:
    """Append rows (columns as in FEATURES); they are written in batches of BATCH_ROWS."""
    writer.buffered.append(batch)
    if sum(waiting.num_rows for waiting in writer.buffered) >= BATCH_ROWS:
        _flush(writer, min_rows=BATCH_ROWS)


def close_split(writer: SplitWriter, fingerprint: str) -> None:
    """Write the remaining rows and the JSON files; a split without rows leaves no folder.

    Args:
        writer: its `num_rows` and `num_bytes` are final afterwards.
        fingerprint: 16 hex digits that name the content, for the caches of `datasets`.
    """
    if writer.buffered:
        _flush(writer, min_rows=1)
    if writer.stream is not None:
        _close_file(writer)
    total = writer.num_files
    names = [f"data-{number:05d}-of-{total:05d}.arrow" for number in range(total)]
    for number, name in enumerate(names):
        (writer.folder / _partial_name(number)).rename(writer.folder / name)
    if names:
        _write_state(writer.folder, names, fingerprint)


def _flush(writer: SplitWriter, min_rows: int) -> None:
    """Write batches of BATCH_ROWS; keep the last one if it has fewer than `min_rows` rows."""
    table = pa.Table.from_batches(writer.buffered).combine_chunks()
    writer.buffered = []
    for batch in table.to_batches(max_chunksize=BATCH_ROWS):
        if batch.num_rows < min_rows:
            writer.buffered.append(batch)
            continue
        if writer.stream is None:
            _open_file(writer)
        writer.stream.write_batch(batch)
        writer.num_rows += batch.num_rows
        if writer.sink.tell() >= writer.file_bytes:
            _close_file(writer)


def _open_file(writer: SplitWriter) -> None:
    writer.folder.mkdir(parents=True, exist_ok=True)
    writer.sink = (writer.folder / _partial_name(writer.num_files)).open("wb")
    writer.stream = pa.ipc.new_stream(writer.sink, FEATURES.arrow_schema)
    writer.num_files += 1


def _close_file(writer: SplitWriter) -> None:
    writer.stream.close()
    writer.num_bytes += writer.sink.tell()
    writer.sink.flush()
    os.fsync(writer.sink.fileno())
    writer.sink.close()
    writer.stream = writer.sink = None


def _partial_name(number: int) -> str:
    """The name of a file until the number of files, which is part of its final name, is known."""
    return f"data-{number:05d}.arrow"


def _write_state(folder: Path, names: list[str], fingerprint: str) -> None:
    """Write the JSON files that `datasets` needs beside the Arrow files `names`, in this order."""
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
