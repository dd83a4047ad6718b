"""The transcripts of one recording: written under temporary names, then renamed."""

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from common.files import PARTIAL
from transcription.formats import FORMATS, Format
from transcription.recordings import Recording, changed
from transcription.segments import Segment


def is_finished(folder: Path, recording: Recording, formats: list[str]) -> bool:
    """Whether all transcripts of a recording are there, and none is older than it."""
    paths = (transcript_path(folder, recording, suffix) for suffix in formats)
    return all(changed(path) >= changed(recording.path) and path.exists() for path in paths)


def transcript_path(folder: Path, recording: Recording, suffix: str) -> Path:
    return folder / f"{recording.name}.{suffix}"


def read_transcript(folder: Path, recording: Recording) -> dict[str, Any] | None:
    """The json transcript of a recording, None if it failed."""
    path = transcript_path(folder, recording, "json")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def written_language(transcript: dict[str, Any]) -> str:
    """The code of the language of a json transcript; of most segments where each has its own."""
    if transcript["task"] == "translate":
        return "en"
    codes = Counter(segment["language"] for segment in transcript["segments"])
    return transcript["language"] or max(codes, key=codes.__getitem__, default="")


@dataclass
class Growing:
    """A transcript in one format that is being written."""

    path: Path
    format: Format
    file: TextIO


class Transcripts:
    """The transcripts of one recording in all formats, a segment at a time."""

    def __init__(self, folder: Path, recording: Recording, formats: list[str]) -> None:
        self.growing: list[Growing] = []
        for suffix in formats:
            path = transcript_path(folder, recording, suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + PARTIAL)
            file = partial.open("w", encoding="utf-8", newline="\n")
            self.growing.append(Growing(path, FORMATS[suffix](), file))

    def begin(self, header: dict[str, Any]) -> None:
        for own in self.growing:
            own.file.write(own.format.begin(header))

    def add(self, segment: Segment) -> None:
        for own in self.growing:
            own.file.write(own.format.add(segment))

    def finish(self, footer: dict[str, Any]) -> None:
        """Complete the files; each appears whole."""
        for own in self.growing:
            own.file.write(own.format.end(footer))
            own.file.flush()
            os.fsync(own.file.fileno())
            own.file.close()
            Path(own.file.name).replace(own.path)

    def discard(self) -> None:
        """Remove what has been written."""
        for own in self.growing:
            own.file.close()
            Path(own.file.name).unlink(missing_ok=True)
