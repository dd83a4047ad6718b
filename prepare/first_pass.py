"""First pass: each clip on its own. Rows are cut into parts, which a pool of workers prepares."""

import functools
import hashlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from common import labels, progress
from common.cli import UserError
from prepare import clips, parts
from prepare.rows import Row


@dataclass(frozen=True)
class PendingPart:
    """A part that is being prepared, or is finished where it has no `job`."""

    path: Path
    num_clips: int
    job: Future[None] | None


@functools.cache
def cached_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `model`, loaded once per process."""
    return labels.load_tokenizer(model)


def prepare_clips(
    rows: Iterator[Row],
    num_rows: int | None,
    folder: Path,
    *,
    settings: bytes,
    options: clips.ClipOptions,
    num_workers: int,
) -> list[Path]:
    """Prepare all clips; parts that `folder` already holds are not prepared again.

    Args:
        rows: of the source.
        num_rows: their number, for the progress; `None` if it is not known.
        folder: of the parts.
        settings: all that decides, beside its rows, what a part contains; it is hashed.
        options: how clips are labelled, checked and stored.
        num_workers: processes; with 1 the work is done in this process.

    Returns:
        The parts, in the order of the source.
    """
    folder.mkdir(exist_ok=True)
    num_finished = len(list(folder.glob("*.arrow")))
    if num_finished:
        print(
            f"continuing: {num_finished} parts of {parts.PART_CLIPS} clips were finished before",
            flush=True,
        )
    paths: list[Path] = []

    def finished_clips() -> Iterator[int]:
        for path, num_clips in _prepare_parts(rows, folder, settings, options, num_workers):
            paths.append(path)
            yield from range(num_clips)

    for _ in progress.track(finished_clips(), total=num_rows, what="clips prepared"):
        pass
    return paths


def _prepare_parts(
    rows: Iterator[Row],
    folder: Path,
    settings: bytes,
    options: clips.ClipOptions,
    num_workers: int,
) -> Iterator[tuple[Path, int]]:
    """Yield the file and the number of clips of every part, in the source's order."""
    pending: deque[PendingPart] = deque()
    with _open_pool(num_workers, options.model) as pool:
        while part := list(itertools.islice(rows, parts.PART_CLIPS)):
            path = folder / part_name(part, settings)
            pending.append(PendingPart(path, len(part), _start(part, path, options, pool)))
            if len(pending) > num_workers + 2:  # bounds memory: a row of a Hub dataset holds audio
                yield wait_for(pending.popleft(), num_workers)
        while pending:
            yield wait_for(pending.popleft(), num_workers)


def part_name(rows: list[Row], settings: bytes) -> str:
    """A file name that changes when the rows, their audio files or the settings do."""
    digest = hashlib.sha256(settings)
    for row in rows:
        digest.update(row.key())
    return f"{digest.hexdigest()[:32]}.arrow"


def _open_pool(num_workers: int, model: str) -> Any:
    """A context manager for the pool of workers; for `None` if one process is enough."""
    if num_workers == 1:
        return nullcontext()
    pool = ProcessPoolExecutor(num_workers, initializer=_start_worker)
    pool.submit(cached_tokenizer, model)  # forks all workers before reading starts threads
    return pool


def _start_worker() -> None:
    """Exit when the parent exits, even if it is killed; leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _start(
    rows: list[Row], path: Path, options: clips.ClipOptions, pool: ProcessPoolExecutor | None
) -> Future[None] | None:
    """Prepare a part in the pool, or now if there is none; `None` once it is finished."""
    if path.exists():
        return None
    if pool is not None:
        return pool.submit(prepare_part, rows, path, options)
    prepare_part(rows, path, options)
    return None


def prepare_part(rows: list[Row], path: Path, options: clips.ClipOptions) -> None:
    """Prepare clips and write them to `path`, which is complete or absent."""
    tokenizer = cached_tokenizer(options.model)
    parts.write(path, [clips.prepare_clip(row, options, tokenizer) for row in rows])


def wait_for(part: PendingPart, num_workers: int) -> tuple[Path, int]:
    """The file and the number of clips of a part, once it is finished.

    Raises:
        UserError: a worker was killed.
    """
    try:
        if part.job:
            part.job.result()
    except BrokenProcessPool as error:
        raise UserError(
            f"--num_workers {num_workers}: a worker was killed, perhaps for lack of memory: "
            "give fewer workers and run again; finished clips are kept"
        ) from error
    return part.path, part.num_clips
