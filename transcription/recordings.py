"""What is to be transcribed: a file, a folder or a manifest of recordings."""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.cli import UserError, first_line
from common.files import IGNORED
from common.languages import language_code

SUFFIXES_TEXT = """
3g2 3gp aac ac3 aif aifc aiff amr ape asf au avi caf flac flv m2ts m4a m4b m4v mka mkv mov mp2 mp3
mp4 mpeg mpg mts mxf oga ogg ogv opus spx ts voc w64 wav weba webm wma wmv wv
"""
SUFFIXES = set(SUFFIXES_TEXT.split())
OWN_STEMS = ("transcribe", "wer")  # of transcribe.json and wer.json in the output folder
MANIFESTS = (".csv", ".tsv", ".jsonl", ".txt")
PATH_COLUMNS = ("path", "audio", "file", "audio_filepath", "file_name")


@dataclass(frozen=True)
class Recording:
    """A file and what its transcripts are called."""

    path: Path
    name: str  # of its transcripts in the output folder, without the suffix
    language: str = ""  # code, where a manifest names it


def changed(path: Path) -> int:
    """When a file was last changed, in nanoseconds; 0 where it is not there."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def find_recordings(source: str) -> tuple[list[Recording], str]:
    """The recordings of `--audio`, and a line about files that were passed over, or "".

    Two files that differ in their suffix only keep it in the names of their transcripts, and so
    does a file whose transcript would have the name of a file of ours.
    """
    path = Path(source)
    if path.is_dir():
        rows, passed_over = _of_folder(path)
    elif not path.is_file():
        raise UserError(f"--audio {source}: does not exist: give a file, a folder or a manifest")
    elif path.suffix.lower() in MANIFESTS:
        rows, passed_over = _of_manifest(path), ""
    else:
        rows, passed_over = [(path, Path(path.name), "")], ""
    if not rows:
        raise UserError(
            f"--audio {source}: holds no audio or video{passed_over and f' ({passed_over})'}: "
            "give a file, a folder or a manifest of recordings"
        )
    stems = Counter(str(name.with_suffix("")) for _, name, _ in rows) + Counter(OWN_STEMS)
    recordings = []
    for file, name, language in rows:
        stem = str(name.with_suffix(""))
        recordings.append(Recording(file, stem if stems[stem] == 1 else str(name), language))
    return recordings, passed_over


def _of_folder(folder: Path) -> tuple[list[tuple[Path, Path, str]], str]:
    """Files of known suffixes below a folder, sorted, and how many others there are."""
    rows, others = [], Counter()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        if path.suffix[1:].lower() in SUFFIXES:
            rows.append((path, name, ""))
        elif not path.name.endswith(IGNORED):
            others[path.suffix or "no suffix"] += 1
    kinds = ", ".join(f"{number} {suffix}" for suffix, number in others.most_common(5))
    return rows, f"files of other kinds: {others.total()} ({kinds})" if others else ""


def _of_manifest(file: Path) -> list[tuple[Path, Path, str]]:
    """Rows of a manifest: paths relative to its folder, and a language where a row names one."""
    try:
        rows = list(_rows(file))
    except (ValueError, csv.Error, UnicodeError) as error:
        raise UserError(
            f"--audio {file}: this manifest cannot be read ({first_line(error)}): give one path a "
            "line (.txt), a table with a column path (.csv, .tsv), or JSON lines (.jsonl)"
        ) from error
    recordings = []
    for word, language in rows:
        path = file.parent / word
        name = Path(*(part for part in Path(word).parts if part not in ("..", ".", "/")))
        code = language_code(language, f"--audio {file}: language") if language else ""
        recordings.append((path, name, code))
    names = Counter(str(name) for _, name, _ in recordings)
    twice = [name for name, number in names.items() if number > 1]
    if twice:
        raise UserError(f"--audio {file}: {twice[0]} is in it {names[twice[0]]} times: keep one")
    return recordings


def _rows(file: Path) -> Iterator[tuple[str, str]]:
    """Path and language of each row."""
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix.lower() == ".txt":
        yield from ((line.strip(), "") for line in text.splitlines() if line.strip())
        return
    if file.suffix.lower() == ".jsonl":
        records: Sequence[dict[str, str]] = [
            json.loads(line) for line in text.splitlines() if line.strip()
        ]
    else:
        delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
        records = list(csv.DictReader(text.splitlines(), delimiter=delimiter, strict=True))
    for number, record in enumerate(records, 1):
        column = next((name for name in PATH_COLUMNS if record.get(name)), None)
        if column is None:
            raise ValueError(f"row {number} has no {PATH_COLUMNS[0]}")
        yield str(record[column]), str(record.get("language") or record.get("locale") or "")
