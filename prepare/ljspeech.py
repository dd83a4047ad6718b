"""Tables of speech synthesis, which have no header: `ID|text|normalized text`, as in LJSpeech.

They are read if nothing else is possible: two or three columns with `|` between them, the first of
which leads to a file. Tacotron's and VITS's `path|text` and `path|speaker|text` are of this form.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

PATHS = ("{}", "{}.wav", "wavs/{}.wav", "wavs/{}", "{}.flac", "wavs/{}.flac")  # of an ID
SAMPLE_ROWS = 100  # that are looked at
SEPARATOR = "|"


@dataclass(frozen=True)
class Layout:
    """What the columns are, and where the audio of an ID is."""

    header: tuple[str, ...]  # names of the columns, as in `columns`
    path: str  # a member of PATHS

    def __str__(self) -> str:
        """A line for the user."""
        used = {"path": "audio", "text": "text", "speaker": "speaker", "": "not used"}
        meanings = (f"column {i} is {used[name]}" for i, name in enumerate(self.header, 1))
        return f"no header, read as LJSpeech's: {', '.join(meanings)}; audio is {self.path}"


def find_layout(file: TextIO, path: Path) -> Layout | None:
    """The layout of a table, or `None` if it is not unmistakable.

    Args:
        file: the open table, at its start; it is left anywhere.
        path: of the table; audio is in its folder.
    """
    lines = (line.rstrip("\r\n") for line in itertools.islice(file, SAMPLE_ROWS))
    rows = [line.split(SEPARATOR) for line in lines if line]
    if not rows or len(rows[0]) not in (2, 3) or {len(row) for row in rows} != {len(rows[0])}:
        return None
    audio = next((form for form in PATHS if _is_file(path.parent, form, rows[0][0])), "")
    if not audio:
        return None
    if len(rows[0]) == 2:
        return Layout(("path", "text"), audio)
    is_speaker = not any(" " in row[1].strip() for row in rows) and any(
        " " in row[2].strip() for row in rows
    )
    return Layout(("path", "speaker" if is_speaker else "", "text"), audio)


def _is_file(folder: Path, form: str, name: str) -> bool:
    """Whether an ID leads to a file in a folder; a path outside is refused with its row."""
    try:
        return bool(name.strip()) and (folder / form.format(name.strip())).is_file()
    except (OSError, ValueError):  # a long name, or a null character
        return False
