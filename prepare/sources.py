"""Where speech and transcripts come from: any of five forms, read as one stream of rows.

The form is detected. A Common Voice folder, a manifest and an audiofolder are tables of text beside
audio files (`table_rows`); a Hub dataset is streamed, and a folder of the datasets library mapped
(`hub`). Rows are yielded one at a time, in the order of the source, so that memory does not grow
with it. A row that cannot be used is yielded too, with its `problem`, so that it is counted; only a
source that cannot be read at all is an error.
"""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.cli import UserError
from prepare import hub, table_rows, tables
from prepare.rows import Row, split_from_folders
from prepare.table_rows import AUDIOFOLDER, COMMON_VOICE, MANIFEST, Table

HUB = "hub"
METADATA_NAMES = ("metadata.csv", "metadata.jsonl")  # of an audiofolder
COMMON_VOICE_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
FORMS = (
    "a Common Voice folder (clips/ and train.tsv or validated.tsv), an audiofolder (metadata.csv), "
    "a manifest (.csv, .tsv or .jsonl) or hub:NAME[:CONFIG]"
)


@dataclass(frozen=True)
class Source:
    """A source whose form is known."""

    form: str  # COMMON_VOICE, MANIFEST, AUDIOFOLDER or HUB
    name: str  # --source as it was given
    root: Path | None = None  # no audio file may be outside
    tables: tuple[Table, ...] = ()
    audio_column: str = ""  # of a Hub dataset
    text_column: str = ""


def find(name: str, *, audio_column: str = "audio", text_column: str = "") -> Source:
    """Detect the form of a source.

    Args:
        name: --source.
        audio_column, text_column: of a Hub dataset.

    Raises:
        UserError: the source does not exist, or has none of the forms.
    """
    if not name:
        raise UserError(f"--source is empty: give {FORMS}")
    path = Path(name).expanduser()
    if not name.startswith("hub:") and not path.exists():
        raise UserError(f"--source {name} does not exist: give {FORMS}")
    if name.startswith("hub:") or hub.is_saved(path):
        return Source(HUB, name, audio_column=audio_column, text_column=text_column)
    if path.is_file():
        return _find_manifest(name, path)
    if common_voice := _common_voice_tables(path):
        return Source(COMMON_VOICE, name, path, common_voice)
    if audiofolder := _audiofolder_tables(path):
        return Source(AUDIOFOLDER, name, path, audiofolder)
    raise UserError(f"--source {name} has no known form: {_advice(path)}")


def _find_manifest(name: str, path: Path) -> Source:
    if path.suffix.lower() == ".parquet":
        raise UserError(
            f"--source {name} is read as a dataset with its folder: give hub:{path.parent}"
        )
    if path.suffix.lower() not in (*tables.SUFFIXES, ".txt"):
        raise UserError(f"--source {name} has no known form: give {FORMS}")
    return Source(MANIFEST, name, path.parent, (Table(path, path.parent),))


def _advice(folder: Path) -> str:
    """What to give instead of a folder that is no source."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in tables.SUFFIXES)
    if names:
        return f"give the manifest itself (--source {folder / names[0]})"
    if next(folder.rglob("*.parquet"), None):
        return f"give its parquet files as a dataset (--source hub:{folder})"
    return f"give {FORMS}"


def _common_voice_tables(folder: Path) -> tuple[Table, ...]:
    """The splits of the release if train.tsv has rows, else all validated clips without splits."""
    clips = folder / "clips"
    if not clips.is_dir():
        return ()
    release = tuple(
        Table(folder / f"{name}.tsv", clips, split)
        for name, split in COMMON_VOICE_SPLITS.items()
        if (folder / f"{name}.tsv").is_file()
    )
    if any(table.split == "train" and _has_rows(table.path) for table in release):
        return release
    validated = folder / "validated.tsv"
    if not validated.is_file() or (release and not _has_rows(validated)):
        return release
    if release:
        print(
            f"{folder}/train.tsv has no rows: all clips of validated.tsv are used, without splits"
        )
    return (Table(validated, clips),)


def _has_rows(path: Path) -> bool:
    """Whether a table has anything below its header."""
    with path.open("rb") as file:
        return sum(1 for _ in itertools.islice((line for line in file if line.strip()), 2)) == 2


def _audiofolder_tables(folder: Path) -> tuple[Table, ...]:
    """The metadata file of a folder, or all in its subfolders, which may be named after splits."""
    metadata: dict[Path, Path] = {}
    for path in sorted(folder.rglob("*")):  # of two in a folder the csv comes first
        if path.name.lower() in METADATA_NAMES and path.is_file():
            metadata.setdefault(path.parent, path)
    if folder in metadata:
        if len(metadata) > 1:
            print(f"{metadata[folder]} is used, metadata files in its subfolders are not")
        return (Table(metadata[folder], folder),)
    return tuple(
        Table(path, path.parent, split_from_folders(path, folder)) for path in metadata.values()
    )


def fingerprint(source: Source) -> tuple[str, int | None]:
    """sha256 of the tables, and about the number of rows; the audio is not read.

    The number is that of lines. It is `None`, and the sha256 empty, for a Hub dataset, which is not
    read ahead.
    """
    if source.form == HUB:
        return "", None
    digest, num_lines = hashlib.sha256(), 0
    for table in source.tables:
        with table.path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                num_lines += block.count(b"\n")
    num_headers = sum("json" not in table.path.suffix.lower() for table in source.tables)
    return digest.hexdigest(), max(num_lines - num_headers, 0)


def read(source: Source) -> Iterator[Row]:
    """Yield the rows of a source, in its order.

    Raises:
        UserError: a table lacks a column that is needed, or a Hub dataset cannot be read.
    """
    if source.form == HUB:
        return hub.read(hub.parse(source.name, source.audio_column, source.text_column))
    return table_rows.read(source.tables, source.root, source.form)
