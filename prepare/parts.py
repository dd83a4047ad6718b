"""Parts: the working files between the two passes.

A part is an Arrow stream file with one record batch. Its rows are those of the prepared dataset,
dropped ones included, with the columns that decide about duplicates and splits beside them.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common.prepared import FEATURES
from prepare.splits import FACTS

PART_CLIPS = 64  # clips that are prepared, and kept for a restart, together; the last has fewer
SCHEMA = pa.schema(
    [
        *FEATURES.arrow_schema,
        ("split", pa.uint8()),
        ("reason", pa.uint8()),  # index into REASONS
        ("detail", pa.string()),
        *((name, pa.uint64()) for name in ("id_hash", "pcm_hash", "text_hash", "speaker_hash")),
    ]
)


def write(path: Path, records: list[dict[str, Any]]) -> None:
    """Write records of SCHEMA; the file is complete and flushed to disk, or absent."""
    partial = path.with_suffix(f".{os.getpid()}")
    with partial.open("wb") as file:
        with pa.ipc.new_stream(file, SCHEMA) as stream:
            stream.write_batch(pa.RecordBatch.from_pylist(records, schema=SCHEMA))
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def read(path: Path) -> pa.RecordBatch:
    """Map a part's record batch; columns that are not used are not read."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_stream(file).read_next_batch()


def read_all_facts(paths: list[Path], num_prompt_tokens: int) -> np.ndarray:
    """What the second pass knows of all clips: FACTS (clips,)."""
    return np.concatenate([_read_facts(path, num_prompt_tokens) for path in paths])


def _read_facts(path: Path, num_prompt_tokens: int) -> np.ndarray:
    part = read(path)
    facts = np.zeros(part.num_rows, FACTS)
    for name in ("id_hash", "pcm_hash", "text_hash", "speaker_hash", "seconds", "split", "reason"):
        facts[name] = part.column(name).to_numpy()
    lengths = part.column("labels").value_lengths().to_numpy()
    facts["tokens"] = np.maximum(lengths - num_prompt_tokens, 0)
    return facts


def read_languages(path: Path) -> set[str]:
    """Language codes of the clips of a part that the first pass kept."""
    part = read(path)
    kept = part.column("language").filter(pc.equal(part.column("reason"), 0))
    return set(pc.unique(kept).to_pylist())


def source_id(paths: list[Path], row: int) -> str:
    """The id that the source gives a row, which is counted over all parts."""
    index, row_in_part = divmod(row, PART_CLIPS)
    return read(paths[index]).column("id")[row_in_part].as_py()
