"""Where speech and transcripts come from: any of four usual forms, as one stream of rows.

The forms are told apart by looking. A Common Voice folder, a manifest and an audiofolder are tables
of text beside audio files; a Hub dataset is streamed. Rows are yielded one at a time, in the order
of the source, so that memory does not grow with it. A row that cannot be used is yielded too, with
its `problem`, so that it is counted; only a source that cannot be read at all is an error.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from common.audio import encode_wav
from common.cli import UserError
from prepare import columns, tables
from prepare.reasons import MALFORMED_ROW, NO_TEXT, OUTSIDE_SOURCE, UNKNOWN_SPLIT

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
        if path.suffix.lower() == ".parquet":
            raise UserError(
                f"--source {name} is read as a dataset with its folder: give hub:{path.parent}"
            )
        if path.suffix.lower() not in tables.SUFFIXES:
            raise UserError(f"--source {name} is not a source that is known: give {FORMS}")
        return Source("manifest", name, path.parent, (Table(path, path.parent),))
    if _is_saved(path):
        return Source("hub", name, audio_column=audio_column, text_column=text_column)
    found = _common_voice_tables(path)
    if found:
        return Source("common_voice", name, path, found)
    found = _audiofolder_tables(path)
    if found:
        return Source("audiofolder", name, path, found)
    manifests = sorted(
        entry.name for entry in path.iterdir() if entry.suffix.lower() in tables.SUFFIXES
    )
    hint = f"give the manifest itself (--source {path / manifests[0]})" if manifests else ""
    if not hint and next(path.rglob("*.parquet"), None):
        hint = f"give its parquet files as a dataset (--source hub:{path})"
    raise UserError(f"--source {name} is not a source that is known: {hint or 'give ' + FORMS}")


def _common_voice_tables(folder: Path) -> tuple[Table, ...]:
    """The release's own splits where its train.tsv has rows, else all validated clips."""
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
    if any(table.split == "train" and _has_rows(table.path) for table in found):
        return tuple(found)
    if not validated.is_file() or (found and not _has_rows(validated)):
        return tuple(found)
    if found:
        print(
            f"{folder}/train.tsv has no rows: all clips of validated.tsv are taken, without splits"
        )
    return (Table(validated, clips),)


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of the datasets library wrote a folder."""
    names = ("dataset_dict.json",), ("dataset_info.json", "state.json")
    return any(all((folder / name).is_file() for name in group) for group in names)


def _has_rows(path: Path) -> bool:
    """Whether anything stands below a table's header."""
    with path.open("rb") as file:
        return sum(1 for _ in itertools.islice((line for line in file if line.strip()), 2)) == 2


def _audiofolder_tables(folder: Path) -> tuple[Table, ...]:
    """One metadata file at the top, else all below; folders named after a split tell theirs."""
    found: dict[Path, Path] = {}
    for path in sorted(folder.rglob("*")):  # of two in a folder the csv comes first
        if path.name.lower() in METADATA_NAMES and path.is_file():
            found.setdefault(path.parent, path)
    if folder in found:
        if len(found) > 1:
            print(f"{found[folder]} is taken, metadata in folders below it is left out")
        return (Table(found[folder], folder),)
    return tuple(Table(path, path.parent, _split_of(path, folder)) for path in found.values())


def _split_of(path: PurePath, root: Path) -> str:
    """The split that the first folder between `root` and a file with such a name tells, or `""`."""
    folders = path.relative_to(root).parts[:-1] if path.is_relative_to(root) else ()
    return next((SPLIT_NAMES[name.lower()] for name in folders if name.lower() in SPLIT_NAMES), "")


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
    headers = sum("json" not in table.path.suffix.lower() for table in source.tables)
    return digest.hexdigest(), max(lines - headers, 0)


def read(source: Source) -> Iterator[Row]:
    """Yield the rows of a source, in its order.

    Raises:
        UserError: a table without the needed columns, or a Hub dataset that cannot be read.
    """
    if source.form == "hub":
        yield from _guarded(source)
        return
    root = os.path.realpath(source.root)
    for table in source.tables:  # columns that lack are an error before the work starts
        record = next(_records(source, table), {})
        names = [name for name in columns.TEXT_COLUMNS if columns.as_text(record.get(name))]
        if len(names) > 1:
            print(f"{table.path}: texts are taken from {names[0]}, not from {', '.join(names[1:])}")
    for table in source.tables:
        for number, record in enumerate(_records(source, table), start=1):
            yield _row(source, table, root, number, record)


# ------ tables


def _records(source: Source, table: Table) -> Iterator[tables.Record]:
    return tables.records(table.path, quotes_are_text=source.form == "common_voice")


def _row(source: Source, table: Table, root: str, number: int, record: dict[str, Any]) -> Row:
    """Make a row of a table's record; what is wrong with it goes into `problem`."""
    unnamed = f"{table.path.relative_to(source.root).as_posix()}:{number}"
    if "" in record and len(record) == 1:
        return Row(unnamed, problem=MALFORMED_ROW, detail=record[""])
    name = _path(record, table)
    if not name or "\0" in name:
        return Row(unnamed, problem=MALFORMED_ROW, detail="no audio path")
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return Row(unnamed, problem=MALFORMED_ROW, detail="not UTF-8")
    if source.form == "common_voice" and not PurePosixPath(name).suffix:
        name += ".mp3"  # releases before 5 leave it out
    start, end, bad_times = None, None, ""
    try:
        start, end = columns.times(record)
    except ValueError as error:
        bad_times = str(error)
    text, no_text = columns.text(record)
    row = Row(
        id=_clip_id(name, start, end),
        path=str(table.audio_dir / name),
        text=text,
        split=table.split,
        speaker=columns.cell(record, columns.SPEAKER_COLUMNS, columns.MISSING_ID),
        language=columns.cell(record, columns.LANGUAGE_COLUMNS, columns.MISSING_ID),
        start_seconds=start or 0.0,
        end_seconds=end,
    )
    if not _is_inside(row.path, root):
        return replace(row, problem=OUTSIDE_SOURCE, detail=name)
    if bad_times:
        return replace(row, problem=MALFORMED_ROW, detail=bad_times)
    if no_text:
        return replace(row, problem=NO_TEXT, detail=no_text)
    if table.split:
        return row
    word = columns.cell(record, columns.SPLIT_COLUMNS, columns.MISSING_ID)
    if word and word.lower() not in SPLIT_NAMES:
        return replace(row, problem=UNKNOWN_SPLIT, detail=word)
    if word or source.form != "audiofolder":
        return replace(row, split=SPLIT_NAMES.get(word.lower(), ""))
    return replace(row, split=_split_of(Path(row.path), source.root))


def _path(record: tables.Record, table: Table) -> str:
    """The row's audio path: of several the first that leads to a file, else the first."""
    names = columns.paths(record)
    if len(names) > 1:
        names = [name for name in names if _exists(table, name)] or names
    name = names[0] if names else ""
    if "\\" in name and not os.path.lexists(table.audio_dir / name):  # written on Windows
        name = name.replace("\\", "/")
    return name


def _exists(table: Table, name: str) -> bool:
    """Whether a path leads to a file, also where it was written on Windows."""
    path = table.audio_dir / name.replace("\\", "/")
    return "\0" not in name and os.path.isfile(path)  # noqa: PTH113 (Path's raises for long names)


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
    except (TypeError, KeyError, ImportError) as error:
        raise UserError(
            f"--source {source.name} holds what is not read ({_reason(error)}): give a manifest of "
            "its files"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = _reason(error)
        raise UserError(
            f"--source {source.name} broke off ({reason}): start again, finished clips are kept"
        ) from error


def _reason(error: Exception) -> str:
    """The first line of an error's message, or its name."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read_hub(source: Source) -> Iterator[Row]:
    """Stream a Hub dataset; a second start streams it again, but decodes only what is missing."""
    name, _, config = source.name.removeprefix("hub:").partition(":")
    if not source.name.startswith("hub:"):
        name, config = source.name, ""
    if not name:
        raise UserError(
            f"--source {source.name} names no dataset: give hub:NAME or hub:NAME:CONFIG"
        )
    from datasets import Audio, ClassLabel

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
        named = _hub_columns(source, dataset)
        if not _is_array(dataset.features[named[0]] if dataset.features else None):
            dataset = dataset.cast_column(named[0], Audio(decode=False))
        _tell_times(source, dataset)
        names = {
            column: feature.int2str
            for column, feature in (dataset.features or {}).items()
            if isinstance(feature, ClassLabel)
        }
        for number, record in enumerate(dataset, start=1):
            for column, name_of in names.items():
                if isinstance(record[column], int) and record[column] >= 0:  # -1: not known
                    record[column] = name_of(record[column])
                else:
                    record[column] = None
            yield _hub_row(source, name, known[split], f"{split}-{number:08d}", named, record)


def _load_hub(option_value: str, name: str, config: str) -> dict[str, Any]:
    from datasets import load_dataset, load_from_disk

    try:
        if _is_saved(Path(name).expanduser()):
            found = load_from_disk(Path(name).expanduser())
            return dict(found) if isinstance(found, dict) else {"train": found}
        return dict(load_dataset(name, config or None, streaming=True))
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, ImportError) as error:
        raise UserError(
            f"--source {option_value} cannot be loaded ({_reason(error)}): check its name and "
            "CONFIG, the network, and HF_TOKEN if it is gated"
        ) from error


def _hub_split(name: str) -> str:
    """train for `train`, `train.clean.100` and `train-other`; nothing for `other`."""
    word = name.lower().replace("-", ".").replace("_", ".").split(".")[0]
    return SPLIT_NAMES.get(word, "")


def _hub_columns(source: Source, dataset: Any) -> tuple[str, str]:
    """The audio and text columns' names, checked."""
    names = list(dataset.features or next(iter(dataset.take(1)), {}))
    text = source.text_column or next((name for name in columns.TEXT_COLUMNS if name in names), "")
    for option, column in (
        ("--hub_audio_column", source.audio_column),
        ("--hub_text_column", text),
    ):
        if column not in names:
            raise UserError(
                f"{option} {column or '(empty)'} is not a column of --source {source.name}: "
                f"give one of {', '.join(names)}"
            )
    return source.audio_column, text


def _hub_row(
    source: Source,
    name: str,
    split: str,
    unnamed: str,
    named: tuple[str, str],
    record: dict[str, Any],
) -> Row:
    audio = record[named[0]]
    if isinstance(audio, list):
        audio = {"array": audio, "sampling_rate": record.get("sampling_rate")}
    audio = {"bytes": audio} if isinstance(audio, bytes) else audio or {}
    cells = {columns.column_name(key): cell for key, cell in record.items()}
    path = audio.get("path") or ""
    text, no_text = columns.text(record, (named[1],))
    row = Row(
        id=PurePosixPath(path).stem if path else unnamed,
        audio=audio.get("bytes") or b"",
        text=text,
        split=split,
        speaker=columns.cell(cells, columns.SPEAKER_COLUMNS, columns.MISSING_ID),
        language=columns.cell(cells, columns.LANGUAGE_COLUMNS, columns.MISSING_ID),
        problem=NO_TEXT if no_text else "",
        detail=no_text,
    )
    if row.audio or row.problem:
        return row
    if audio.get("array") is not None:
        return _with_array(source, row, audio)
    if not path:
        return replace(row, problem=MALFORMED_ROW, detail="no audio")
    if path.startswith("hf://") or "::hf://" in path:
        return _fetched(row, path)
    folder = Path(name).expanduser()
    if folder.is_dir():  # parquet files often lie in `data`, beside or above the audio
        places = [folder / path, folder / "data" / path]
        found = next((str(place) for place in places if place.is_file()), str(places[0]))
        if _is_inside(found, os.path.realpath(folder)):
            return replace(row, path=found)
    return replace(row, problem=OUTSIDE_SOURCE, detail=path)


def _is_array(feature: Any) -> bool:
    """Whether a column holds samples, not files."""
    names = feature if isinstance(feature, dict) else ()
    return "array" in names or type(feature).__name__ in ("List", "LargeList", "Sequence")


def _with_array(source: Source, row: Row, audio: dict[str, Any]) -> Row:
    """The row with samples as a wav file. An array without a rate is an error: all rows lack it."""
    rate = audio.get("sampling_rate")
    if not isinstance(rate, int) or rate <= 0:
        raise UserError(
            f"--hub_audio_column {source.audio_column}: holds samples without a sampling_rate in "
            f"--source {source.name}: store audio files, or a column sampling_rate"
        )
    try:
        return replace(row, audio=encode_wav(audio["array"], rate))
    except ValueError as error:
        return replace(row, problem=MALFORMED_ROW, detail=str(error))


def _tell_times(source: Source, dataset: Any) -> None:
    """Say that columns of times are not used: a Hub dataset's audio is cut already."""
    times = [name for name in dataset.features or () if columns.is_time(columns.column_name(name))]
    if times:
        print(f"the audio of {source.name} is taken whole: {', '.join(times)} are not used")


def _fetched(row: Row, path: str) -> Row:
    """Read an audio file of a Hub repository that keeps files, not tables."""
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:
            return replace(row, audio=file.read())
    except FileNotFoundError:
        return replace(row, problem=MALFORMED_ROW, detail=f"no audio at {path}")
