"""Recordings with a transcript but no times as a manifest for preprocess.py (--align).

What was recognized is read from the json transcripts, so a resumed run writes the same manifest.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.files import write_text
from transcription.matching import Transcript, letters, read_words
from transcription.output import read_transcript, written_language
from transcription.progress import clock
from transcription.recordings import Recording
from transcription.stretches import with_pauses
from transcription.text_clips import Clip, Speech, cut_clips


def write_clips(
    file: Path,
    folder: Path,
    recordings: Sequence[Recording],
    texts: dict[Recording, str],
    *,
    min_match: float,
) -> str:
    """Write a row for every clip, with its words as the transcript spells them.

    Args:
        file: JSON lines; paths in it are relative to its folder.
        folder: with the json transcripts of `recordings`; those that failed have none.
        texts: of the recordings that have one.
        min_match: of a clip; those that match worse are left out.

    Returns:
        A line about what was written and what was left out.
    """
    rows: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()  # stretches of speech, by reason
    speech_seconds, clip_seconds, num_words, clip_words = 0.0, 0.0, 0, 0
    for recording, text in texts.items():
        content = read_transcript(folder, recording)
        if content is None:
            continue
        language = written_language(content)
        speech = _recognized(content, language)
        transcript = read_words(text, language)
        cut = cut_clips(speech, transcript, min_match=min_match)
        origin = {
            "path": str(recording.path.resolve().relative_to(file.resolve().parent)),
            "language": language,
            "speaker": recording.name,  # so that a recording is in one split
            "model": content["adapter"] or content["model"],
            "weights": content["weights"],
        }
        rows += [origin | row for row in _rows(cut.clips, speech, transcript, content["seconds"])]
        left_out.update({reason: len(indices) for reason, indices in cut.left_out.items()})
        speech_seconds += sum(own.end - own.start for own in speech)
        clip_seconds += sum(
            own.end - own.start for clip in cut.clips for own in speech[clip.first : clip.end]
        )
        num_words += len(transcript.words)
        clip_words += sum(clip.end_word - clip.first_word for clip in cut.clips)
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(left_out.items()))
    without = len(recordings) - len(texts)
    return (
        f"{file}: {len(rows)} clips, {clock(clip_seconds)} of {clock(speech_seconds)} of speech, "
        f"{clip_words:,} of {num_words:,} words; stretches left out: {reasons or 'none'}"
        + (f"; recordings without a text: {without}" if without else "")
    )


def _recognized(content: dict[str, Any], language: str) -> list[Speech]:
    """All stretches of a json transcript in order; the texts of those dropped are not used."""
    speech = [
        Speech(own["start"], own["end"], letters(own["text"], language))
        for own in content["segments"]
    ]
    speech += [Speech(own["start"], own["end"], "") for own in content["dropped"]]
    return sorted(speech, key=lambda own: own.start)


def _rows(
    clips: Sequence[Clip], speech: Sequence[Speech], transcript: Transcript, seconds: float
) -> Iterator[dict[str, Any]]:
    """Times, text and match of each clip of a recording that lasts `seconds`."""
    limits = [0.0, *(own.end for own in speech)], [*(own.start for own in speech), seconds]
    for clip in clips:
        start, end = with_pauses(
            speech[clip.first].start,
            speech[clip.end - 1].end,
            before=limits[0][clip.first],
            after=limits[1][clip.end],
        )
        yield {
            "start": start,
            "end": end,
            "text": transcript.part(clip.first_word, clip.end_word),
            "match": round(clip.match, 3),
        }
