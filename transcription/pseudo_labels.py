"""Transcripts as a manifest for preprocess.py: training data from recordings without any.

Rows are read from the json transcripts, so a resumed run writes the same manifest.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.files import write_text
from transcription.output import transcript_path
from transcription.recordings import Recording
from transcription.stretches import with_pauses


def check_place(file: Path, recordings: Sequence[Recording]) -> None:
    """Raise UserError if preprocess.py would not find the recordings from the manifest."""
    folder = file.resolve().parent
    outside = [own.path for own in recordings if not own.path.resolve().is_relative_to(folder)]
    if outside:
        raise UserError(
            f"--manifest {file}: preprocess.py reads recordings beside or below a manifest only: "
            f"give a file in {outside[0].resolve().parent} or a folder above it"
        )


def write_manifest(
    file: Path,
    folder: Path,
    recordings: Sequence[Recording],
    *,
    min_confidence: float,
    min_language: float,
) -> str:
    """Write a row for every segment that passes both filters.

    Args:
        file: JSON lines; paths in it are relative to its folder.
        folder: with the json transcripts of `recordings`; those that failed have none.
        min_confidence: geometric mean of the probabilities of a text's tokens.
        min_language: probability of the segment's language.

    Returns:
        A line about what was written and what was left out.
    """
    left_out: Counter[str] = Counter()
    rows = []
    for recording in recordings:
        path = transcript_path(folder, recording, "json")
        if not path.is_file():
            continue
        transcript = json.loads(path.read_text(encoding="utf-8"))
        left_out.update(row["dropped"] for row in transcript["dropped"])
        for segment, row in zip(
            transcript["segments"], _rows(file, recording, transcript), strict=True
        ):
            if row["confidence"] is None or row["confidence"] < min_confidence:
                left_out["confidence"] += 1
            elif (segment["language_probability"] or 1.0) < min_language:
                left_out["language"] += 1
            else:
                rows.append(row)
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(left_out.items()))
    return f"{file}: {len(rows)} segments; left out: {reasons or 'none'}"


def _rows(file: Path, recording: Recording, transcript: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each segment, with as much of the pauses around it as was decoded."""
    segments = transcript["segments"]
    ends = [0.0, *(segment["end"] for segment in segments)]
    starts = [*(segment["start"] for segment in segments), transcript["seconds"]][1:]
    model = transcript["adapter"] or transcript["model"]
    for segment, before, after in zip(segments, ends, starts, strict=False):
        logprob = segment["logprob"]
        start, end = with_pauses(segment["start"], segment["end"], before=before, after=after)
        yield {
            "path": str(recording.path.resolve().relative_to(file.resolve().parent)),
            "start": start,
            "end": end,
            "text": segment["text"],
            "language": segment["language"],
            "speaker": recording.name,  # so that a recording is in one split
            "confidence": None if logprob is None else round(math.exp(logprob), 3),
            "model": model,
            "weights": transcript["weights"],
        }
