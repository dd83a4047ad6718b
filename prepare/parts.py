"""The working files between the two passes, and from them the final ones.

A part is one Arrow stream file with one record batch: the rows of the prepared dataset, kept and
dropped ones, and beside them what decides about duplicates and splits.
"""

import json
import os
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common import files, progress
from common.prepared import (
    FEATURES,
    SPLITS,
    SplitWriter,
    add_rows,
    close_split,
)
from prepare.clips import REASONS
from prepare.splits import FACTS, hash64, repeats

SCHEMA = pa.schema(
    [
        *FEATURES.arrow_schema,
        ("split", pa.uint8()),
        ("reason", pa.uint8()),
        ("detail", pa.string()),
        *((name, pa.uint64()) for name in ("id_hash", "pcm_hash", "text_hash", "speaker_hash")),
    ]
)


PART_CLIPS = 64  # prepared, and on a restart kept, together; only the last part has fewer


def write(path: Path, records: list[dict[str, Any]]) -> None:
    """Write records of SCHEMA; the file is whole, and on the disk, or absent."""
    partial = path.with_suffix(f".{os.getpid()}")
    with partial.open("wb") as file:
        with pa.ipc.new_stream(file, SCHEMA) as stream:
            stream.write_batch(pa.RecordBatch.from_pylist(records, schema=SCHEMA))
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def read(path: Path) -> pa.RecordBatch:
    """Map a part's one batch; columns that are not touched are not read."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_stream(file).read_next_batch()


def read_facts(path: Path, num_prompt_tokens: int) -> np.ndarray:
    """What the second pass needs of a part: FACTS (clips,)."""
    part = read(path)
    facts = np.zeros(part.num_rows, FACTS)
    for name in ("id_hash", "pcm_hash", "text_hash", "speaker_hash", "seconds", "split", "reason"):
        facts[name] = part.column(name).to_numpy()
    lengths = part.column("labels").value_lengths().to_numpy()
    facts["tokens"] = np.maximum(lengths - num_prompt_tokens, 0)
    return facts


def kept_languages(path: Path) -> set[str]:
    """Language codes of a part's clips that nothing is wrong with."""
    part = read(path)
    return set(
        pc.unique(part.column("language").filter(pc.equal(part.column("reason"), 0))).to_pylist()
    )


def _final_ids(paths: list[Path], facts: np.ndarray) -> Iterator[tuple[pa.RecordBatch, list[str]]]:
    """Yield each part with its clips' ids, `#2`, `#3` ... after those that came before.

    A repeated id takes the next number that makes no id of the source, so that what a clip is named
    follows from its id, how often that came before, and all ids.
    """
    numbers: dict[str, Iterator[int]] = {}
    number_before, hashes, at = repeats(facts["id_hash"]), np.unique(facts["id_hash"]), 0
    for path in paths:
        part = read(path)
        ids = part.column("id").to_pylist()
        for row in np.flatnonzero(number_before[at : at + len(ids)]):
            name = ids[row]
            if name not in numbers:
                numbers[name] = islice(
                    _free_numbers(name, hashes), number_before[at + row] - 1, None
                )
            ids[row] = f"{name}#{next(numbers[name])}"
        at += len(ids)
        yield part, ids


def _free_numbers(name: str, sorted_hashes: np.ndarray) -> Iterator[int]:
    return (number for number in count(2) if not _holds(sorted_hashes, f"{name}#{number}"))


def source_id(paths: list[Path], row: int) -> str:
    """What the source calls a row."""
    part, at = divmod(row, PART_CLIPS)
    return read(paths[part]).column("id")[at].as_py()


def _holds(sorted_hashes: np.ndarray, name: str) -> bool:
    value = np.uint64(hash64(name.encode()))
    at = np.searchsorted(sorted_hashes, value)
    return at < len(sorted_hashes) and sorted_hashes[at] == value


def write_splits(
    paths: list[Path], facts: np.ndarray, originals: dict[int, int], folder: Path, identity: str
) -> int:
    """Stream the parts into the final files and `dropped.jsonl`.

    Args:
        paths: the parts, in the order of the source.
        facts: FACTS (clips,), decided.
        originals: row of a clip that is dropped for its audio -> row of the one that is kept.
        folder: where to; it exists.
        identity: what the content is made of, for the caches of `datasets`.

    Returns:
        Bytes of the final Arrow files.
    """
    with (folder / "dropped.jsonl").open("w", encoding="utf-8") as dropped:
        writers = _stream(paths, facts, originals, folder, dropped)
    for name, writer in writers.items():
        close_split(writer, f"{hash64(f'{identity} {name}'.encode()):016x}")
    names = [name for name, writer in writers.items() if writer.num_rows]
    files.write_json(folder / "dataset_dict.json", {"splits": names})
    return sum(writer.num_bytes for writer in writers.values())


def _stream(
    paths: list[Path],
    facts: np.ndarray,
    originals: dict[int, int],
    folder: Path,
    dropped: TextIO,
) -> dict[str, SplitWriter]:
    """Write kept clips to their splits, whose files are still open, and lines on the others."""
    writers = {name: SplitWriter(folder / name) for name in SPLITS}
    at, columns = 0, FEATURES.arrow_schema.names
    parts_and_ids = _final_ids(paths, facts)
    for part, ids in progress.track(parts_and_ids, total=len(paths), what="parts written"):
        here = facts[at : at + len(ids)]
        part = part.set_column(0, "id", pa.array(ids))
        for code, writer in enumerate(writers.values(), start=1):
            mask = (here["reason"] == 0) & (here["split"] == code)
            if mask.any():
                add_rows(writer, part.select(columns).filter(pa.array(mask)))
        for row in np.flatnonzero(here["reason"]):
            detail = part.column("detail")[row].as_py()
            if at + row in originals:
                detail = f"same audio as {source_id(paths, originals[at + row])}"
            line = {"id": ids[row], "reason": REASONS[here["reason"][row]], "detail": detail}
            dropped.write(json.dumps(line, ensure_ascii=False) + "\n")
        at += len(ids)
    return writers
