"""The working files between the two passes, and from them the final ones.

A part is one Arrow stream file with one record batch: the rows of the prepared dataset, kept and
dropped ones, and beside them what decides about duplicates and splits.
"""

import json
import os
from collections.abc import Iterator
from io import StringIO
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
    close_files,
    close_split,
    write_state,
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


def _final_ids(
    paths: list[Path], facts: np.ndarray, first_row: int
) -> Iterator[tuple[pa.RecordBatch, list[str]]]:
    """Yield each part with its clips' ids, `#2`, `#3` ... after those that came before.

    A repeated id takes the next number that makes no id of the source, so that what a clip is named
    follows from its id, how often that came before, and all ids.
    """
    numbers: dict[str, Iterator[int]] = {}
    number_before, hashes, at = repeats(facts["id_hash"]), np.unique(facts["id_hash"]), first_row
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


def source_id(paths: list[Path], row: int) -> str | None:
    """What the source calls a row, counted from the first of these parts; `None` outside them."""
    part, at = divmod(row, PART_CLIPS)
    return read(paths[part]).column("id")[at].as_py() if 0 <= part < len(paths) else None


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
        close_split(writer, _fingerprint(identity, name))
    _write_names(folder, [name for name, writer in writers.items() if writer.num_rows])
    return sum(writer.num_bytes for writer in writers.values())


def write_shard(
    paths: list[Path],
    facts: np.ndarray,
    originals: dict[int, int],
    folder: Path,
    first_row: int,
    shard: str,
) -> dict[str, Any]:
    """Stream one shard's parts into files of its own.

    Args:
        paths: the shard's parts.
        facts: FACTS (clips,), decided, of all shards.
        originals: as in `write_splits`, of all shards.
        folder: where to; other shards may write there too.
        first_row: of the shard among all.
        shard: its part of the files' names.

    Returns:
        What `join_shards` needs of it.
    """
    for path in folder.glob(f"*/data-{shard}-*"):  # of a run that was killed while it wrote
        path.unlink()
    dropped = StringIO()
    writers = _stream(paths, facts, originals, folder, dropped, first_row, shard)
    files_of = {name: close_files(writer) for name, writer in writers.items()}
    ids = {row: source_id(paths, row - first_row) for row in set(originals.values())}
    return {
        "files": files_of,
        "clips": {name: writer.num_rows for name, writer in writers.items()},
        "bytes": sum(writer.num_bytes for writer in writers.values()),
        "ids": {row: name for row, name in ids.items() if name is not None},
        "dropped": dropped.getvalue(),
    }


def join_shards(shards: list[dict[str, Any]], folder: Path, identity: str) -> int:
    """Write what makes one dataset of the shards' files, and `dropped.jsonl`; bytes of the files.

    Args:
        shards: what `write_shard` said, as JSON gives it back, in the order of the shards.
        folder: of the dataset.
        identity: as in `write_splits`.
    """
    ids = {row: name for shard in shards for row, name in shard["ids"].items()}
    with (folder / "dropped.jsonl").open("w", encoding="utf-8") as dropped:
        for line in (json.loads(line) for shard in shards for line in StringIO(shard["dropped"])):
            if isinstance(line["detail"], int):
                line["detail"] = _same_audio(ids[str(line["detail"])])
            _write_line(dropped, line)
    used = [name for name in SPLITS if any(shard["clips"][name] for shard in shards)]
    for name in used:
        names = [file for shard in shards for file in shard["files"][name]]
        write_state(folder / name, names, _fingerprint(identity, name))
    _write_names(folder, used)
    return sum(shard["bytes"] for shard in shards)


def _stream(
    paths: list[Path],
    facts: np.ndarray,
    originals: dict[int, int],
    folder: Path,
    dropped: TextIO,
    first_row: int = 0,
    shard: str = "",
) -> dict[str, SplitWriter]:
    """Write kept clips to their splits, whose files are still open, and lines on the others.

    The detail of a clip whose original is in another shard is that one's row.
    """
    writers = {name: SplitWriter(folder / name, shard=shard) for name in SPLITS}
    at, columns = first_row, FEATURES.arrow_schema.names
    parts_and_ids = _final_ids(paths, facts, first_row)
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
                original = originals[at + row]
                name = source_id(paths, original - first_row)
                detail = original if name is None else _same_audio(name)
            reason = REASONS[here["reason"][row]]
            _write_line(dropped, {"id": ids[row], "reason": reason, "detail": detail})
        at += len(ids)
    return writers


def _same_audio(name: str) -> str:
    return f"same audio as {name}"


def _write_line(file: TextIO, line: dict[str, Any]) -> None:
    file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _fingerprint(identity: str, split: str) -> str:
    return f"{hash64(f'{identity} {split}'.encode()):016x}"


def _write_names(folder: Path, names: list[str]) -> None:
    files.write_json(folder / "dataset_dict.json", {"splits": names})
