"""Progress of long work: a bar on a terminal, a line every 15 seconds elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
LINE_EVERY_SECONDS = 15.0


def track(items: Iterable[T], *, total: int | None, what: str, quiet: bool = False) -> Iterator[T]:
    """Yield `items` and show how many are done.

    Args:
        items: to iterate over.
        total: their number; `None` if it is not known.
        what: label of the progress.
        quiet: show nothing, for all processes but the first.
    """
    if quiet:
        yield from items
        return
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=what, dynamic_ncols=True)
        return
    of_total = "" if total is None else f"/{total}"
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last >= LINE_EVERY_SECONDS:
            print(f"{what}: {done}{of_total} after {now - start:.0f} s", flush=True)
            last = now
        yield item
