"""The prepared dataset on disk, memory-mapped.

`FOLDER/{train,validation,test}/` are what `datasets.load_from_disk` reads: Arrow stream files in
small record batches, and two JSON files. `preprocess.json` is the record of the preparation. It is
written last: a folder without it is not finished.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common.cli import UserError, first_line

SPLITS = ("train", "validation", "test")
RECORD_NAME = "preprocess.json"
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


def read_record(data_dir: Path) -> dict[str, Any] | None:
    """`preprocess.json` of a folder; `None` if there is none, or preprocess.py did not write it."""
    try:
        record = json.loads((data_dir / RECORD_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "config" in record else None


def load_prepared(
    data_dir: str, option: str = "--data_dir"
) -> tuple[datasets.DatasetDict, dict[str, Any]]:
    """Memory-map a prepared dataset.

    Args:
        data_dir: folder that preprocess.py wrote.
        option: named in error messages.

    Returns:
        The splits that exist, and the record of the preparation (`preprocess.json`).

    Raises:
        UserError: the folder does not exist, preprocess.py did not write or finish it, or files
            have been lost or damaged since.
    """
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise UserError(f"{option} {data_dir} does not exist: give the folder preprocess.py wrote")
    record = read_record(folder)
    if record is None:
        raise UserError(
            f"{option} {data_dir} holds no readable {RECORD_NAME}, so preprocess.py did not write "
            "or finish it: give its --output_dir"
        )
    try:
        return datasets.DatasetDict.load_from_disk(str(folder)), record
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{option} {data_dir} is incomplete or damaged ({first_line(error)}): "
            "copy it again or run preprocess.py again"
        ) from error


def column(dataset: datasets.Dataset, name: str) -> np.ndarray:
    """A column of numbers or strings as an array (rows,), without reading the other columns."""
    return _arrow_column(dataset, name).to_numpy()


def label_lengths(dataset: datasets.Dataset) -> np.ndarray:
    """Number of labels of each row, int32 (rows,), from the list offsets alone."""
    return pc.list_value_length(_arrow_column(dataset, "labels")).to_numpy()


def audio_hashes(dataset: datasets.Dataset) -> np.ndarray:
    """A hash of each clip's samples as they are stored, uint64 (rows,); 0 if it is unknown.

    It is the first half of the MD5 of the samples, which FLAC holds in its first block
    (RFC 9639, section 8.2): no audio is decoded.
    """
    halves = pc.binary_slice(_arrow_column(dataset, "audio"), 26, 34)
    padded = b"".join(half.ljust(8, b"\0") for half in halves.to_pylist())
    return np.frombuffer(padded, "<u8").astype(np.uint64)


def hash64(data: bytes) -> int:
    """64 bits; two of 10 million different clips collide with a probability of 3 in a million."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _arrow_column(dataset: datasets.Dataset, name: str) -> pa.ChunkedArray:
    """A column in the order of the dataset, after `select` and `shard` too."""
    return dataset.with_format("arrow").select_columns(name)[:][name]
