"""Where shards of one preparation leave messages for each other: a folder that all see, or S3."""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from common import files
from common.cli import UserError
from prepare import s3

T = TypeVar("T")
Place = Path | str  # a folder, or s3://BUCKET/PREFIX
LONGEST_PAUSE_SECONDS = 10.0  # between two looks; the first ones follow each other faster
LINE_EVERY_SECONDS = 60.0


def put(place: Place, name: str, content: bytes) -> None:
    """Leave a message, which is whole or absent."""
    if isinstance(place, str):
        s3.put(place, name, content)
        return
    place.mkdir(parents=True, exist_ok=True)
    files.write_bytes(place / name, content)


def get(place: Place, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of those messages that are there."""
    if isinstance(place, str):
        yield from s3.get(place, names)
        return
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            yield name, (place / name).read_bytes()


def remove(place: Place) -> None:
    """Remove all messages."""
    if isinstance(place, str):
        s3.remove(place)
    else:
        shutil.rmtree(place, ignore_errors=True)


def wait(
    place: Place, names: list[str], minutes: float, read: Callable[[bytes], T | None]
) -> list[T]:
    """Wait until there is a message of every name; what `read` makes of them, in this order.

    Args:
        place: where to look.
        names: of the messages, shard 0's first.
        minutes: how long to wait.
        read: `None` for a message that its shard has yet to replace.

    Raises:
        UserError: some did not come in time.
    """
    found: dict[str, T] = {}
    start, pause, next_line = time.monotonic(), 0.1, 0.0
    while True:
        for name, content in get(place, [name for name in names if name not in found]):
            value = read(content)
            if value is not None:
                found[name] = value
        missing = ", ".join(str(at) for at, name in enumerate(names) if name not in found)
        seconds = time.monotonic() - start
        if not missing:
            return [found[name] for name in names]
        if seconds >= 60 * minutes:
            raise UserError(
                f"--shard_wait_minutes {minutes:g}: of {len(names)} shards these are not as far: "
                f"{missing}: start them (again), then this one again; finished parts are kept"
            )
        if seconds >= next_line:
            print(f"waiting for shards {missing} after {seconds:.0f} s", flush=True)
            next_line = seconds + LINE_EVERY_SECONDS
        pause = min(1.5 * pause, LONGEST_PAUSE_SECONDS)
        time.sleep(min(pause, max(60 * minutes - seconds, 0)))
