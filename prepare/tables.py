"""Tables of any dialect as a stream of records: csv with any separator, tsv, JSON of four shapes.

A record is a dict from column names, without case, spaces and punctuation (`column_name`), to
values. A row that cannot be read is the record `{"": why}`, so that it is counted.
"""

import codecs
import csv
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from common.cli import UserError
from prepare import ljspeech
from prepare.columns import PATH_COLUMNS, TEXT_COLUMNS, column_name, is_known

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
SEPARATORS = ",;\t|"
SEPARATOR_LINE = re.compile(r"sep=(.)\r?\n?")  # Excel's first line
QUOTED = re.compile(r'"(?:[^"]|"")*"')

UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
ENCODING_BYTES = 1 << 20  # that are looked at to see the encoding

OVER_LINES = "a cell runs over several lines: an unbalanced quote?"

Record = dict[str, Any]


def records(path: Path, *, quotes_are_text: bool = False) -> Iterator[Record]:
    """Yield each row of a table.

    Args:
        path: of the table.
        quotes_are_text: quotes in a tsv are part of the text, as in Common Voice.

    Raises:
        UserError: the table's encoding is not read, it lacks a column, or is JSON without rows.
    """
    try:
        with _open(path) as file:
            if is_json(path):
                yield from _json_records(file, path)
            else:
                rows = _separated_records(file, path, quotes_are_text)
                is_tsv = path.suffix.lower() == ".tsv" and not quotes_are_text
                yield from _without_halves(rows) if is_tsv else rows
    except UnicodeDecodeError as error:
        raise UserError(f"--source: {path} is damaged UTF-16 ({error}): save it again") from error


def layout_without_header(path: Path) -> ljspeech.Layout | None:
    """The layout of a table of speech synthesis that has no header, or `None`."""
    if is_json(path):
        return None
    with _open(path) as file:
        first = file.readline()
        if _named_separator(first, path):
            return None
        file.seek(0)
        return ljspeech.find_layout(file, path)


def _open(path: Path) -> TextIO:
    """Open a table that is UTF-8, or UTF-16 with a byte order mark, as Excel's Unicode text.

    Bytes that are not UTF-8 become lone surrogates, which `table_rows` reports row by row.

    Raises:
        UserError: the table has another encoding.
    """
    with path.open("rb") as file:
        head = file.read(ENCODING_BYTES)
    if head.startswith(UTF_16_MARKS) and head[2:4] != b"\0\0":
        return path.open(encoding="utf-16", newline="")
    if b"\0" in head[:1024]:
        raise UserError(
            f"--source: {path} is UTF-16 without a byte order mark, or UTF-32: save it as UTF-8, "
            f"or convert it: iconv -f UTF-16LE -t UTF-8 {path} > NEW{path.suffix}"
        )
    text = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(head)
    others = [sign for sign in text if sign > "\x7f"]
    bad = [sign for sign in others if "\udc80" <= sign <= "\udcff"]
    if len(bad) > len(others) // 2:
        line = text[: text.index(bad[0])].count("\n") + 1
        raise UserError(
            f"--source: {path} is not UTF-8 (byte 0x{ord(bad[0]) - 0xDC00:x} in line {line}): save "
            f"it as CSV UTF-8, or convert it, from the encoding that it has: iconv -f CP1252 "
            f"-t UTF-8 {path} > NEW{path.suffix}"
        )
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def is_json(path: Path) -> bool:
    """Whether a table is JSON, by its suffix."""
    return "json" in path.suffix.lower()


# ------ csv and tsv


def _separated_records(file: TextIO, path: Path, quotes_are_text: bool) -> Iterator[Record]:
    """Yield the rows of a csv or tsv.

    A tsv is read line by line, because an unbalanced quote in it is usually text, and would join
    all lines after it to one cell. Cells that a csv writer has quoted are unquoted.
    """
    layout = layout_without_header(path)
    if layout:
        yield from _records_without_header(file, layout)
        return
    separator, header = _read_header(file, path)
    is_tsv = separator == "\t" and path.suffix.lower() == ".tsv"
    if is_tsv:
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(file, delimiter=separator, skipinitialspace=True)
    is_common_voice = {"clientid", "sentence"} <= set(header)  # a table of it, given as a manifest
    rows = iter(reader)
    while True:
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield {"": str(error)}
            continue
        if not cells:
            continue
        if is_tsv and not quotes_are_text:
            cells = [_unquoted(cell, only_doubled=is_common_voice) for cell in cells]
        if len(cells) != len(header):
            yield {"": f"{len(cells)} cells under {len(header)} columns"}
        elif any("\n" in cell for cell in cells):
            yield {"": OVER_LINES}
        else:
            yield dict(zip(header, cells, strict=True))


def _read_header(file: TextIO, path: Path) -> tuple[str, list[str]]:
    """The separator and the names of the columns, from the first line or two."""
    first = file.readline()
    separator_line = SEPARATOR_LINE.fullmatch(first)
    if separator_line:
        first = file.readline()
    separator = separator_line[1] if separator_line else _separator(first, path)
    names = [cell.strip() for cell in next(csv.reader([first], delimiter=separator), [])]
    header = [column_name(name) for name in names]
    _check_header(header, names, path)
    return separator, header


def _records_without_header(file: TextIO, layout: ljspeech.Layout) -> Iterator[Record]:
    """Yield the rows of a table of speech synthesis, whose quotes are text."""
    for line in file:
        cells = [cell.strip() for cell in line.rstrip("\r\n").split(ljspeech.SEPARATOR)]
        if len(cells) != len(layout.header):
            if any(cells):
                yield {"": f"{len(cells)} cells, not {len(layout.header)} as in the first row"}
            continue
        record = dict(zip(layout.header, cells, strict=True))
        record.pop("", None)
        yield record | {"path": layout.path.format(record["path"])}


def _without_halves(rows: Iterator[Record]) -> Iterator[Record]:
    """Yield the rows of a tsv; the first line of a cell of several lines is no row."""
    before = next(rows, None)
    while before is not None:
        row = next(rows, None)
        is_open = any(str(cell).startswith('"') for cell in before.values())
        is_half = is_open and row is not None and row.keys() == {""} != before.keys()
        yield {"": OVER_LINES} if is_half else before
        before = row


def _separator(header: str, path: Path) -> str:
    """The separator with which the header has an audio path and a text, else the usual one."""
    return _named_separator(header, path) or _usual_separator(path)


def _usual_separator(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _named_separator(header: str, path: Path) -> str:
    """The separator with which a line has names of an audio path and of a text, or `""`."""
    for separator in (_usual_separator(path), *SEPARATORS):
        names = {column_name(name) for name in next(csv.reader([header], delimiter=separator), [])}
        if names & set(PATH_COLUMNS) and names & set(TEXT_COLUMNS):
            return separator
    return ""


def _check_header(header: list[str], names: list[str], path: Path) -> None:
    """Raise UserError if a column that is needed is missing, or two have the same name."""
    for role, known in (("an audio path", PATH_COLUMNS), ("a text", TEXT_COLUMNS)):
        if not set(header) & set(known):
            raise UserError(
                f"--source: {path} lacks {role} column (one of {', '.join(known)}); "
                f"its columns are {', '.join(names) or 'none'}: rename one, or write a first line "
                "that names the columns, such as path|text, over paths of files"
            )
    twice = sorted({name for name in header if header.count(name) > 1 and is_known(name)})
    if twice:
        raise UserError(f"--source: {path} has two columns {', '.join(twice)}: rename one")


def _unquoted(cell: str, *, only_doubled: bool) -> str:
    """Undo a csv writer's quoting: remove the quotes around a cell, and double quotes inside.

    Args:
        cell: text between separators.
        only_doubled: do not change a cell that needed no quoting; its quotes may be text.

    >>> _unquoted('"She said ""come"" to me"', only_doubled=False)
    'She said "come" to me'
    """
    if not QUOTED.fullmatch(cell) or (only_doubled and '""' not in cell[1:-1]):
        return cell
    return cell[1:-1].replace('""', '"')


# ------ JSON


def _json_records(file: TextIO, path: Path) -> Iterator[Record]:
    """Yield one object per line; or those of a list, of an object of lists, or a single object."""
    lines = (line for line in file if line.strip())
    first = next(lines, "")
    second = next(lines, "")
    value = _parse(first)
    if second and value is not None:
        yield from map(_line, itertools.chain([first, second], lines))
        return
    content = first + second + file.read()
    value = _parse(content)
    if value is not None:
        yield from map(_record, _rows(value, path))
    elif any(map(_parse, content.splitlines())):
        yield from map(_line, content.splitlines())
    elif content:
        raise UserError(f"--source: {path} is not JSON ({_why_not(content)}): write it again")


def _parse(content: str) -> Any:
    """The value of JSON text, or `None` if it is not JSON."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _why_not(content: str) -> str:
    try:
        json.loads(content)
    except (ValueError, RecursionError) as error:
        return str(error)
    return "it is null"


def _line(line: str) -> Record:
    value = _parse(line)
    return {"": f"not JSON: {_why_not(line)}"} if value is None else _record(value)


def _record(value: Any) -> Record:
    """An object as a record; the fields of an audio object (`path`, `start`) are joined to it."""
    if not isinstance(value, dict):
        return {"": "not a JSON object"}
    record = {column_name(str(name)): cell for name, cell in value.items()}
    for name in PATH_COLUMNS:
        if isinstance(record.get(name), dict):
            audio = {column_name(str(key)): cell for key, cell in record[name].items()}
            record[name] = audio.pop("path", None)
            record = {**audio, **record}
    return record


def _rows(value: Any, path: Path) -> list[Any]:
    """The rows of a list, of an object of columns (lists, or pandas' objects), or a single one."""
    if isinstance(value, list):
        return value
    columns = value if isinstance(value, dict) else {}
    given = {column_name(str(name)): cell for name, cell in columns.items()}
    if not given.keys() & set(PATH_COLUMNS) or not given.keys() & set(TEXT_COLUMNS):
        raise UserError(
            f"--source: {path} is one JSON text without columns of paths and texts (it has "
            f"{', '.join(columns) or 'none'}): write an object a line, or a list of objects"
        )
    text = next(given[name] for name in TEXT_COLUMNS if name in given)
    audio = next(given[name] for name in PATH_COLUMNS if name in given)
    if not isinstance(text, list | dict) or type(audio) is not type(text):
        return [value]
    if isinstance(text, dict):
        columns = {
            name: list(cell.values()) if isinstance(cell, dict) else cell
            for name, cell in columns.items()
        }
    if len({len(cell) if isinstance(cell, list) else -1 for cell in columns.values()}) > 1:
        raise UserError(f"--source: {path} has columns of different lengths: write it again")
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
