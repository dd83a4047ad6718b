"""Recordings -> transcripts: read, cut at pauses, decoded in batches across recordings, written."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.audio import SAMPLE_RATE, AudioError
from transcription.media import read_pieces
from transcription.output import Transcripts
from transcription.recordings import Recording
from transcription.runtimes import Runtime
from transcription.segments import Options, Segment, decode_stretches, detect_language
from transcription.stretches import Stretch, find_stretches
from transcription.vad import SileroVAD

WAITING_SECONDS = 600.0  # of speech that is held before it is decoded
GROUP_BYTES = 32 * 2**20  # files are decoded together up to this size in all
GROUP_FILES = 256
LANGUAGE_STRETCHES = 5  # from which the language of a recording is detected


def groups(recordings: Sequence[Recording]) -> Iterator[list[Recording]]:
    """Recordings that are decoded together.

    Always the same for the same files, whichever are finished: the last bits of a batch depend on
    what is in it, so a run that was killed repeats whole groups and writes the same bytes.
    """
    group, size = [], 0
    for recording in recordings:
        own = recording.path.stat().st_size if recording.path.exists() else 0
        if group and (size + own > GROUP_BYTES or len(group) == GROUP_FILES):
            yield group
            group, size = [], 0
        group.append(recording)
        size += own
    if group:
        yield group


def read_stretches(
    recordings: Sequence[Recording], vad: SileroVAD, min_pause: float
) -> Iterator[Stretch]:
    """The stretches of all recordings that can be read, as far as they are asked for."""
    for recording in recordings:
        with contextlib.suppress(AudioError):  # reported where it is transcribed
            yield from find_stretches(read_pieces(recording.path), vad, min_pause=min_pause)


@dataclass
class Job:
    """A recording on its way."""

    recording: Recording
    transcripts: Transcripts
    language: str  # of all its speech; "" is not known yet
    language_probability: float | None = None
    seconds: float = 0.0
    has_begun: bool = False
    is_read: bool = False
    counts: dict[str, float] = field(default_factory=dict)
    dropped: list[dict[str, Any]] = field(default_factory=list)

    def count(self, name: str, number: float = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + number


@dataclass(frozen=True)
class Work:
    """How recordings are transcribed."""

    runtime: Runtime
    vad: SileroVAD
    options: Options
    formats: list[str]
    folder: Path
    header: dict[str, Any]  # of every transcript
    language: str = ""  # code of all speech; "" is detected
    by_segment: bool = False  # detect the language of each stretch by itself
    min_pause: float = 0.5
    progress: Callable[[float], None] = lambda seconds: None  # seconds of audio that are done


def transcribe_group(
    group: Sequence[Recording], work: Work
) -> tuple[list[Job], dict[Recording, str]]:
    """Transcribe recordings together: those that are written, and why the others failed."""
    written: list[Job] = []
    failed: dict[Recording, str] = {}
    waiting: list[tuple[Job, Stretch]] = []
    jobs: list[Job] = []

    def decode() -> None:
        _decode([pair for pair in waiting if pair[0].recording not in failed], work)
        waiting.clear()
        for job in [job for job in jobs if job.is_read]:
            _finish(job, work)
            written.append(job)
            jobs.remove(job)

    for recording in group:
        job = Job(
            recording,
            Transcripts(work.folder, recording, work.formats),
            recording.language or work.language,
        )
        jobs.append(job)
        try:
            for stretch in find_stretches(_timed(job, work), work.vad, min_pause=work.min_pause):
                waiting.append((job, stretch))
                if math.fsum(own.seconds for _, own in waiting) >= WAITING_SECONDS:
                    decode()
            job.is_read = True
        except AudioError as error:
            job.transcripts.discard()
            jobs.remove(job)
            failed[recording] = str(error)
    decode()
    return written, failed


def _timed(job: Job, work: Work) -> Iterator[np.ndarray]:
    """The samples of a recording, counted."""
    for piece in read_pieces(job.recording.path):
        job.seconds += len(piece) / SAMPLE_RATE
        work.progress(len(piece) / SAMPLE_RATE)
        yield piece


def _decode(waiting: Sequence[tuple[Job, Stretch]], work: Work) -> None:
    """Decode stretches of several recordings together, and add them to their transcripts."""
    if not waiting:
        return
    _detect_languages(waiting, work)
    segments = decode_stretches(
        work.runtime,
        [stretch for _, stretch in waiting],
        [job.language for job, _ in waiting],
        work.options,
    )
    for (job, _), segment in zip(waiting, segments, strict=True):
        _begin(job, work, segment)
        _add(job, segment)


def _detect_languages(waiting: Sequence[tuple[Job, Stretch]], work: Work) -> None:
    """Set the language of each recording that has none yet, from its first stretches.

    A single stretch is left out: its language is detected where it is decoded, without encoding it
    twice.
    """
    if work.by_segment or not work.runtime.languages:
        return
    first: dict[Recording, list[Stretch]] = {}
    jobs = {job.recording: job for job, _ in waiting}
    for job, stretch in waiting:
        if not job.language:
            first.setdefault(job.recording, []).append(stretch)
    for recording, stretches in first.items():
        if len(stretches) > 1 or not jobs[recording].is_read:
            job = jobs[recording]
            job.language, job.language_probability = detect_language(
                work.runtime, stretches[:LANGUAGE_STRETCHES], work.options
            )


def _begin(job: Job, work: Work, segment: Segment | None) -> None:
    """Write what stands before the segments, once."""
    if job.has_begun:
        return
    job.has_begun = True
    language, probability = job.language, job.language_probability
    if segment and not language and not work.by_segment:  # a single stretch
        language, probability = segment.language, segment.language_probability
    job.transcripts.begin(
        {"file": job.recording.path.name}
        | work.header
        | {"language": language or None, "language_probability": probability}
    )


def _add(job: Job, segment: Segment) -> None:
    """Add a segment, unless it is dropped; then it is counted and listed."""
    job.count("stretches")
    job.count("speech_seconds", segment.end - segment.start)
    if not segment.text and not segment.dropped:
        segment = replace(segment, dropped="empty")
    if segment.dropped:
        job.count(segment.dropped)
        row = segment.as_dict()
        del row["words"]
        job.dropped.append(row)
        return
    job.count("segments")
    job.count("words", len(segment.words))
    job.transcripts.add(segment)


def _finish(job: Job, work: Work) -> None:
    _begin(job, work, None)
    job.transcripts.finish(
        {
            "seconds": round(job.seconds, 3),
            "speech_seconds": round(job.counts.get("speech_seconds", 0.0), 2),
            "dropped": job.dropped,
        }
    )
