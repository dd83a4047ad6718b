"""Rows of sources that are tables beside audio files: Common Voice, manifests, audiofolders."""

import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from prepare import columns, tables
from prepare.reasons import MALFORMED_ROW, NO_TEXT, OUTSIDE_SOURCE, UNKNOWN_SPLIT
from prepare.rows import Row, is_inside, split_from_folders, split_of
from prepare.tables import Record

COMMON_VOICE, MANIFEST, AUDIOFOLDER = "common_voice", "manifest", "audiofolder"


@dataclass(frozen=True)
class Table:
    """A file of rows, the folder that its paths are relative to, and the split of all its rows."""

    path: Path
    audio_dir: Path
    split: str = ""


def read(source_tables: tuple[Table, ...], root: Path, form: str) -> Iterator[Row]:
    """Yield the rows of tables, in order.

    Args:
        source_tables: of one source.
        root: folder of the source; a row whose audio file is outside it gets a problem.
        form: COMMON_VOICE, MANIFEST or AUDIOFOLDER.

    Raises:
        UserError: a table lacks a column that is needed, before the first row.
    """
    for table in source_tables:
        layout = tables.layout_without_header(table.path)
        if layout:
            print(f"{table.path}: {layout}")
        first = next(_records(table, form), {})
        names = [name for name in columns.TEXT_COLUMNS if columns.as_text(first.get(name))]
        if len(names) > 1:
            print(f"{table.path}: texts are taken from {names[0]}, not from {', '.join(names[1:])}")
        other = _other_split_column(first)
        if other and not table.split and not first.keys() & set(columns.SPLIT_COLUMNS):
            print(f"{table.path}: no column is named split: splits are taken from {other}")
    channels = _number_channels(source_tables, form)
    real_root = os.path.realpath(root)
    for table in source_tables:
        place = table.path.relative_to(root).as_posix()
        for number, record in enumerate(_records(table, form), start=1):
            row = _row(record, table, form, real_root, channels, unnamed=f"{place}:{number}")
            yield row if row.problem or table.split else _with_split(row, record, form, root)


def _records(table: Table, form: str) -> Iterator[Record]:
    return tables.records(table.path, quotes_are_text=form == COMMON_VOICE)


def _number_channels(source_tables: tuple[Table, ...], form: str) -> dict[str, tuple[int, ...]]:
    """What the values of a channel column mean, from all rows: only they say where numbers start.

    A csv or tsv without such a column is not read for it.
    """
    values: set[str] = set()
    for table in source_tables:
        records = _records(table, form)
        first = next((record for record in records if record.keys() != {""}), {})
        if first.keys() & set(columns.CHANNEL_COLUMNS) or tables.is_json(table.path):
            values.update(map(columns.channel, itertools.chain([first], records)))
    values.discard("")
    numbered = columns.number_channels(values)
    if values and not numbered:
        print(
            f"{source_tables[0].path}: channel is not used: its values (such as {min(values)}) "
            "name no channel of a file"
        )
    return numbered


def _row(
    record: Record,
    table: Table,
    form: str,
    real_root: str,
    channels: dict[str, tuple[int, ...]],
    *,
    unnamed: str,
) -> Row:
    """Make a row of a table's record, with a problem if it cannot be used.

    Args:
        record: of the table.
        table: it names the folder that audio paths are relative to.
        form: as in `read`.
        real_root: folder of the source, without links.
        channels: as `_number_channels` gives them.
        unnamed: the id of a row without an audio path.
    """
    name = _audio_path(record, table)
    malformed = _why_malformed(record, name)
    if malformed:
        return Row(unnamed, problem=MALFORMED_ROW, detail=malformed)
    if form == COMMON_VOICE and not PurePosixPath(name).suffix:
        name += ".mp3"  # releases before 5 leave it out
    start, end, bad_part = None, None, ""
    try:
        start, end = columns.times(record)
    except ValueError as error:
        bad_part = str(error)
    channel = columns.channel(record) if channels else ""
    if channel and channel not in channels:
        bad_part = f"channel is {channel!r}: give a number, left, right, A or B"
    text, no_text = columns.text(record)
    row = Row(
        id=_clip_id(name, start, end, channel),
        path=str(table.audio_dir / name),
        text=text,
        split=table.split,
        speaker=columns.speaker(record),
        language=columns.cell(record, columns.LANGUAGE_COLUMNS, columns.MISSING_ID),
        start_seconds=start or 0.0,
        end_seconds=end,
        channel=channel,
        channels=channels.get(channel, ()),
        problem=MALFORMED_ROW if bad_part else NO_TEXT if no_text else "",
        detail=bad_part or no_text,
    )
    if not is_inside(row.path, real_root):
        return replace(row, problem=OUTSIDE_SOURCE, detail=name)
    return row


def _why_malformed(record: Record, name: str) -> str:
    """Why a record gives no row, or `""`; `name` is its audio path."""
    if record.keys() == {""}:
        return record[""]
    if not name or "\0" in name:
        return "no audio path"
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "not UTF-8: save the table as CSV UTF-8"
    return ""


def _with_split(row: Row, record: Record, form: str, root: Path) -> Row:
    """The row with the split that its column names, or in an audiofolder a folder."""
    name = columns.cell(record, columns.SPLIT_COLUMNS, columns.MISSING_ID)
    if name and not split_of(name):
        return replace(row, problem=UNKNOWN_SPLIT, detail=name)
    name = name or columns.as_text(record.get(_other_split_column(record)))
    if name or form != AUDIOFOLDER:
        return replace(row, split=split_of(name))
    return replace(row, split=split_from_folders(Path(row.path), root))


def _other_split_column(record: Record) -> str:
    """The column that names a split and is not called split, or `""`."""
    cells = ((name, columns.as_text(record.get(name))) for name in columns.OTHER_SPLIT_COLUMNS)
    return next((name for name, cell in cells if split_of(cell)), "")


def _audio_path(record: Record, table: Table) -> str:
    """The row's audio path: if it names several, the first that exists, else the first."""
    names = columns.paths(record)
    if len(names) > 1:
        names = [name for name in names if _exists(table, name)] or names
    name = names[0] if names else ""
    if "\\" in name and not os.path.lexists(table.audio_dir / name):  # written on Windows
        name = name.replace("\\", "/")
    return name


def _exists(table: Table, name: str) -> bool:
    """Whether a path leads to a file, even if it was written on Windows."""
    path = table.audio_dir / name.replace("\\", "/")
    return "\0" not in name and os.path.isfile(path)  # noqa: PTH113 (Path's raises for long names)


def _clip_id(name: str, start: float | None, end: float | None, channel: str) -> str:
    """The path without its suffix, the channel, and the segment's times."""
    stem = PurePosixPath(name).with_suffix("").as_posix() if PurePosixPath(name).name else name
    if channel:
        stem = f"{stem}-channel-{channel}"
    if start is None and end is None:
        return stem
    return f"{stem}-{start or 0:.2f}-{'end' if end is None else f'{end:.2f}'}"
