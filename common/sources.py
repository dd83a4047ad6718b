"""Where speech and transcripts come from: any of four usual forms, as one stream of rows.

The forms are told apart by looking. A Common Voice folder, a manifest and an audiofolder are tables
of text beside audio files; a Hub dataset is streamed. Rows are yielded one at a time, in the order
of the source, so that memory does not grow with it. A row that cannot be used is yielded too, with
its `problem`, so that it is counted; only a source that cannot be read at all is an error.
"""

import csv
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from common.cli import UserError

PATH_COLUMNS = ("path", "audio", "file_name", "audio_path", "audio_filepath", "filename", "file")
TEXT_COLUMNS = ("text", "sentence", "transcript", "transcription")
SPEAKER_COLUMNS = ("speaker", "speaker_id", "client_id")
LANGUAGE_COLUMNS = ("language", "lang", "locale")
START_COLUMNS = ("start", "start_seconds")
END_COLUMNS = ("end", "end_seconds")
MANIFEST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
METADATA_NAMES = ("metadata.csv", "metadata.jsonl")  # of an audiofolder
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    **dict.fromkeys(("validation", "valid", "validate", "val", "dev", "eval"), "validation"),
}
FORMS = (
    "a Common Voice folder (clips/ and train.tsv or validated.tsv), an audiofolder (metadata.csv), "
    "a manifest (.csv, .tsv or .jsonl) or hub:NAME[:CONFIG]"
)

MALFORMED_ROW = "malformed row"
UNKNOWN_SPLIT = "unknown split"
OUTSIDE_SOURCE = "path leaves the source folder"


@dataclass(frozen=True)
class Row:
    """One clip as the source gives it; nothing has been opened yet."""

    id: str  # not unique yet
    path: str = ""  # of the audio file
    audio: bytes = b""  # its content, where a Hub dataset holds it
    text: str = ""
    split: str = ""  # train, validation, test or nothing
    speaker: str = ""
    language: str = ""  # as the source spells it
    start_seconds: float = 0.0
    end_seconds: float | None = None
    problem: str = ""  # why the row cannot be used: a reason of its own, and its detail
    detail: str = ""

    def key(self) -> bytes:
        """Bytes that change when the row or its audio file (size, time of change) does."""
        facts = asdict(replace(self, audio=b""))
        facts["audio"] = hashlib.sha256(self.audio).hexdigest() if self.audio else ""
        try:
            stat = os.stat(self.path) if self.path else None  # noqa: PTH116 (a hot loop)
            facts["file"] = [stat.st_size, stat.st_mtime_ns] if stat else None
        except OSError:  # the reader says so
            facts["file"] = None
        return json.dumps(facts, sort_keys=True).encode()


@dataclass(frozen=True)
class Table:
    """A file of rows, the folder its paths are relative to, and the split all of it belongs to."""

    path: Path
    audio_dir: Path
    split: str = ""


@dataclass(frozen=True)
class Source:
    """What `find` recognised."""

    form: str  # common_voice, manifest, audiofolder or hub
    name: str  # as the user gave it
    root: Path | None = None  # no audio file may lie outside
    tables: tuple[Table, ...] = ()
    audio_column: str = ""  # of a Hub dataset
    text_column: str = ""


def find(name: str, *, audio_column: str = "audio", text_column: str = "") -> Source:
    """Recognise a source by looking at it.

    Raises:
        UserError: nothing there, or nothing that is one of the four forms.
    """
    if name.startswith("hub:"):
        return Source("hub", name, audio_column=audio_column, text_column=text_column)
    if not name:
        raise UserError(f"--source is empty: give {FORMS}")
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(f"--source {name} does not exist: give {FORMS}")
    if path.is_file():
        if path.suffix.lower() not in MANIFEST_SUFFIXES:
            raise UserError(f"--source {name} is not a source that is known: give {FORMS}")
        return Source("manifest", name, path.parent, (Table(path, path.parent),))
    tables = _common_voice_tables(path)
    if tables:
        return Source("common_voice", name, path, tables)
    tables = _audiofolder_tables(path)
    if tables:
        return Source("audiofolder", name, path, tables)
    manifests = sorted(entry.name for entry in path.iterdir() if entry.suffix in MANIFEST_SUFFIXES)
    hint = f"give the manifest itself (--source {path / manifests[0]})" if manifests else ""
    raise UserError(f"--source {name} is not a source that is known: {hint or 'give ' + FORMS}")


def _common_voice_tables(folder: Path) -> tuple[Table, ...]:
    """The release's own splits where it has a train.tsv, else all validated clips."""
    clips = folder / "clips"
    if not clips.is_dir():
        return ()
    named = [("train", "train"), ("dev", "validation"), ("test", "test")]
    found = [
        Table(folder / f"{name}.tsv", clips, split)
        for name, split in named
        if (folder / f"{name}.tsv").is_file()
    ]
    validated = folder / "validated.tsv"
    if validated.is_file() and not any(table.split == "train" for table in found):
        found = [Table(validated, clips)]
    return tuple(found)


def _audiofolder_tables(folder: Path) -> tuple[Table, ...]:
    """One metadata file at the top, else one in each folder that is named after a split."""
    for name in METADATA_NAMES:
        if (folder / name).is_file():
            return (Table(folder / name, folder),)
    subfolders = sorted(entry for entry in folder.iterdir() if entry.name.lower() in SPLIT_NAMES)
    return tuple(
        Table(entry / name, entry, SPLIT_NAMES[entry.name.lower()])
        for entry in subfolders
        for name in METADATA_NAMES
        if (entry / name).is_file()
    )


def fingerprint(source: Source) -> tuple[str, int | None]:
    """sha256 of a source's tables and their number of rows: one pass over text, none over audio.

    `("", None)` for a Hub dataset, which is not read ahead.
    """
    if source.form == "hub":
        return "", None
    digest, lines = hashlib.sha256(), 0
    for table in source.tables:
        with table.path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                lines += block.count(b"\n")
    headers = sum("json" not in table.path.suffix for table in source.tables)
    return digest.hexdigest(), max(lines - headers, 0)


def count(source: Source) -> int:
    """Rows that `read` yields of a source of tables: exactly, where lines are an estimate."""
    return sum(1 for table in source.tables for _ in _records(table.path))


def read(source: Source, first: int = 0, end: int | None = None) -> Iterator[Row]:
    """Yield the rows of a source, in its order; of tables those from `first` to before `end`.

    Raises:
        UserError: a table without the needed columns, or a Hub dataset that cannot be read.
    """
    if source.form == "hub":
        yield from _guarded(source)
        return
    root = os.path.realpath(source.root)
    for table in source.tables:
        next(_records(table.path), None)  # columns that lack are an error before the work starts
    records = (
        (table, number, record)
        for table in source.tables
        for number, record in enumerate(_records(table.path), start=1)
    )
    for table, number, record in itertools.islice(records, first, end):
        yield _row(source, table, root, number, record)


# ------ tables


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield each row of a table as a dict; `{"": why}` for one that cannot be read."""
    with path.open("rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"--source: {path} is UTF-16: save it as UTF-8")
    # Bytes that are not UTF-8 become lone surrogates, which `_row` finds and reports.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = _json_records(file) if "json" in path.suffix else _csv_records(file, path)
        yield from lines


def _csv_records(file: Any, path: Path) -> Iterator[dict[str, Any]]:
    """CSV with quotes, or TSV without: a tab-separated quote is a quote, as in Common Voice."""
    if path.suffix.lower() == ".tsv":
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(file)
    header = [name.strip().lower() for name in next(reader, [])]
    for role, known in (("an audio path", PATH_COLUMNS), ("a text", TEXT_COLUMNS)):
        if not set(header) & set(known):
            raise UserError(
                f"--source: {path} lacks {role} column (one of {', '.join(known)}); "
                f"its columns are {', '.join(header) or 'none'}: rename one"
            )
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
        if len(cells) != len(header):
            yield {"": f"{len(cells)} cells under {len(header)} columns"}
        elif any("\n" in cell for cell in cells):
            yield {"": "a cell runs over several lines: an unbalanced quote?"}
        else:
            yield dict(zip(header, cells, strict=True))


def _json_records(file: Any) -> Iterator[dict[str, Any]]:
    for line in file:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield {"": f"not JSON: {error}"}
            continue
        if isinstance(record, dict):
            yield {str(name).strip().lower(): value for name, value in record.items()}
        else:
            yield {"": "a line is not a JSON object"}


def _row(source: Source, table: Table, root: str, number: int, record: dict[str, Any]) -> Row:
    """Make a row of a table's record; what is wrong with it goes into `problem`."""
    unnamed = f"{table.path.relative_to(source.root).as_posix()}:{number}"
    if "" in record and len(record) == 1:
        return Row(unnamed, problem=MALFORMED_ROW, detail=record[""])
    name = _cell(record, PATH_COLUMNS)
    if not name or "\0" in name:
        return Row(unnamed, problem=MALFORMED_ROW, detail="no audio path")
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return Row(unnamed, problem=MALFORMED_ROW, detail="not UTF-8")
    if source.form == "common_voice" and not PurePosixPath(name).suffix:
        name += ".mp3"  # releases before 5 leave it out
    start, end = _seconds(record, START_COLUMNS), _seconds(record, END_COLUMNS)
    row = Row(
        id=_clip_id(name, start, end),
        path=str(table.audio_dir / name),
        text=_cell(record, TEXT_COLUMNS),
        split=table.split,
        speaker=_cell(record, SPEAKER_COLUMNS),
        language=_cell(record, LANGUAGE_COLUMNS),
        start_seconds=start or 0.0,
        end_seconds=end,
    )
    if not _is_inside(row.path, root):
        return replace(row, problem=OUTSIDE_SOURCE, detail=name)
    if any(value is not None and not 0 <= value < math.inf for value in (start, end)):
        return replace(
            row,
            start_seconds=0.0,
            end_seconds=None,
            problem=MALFORMED_ROW,
            detail="bad start or end",
        )
    if table.split:
        return row
    return _with_split(row, _cell(record, ("split",)), name if source.form == "audiofolder" else "")


def _with_split(row: Row, word: str, file_name: str) -> Row:
    """Fill in the split: the row's own word, else the first folder of an audiofolder's path."""
    if word:
        split = SPLIT_NAMES.get(word.lower(), "")
        if not split:
            return replace(row, problem=UNKNOWN_SPLIT, detail=word)
        return replace(row, split=split)
    folders = PurePosixPath(file_name).parts[:-1]
    return replace(row, split=SPLIT_NAMES.get(folders[0].lower(), "") if folders else "")


def _cell(record: dict[str, Any], names: tuple[str, ...]) -> str:
    """The first of the named columns that is there and not empty, as stripped text."""
    values = (record.get(name) for name in names)
    texts = (str(value).strip() for value in values if isinstance(value, str | int | float))
    return next((text for text in texts if text), "")


def _seconds(record: dict[str, Any], names: tuple[str, ...]) -> float | None:
    """A time, `None` where there is none, NaN where it is not a number."""
    word = _cell(record, names)
    try:
        return float(word) if word else None
    except ValueError:
        return math.nan


def _clip_id(name: str, start: float | None, end: float | None) -> str:
    """The path without its suffix, and the segment's times."""
    stem = PurePosixPath(name).with_suffix("").as_posix() if PurePosixPath(name).name else name
    if start is None and end is None:
        return stem
    return f"{stem}-{start or 0:.2f}-{'end' if end is None else f'{end:.2f}'}"


def _is_inside(path: str, root: str) -> bool:
    """Whether a path lies in `root` once `..` and links are followed."""
    return os.path.realpath(path).startswith(root.rstrip("/") + "/")


# ------ Hub


def _guarded(source: Source) -> Iterator[Row]:
    """Yield the rows of a stream that may break off."""
    try:
        yield from _read_hub(source)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--source {source.name} broke off ({reason}): start again, finished clips are kept"
        ) from error


def _read_hub(source: Source) -> Iterator[Row]:
    """Stream a Hub dataset; a second start streams it again, but decodes only what is missing."""
    name, _, config = source.name.removeprefix("hub:").partition(":")
    if not name:
        raise UserError(
            f"--source {source.name} names no dataset: give hub:NAME or hub:NAME:CONFIG"
        )
    from datasets import Audio

    splits = _load_hub(source.name, name, config)
    known = {split: _hub_split(split) for split in splits if _hub_split(split)}
    if not known and len(splits) == 1:
        known = dict.fromkeys(splits, "")
    if not known:
        raise UserError(
            f"--source {source.name} has the splits {', '.join(splits)}, none of them train, "
            "validation or test: make a manifest of the ones you want"
        )
    for split in sorted(set(splits) - set(known)):
        print(f"split {split} of {source.name} is left out: not train, validation or test")
    for split in known:
        dataset = splits[split]
        columns = _hub_columns(source, dataset)
        dataset = dataset.cast_column(columns[0], Audio(decode=False))
        for number, record in enumerate(dataset, start=1):
            yield _hub_row(source, name, known[split], f"{split}-{number:08d}", columns, record)


def _load_hub(option_value: str, name: str, config: str) -> dict[str, Any]:
    from datasets import load_dataset

    try:
        return dict(load_dataset(name, config or None, streaming=True))
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--source {option_value} cannot be loaded ({reason}): check its name and CONFIG, the "
            "network, and HF_TOKEN if it is gated"
        ) from error


def _hub_split(name: str) -> str:
    """train for `train`, `train.clean.100` and `train-other`; nothing for `other`."""
    word = name.lower().replace("-", ".").replace("_", ".").split(".")[0]
    return SPLIT_NAMES.get(word, "")


def _hub_columns(source: Source, dataset: Any) -> tuple[str, str]:
    """The audio and text columns' names, checked."""
    columns = list(dataset.features or next(iter(dataset.take(1)), {}))
    text = source.text_column or next((name for name in TEXT_COLUMNS if name in columns), "")
    for option, column in (
        ("--hub_audio_column", source.audio_column),
        ("--hub_text_column", text),
    ):
        if column not in columns:
            raise UserError(
                f"{option} {column or '(empty)'} is not a column of --source {source.name}: "
                f"give one of {', '.join(columns)}"
            )
    return source.audio_column, text


def _hub_row(
    source: Source,
    name: str,
    split: str,
    unnamed: str,
    columns: tuple[str, str],
    record: dict[str, Any],
) -> Row:
    audio = record[columns[0]] or {}
    path = audio.get("path") or ""
    clip_id = PurePosixPath(path).stem if path else unnamed
    row = Row(
        id=clip_id,
        audio=audio.get("bytes") or b"",
        text=_cell(record, (columns[1],)),
        split=split,
        speaker=_cell(record, SPEAKER_COLUMNS),
        language=_cell(record, LANGUAGE_COLUMNS),
    )
    if row.audio:
        return row
    if not path:
        return replace(row, problem=MALFORMED_ROW, detail="no audio")
    if path.startswith("hf://") or "::hf://" in path:
        return _fetched(row, path)
    if Path(name).is_dir() and _is_inside(path, os.path.realpath(name)):
        return replace(row, path=path)
    return replace(row, problem=OUTSIDE_SOURCE, detail=path)


def _fetched(row: Row, path: str) -> Row:
    """Read an audio file of a Hub repository that keeps files, not tables."""
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:
            return replace(row, audio=file.read())
    except FileNotFoundError:
        return replace(row, problem=MALFORMED_ROW, detail=f"no audio at {path}")
