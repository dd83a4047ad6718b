"""Clips that --exclude names: those that `eval_wer.py --audit` suspects, or any list of ids."""

import csv
import hashlib
import io
from pathlib import Path

import numpy as np

from common.cli import UserError, first_line
from common.spreadsheet import unprotect
from prepare.reasons import EXCLUDED, REASONS
from prepare.second_pass import final_ids
from prepare.tables import SEPARATOR_LINE, SEPARATORS

REMEDY = "give a CSV in UTF-8 with a column named id, such as the audit.csv of eval_wer.py"


def read_ids(name: str) -> frozenset[str]:
    """The ids of a CSV, whatever its separator; none if `name` is empty.

    Args:
        name: --exclude.

    Raises:
        UserError: the file cannot be read, or has no column named id.
    """
    if not name:
        return frozenset()
    try:
        with Path(name).expanduser().open(encoding="utf-8-sig", newline="") as file:
            content = file.read()
        first, _, rest = content.partition("\n")
        marked = SEPARATOR_LINE.fullmatch(first)
        for separator in (marked[1],) if marked else SEPARATORS:
            table = io.StringIO(rest if marked else content)
            rows = csv.reader(table, delimiter=separator, strict=True)
            header = [cell.strip().lower() for cell in next(rows, [])]
            if "id" in header:
                position = header.index("id")
                cells = (row[position].strip(" ") for row in rows if len(row) > position)
                return frozenset(unprotect(cell) for cell in cells if cell)
    except OSError as error:
        raise UserError(f"--exclude {name}: cannot be read ({error.strerror}): {REMEDY}") from error
    except (ValueError, csv.Error) as error:
        raise UserError(f"--exclude {name}: is damaged ({first_line(error)}): {REMEDY}") from error
    raise UserError(f"--exclude {name}: has no column named id: {REMEDY}")


def describe(ids: frozenset[str]) -> str:
    """What stands for the ids among the options that decide the content; empty for none.

    >>> describe(frozenset(["a", "b"]))
    '2 ids, 7e18f737311b2dc3'
    """
    if not ids:
        return ""
    digest = hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()
    return f"{len(ids)} ids, {digest[:16]}"


def drop(paths: list[Path], facts: np.ndarray, ids: frozenset[str], name: str) -> dict[str, int]:
    """Mark the clips with these ids as dropped, in place, and count the ids.

    It comes after duplicates and splits are decided: no other clip changes its place for it.

    Args:
        paths: the parts, in the order of the source.
        facts: FACTS (clips,), decided.
        ids: final ids, as the prepared dataset has them.
        name: --exclude.

    Returns:
        How many ids are given, and how many are of a clip that is now `excluded`, that was
        `dropped_before` for another reason, or of none (`unknown`).

    Raises:
        UserError: no clip would be left.
    """
    counts = {"ids": len(ids), "excluded": 0, "dropped_before": 0}
    for row, clip_id in enumerate(final_ids(paths, facts) if ids else ()):
        if clip_id in ids:
            counts["dropped_before" if facts["reason"][row] else "excluded"] += 1
            facts["reason"][row] = facts["reason"][row] or REASONS.index(EXCLUDED)
    if not (facts["reason"] == 0).any():
        raise UserError(f"--exclude {name}: names every clip that is left: give fewer ids")
    return counts | {"unknown": len(ids) - counts["excluded"] - counts["dropped_before"]}
