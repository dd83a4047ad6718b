"""Second pass: the parts are streamed into the final files, once splits and drops are decided."""

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
import pyarrow as pa

from common import files, languages, progress
from common.cli import UserError
from common.prepared import FEATURES, SPLITS, hash64
from prepare import parts
from prepare.reasons import REASONS, UNKNOWN_LANGUAGE
from prepare.splits import repeats
from prepare.writer import SplitWriter, add_rows, close_split


def refuse_empty_result(facts: np.ndarray, paths: list[Path], source_name: str) -> None:
    """Raise UserError if no clip is kept; the parts are removed, for they are of no use.

    The message counts the reasons and quotes the first clip.
    """
    if (facts["reason"] == 0).any():
        return
    counts = Counter(facts["reason"].tolist()).most_common()
    reasons = ", ".join(f"{count} {REASONS[code]}" for code, count in counts)
    first = parts.read(paths[0]).select(["id", "detail", "reason"]).slice(0, 1).to_pylist()[0]
    detail = first["detail"] or REASONS[first["reason"]]
    remedy = "correct the source"
    if REASONS[first["reason"]] == UNKNOWN_LANGUAGE:
        remedy = f"--language: {languages.advice(languages.find_code(detail) or detail)}"
    for path in paths:
        path.unlink(missing_ok=True)
    raise UserError(
        f"--source {source_name} leaves none of its {len(facts)} clips ({reasons}; the first, "
        f"{first['id']}: {detail}): {remedy}"
    )


def write_splits(
    paths: list[Path], facts: np.ndarray, originals: dict[int, int], folder: Path, identity: str
) -> int:
    """Stream the parts into the final files and `dropped.jsonl`.

    Args:
        paths: the parts, in the order of the source.
        facts: FACTS (clips,), decided.
        originals: row of a clip that is dropped for its audio -> row of the clip that is kept.
        folder: an existing folder to write to.
        identity: names the content, for the caches of `datasets`.

    Returns:
        Bytes of the final Arrow files.
    """
    writers = {name: SplitWriter(folder / name) for name in SPLITS}
    with (folder / "dropped.jsonl").open("w", encoding="utf-8") as dropped:
        row = 0
        renamed_parts = progress.track(
            _with_unique_ids(paths, facts), total=len(paths), what="parts written"
        )
        for part in renamed_parts:
            part_facts = facts[row : row + part.num_rows]
            _write_kept(part, part_facts, writers)
            for index in np.flatnonzero(part_facts["reason"]):
                original = originals.get(row + index)
                same = None if original is None else parts.source_id(paths, original)
                _write_dropped(dropped, part, int(index), part_facts["reason"][index], same)
            row += part.num_rows
    for name, writer in writers.items():
        close_split(writer, f"{hash64(f'{identity} {name}'.encode()):016x}")
    names = [name for name, writer in writers.items() if writer.num_rows]
    files.write_json(folder / "dataset_dict.json", {"splits": names})
    return sum(writer.num_bytes for writer in writers.values())


def _write_kept(part: pa.RecordBatch, facts: np.ndarray, writers: dict[str, SplitWriter]) -> None:
    """Append the kept clips of a part to their splits."""
    for code, writer in enumerate(writers.values(), start=1):
        mask = (facts["reason"] == 0) & (facts["split"] == code)
        if mask.any():
            rows = part.select(FEATURES.arrow_schema.names).filter(pa.array(mask))
            add_rows(writer, rows)


def _write_dropped(
    file: TextIO, part: pa.RecordBatch, index: int, reason: int, same_audio: str | None
) -> None:
    """Write a line about a dropped clip; `same_audio` is the id of the clip that is kept for it."""
    line = {
        "id": part.column("id")[index].as_py(),
        "reason": REASONS[reason],
        "detail": part.column("detail")[index].as_py(),
    }
    if same_audio is not None:
        line["detail"] = f"same audio as {same_audio}"
    file.write(json.dumps(line, ensure_ascii=False) + "\n")


# ------ unique ids


def final_ids(paths: list[Path], facts: np.ndarray) -> Iterator[str]:
    """Yield the id of every clip, dropped ones included, as the prepared dataset has it."""
    for part in _with_unique_ids(paths, facts):
        yield from part.column("id").to_pylist()


def _with_unique_ids(paths: list[Path], facts: np.ndarray) -> Iterator[pa.RecordBatch]:
    """Yield the parts; a repeated id gets the suffix `#2`, `#3` and so on.

    The suffix is the next number that makes no id of the source. So a clip's final id follows from
    its id, the number of times it has occurred before, and the set of all ids.
    """
    free_numbers: dict[str, Iterator[int]] = {}
    num_before, hashes, row = repeats(facts["id_hash"]), np.unique(facts["id_hash"]), 0
    for path in paths:
        part = parts.read(path)
        ids = part.column("id").to_pylist()
        for index in np.flatnonzero(num_before[row : row + len(ids)]):
            name = ids[index]
            if name not in free_numbers:
                free_numbers[name] = itertools.islice(
                    _free_numbers(name, hashes), num_before[row + index] - 1, None
                )
            ids[index] = f"{name}#{next(free_numbers[name])}"
        row += len(ids)
        yield part.set_column(0, "id", pa.array(ids))


def _free_numbers(name: str, sorted_hashes: np.ndarray) -> Iterator[int]:
    """Yield 2, 3, ... but for those whose `name#number` is an id of the source."""
    for number in itertools.count(2):
        value = np.uint64(hash64(f"{name}#{number}".encode()))
        index = np.searchsorted(sorted_hashes, value)
        if index == len(sorted_hashes) or sorted_hashes[index] != value:
            yield number
