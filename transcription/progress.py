"""How far a transcription is, and how long it will still take."""

import sys
import time
from collections import Counter
from collections.abc import Sequence

from common.progress import LINE_EVERY_SECONDS
from transcription.pipeline import Job

DROPPED = {"no_speech": "no speech", "repetition": "repetition", "empty": "no text"}


def clock(seconds: float) -> str:
    """
    >>> clock(3723.4)
    '1:02:03'
    """
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


class Meter:
    """Seconds of audio that are done, of those that the files announce."""

    def __init__(self, total: float) -> None:
        self.total = total
        self.done = 0.0
        self.start = self.last = time.monotonic()
        self.counts: Counter[str] = Counter()
        self.files = 0

    def add(self, seconds: float) -> None:
        """Add what has been read, and print a line once in a while."""
        self.done += seconds
        now = time.monotonic()
        every = 1.0 if sys.stderr.isatty() else LINE_EVERY_SECONDS
        if now - self.last < every:
            return
        self.last = now
        total = max(self.total, self.done)
        left = (now - self.start) * (total - self.done) / self.done
        line = f"{clock(self.done)} of {clock(total)} of audio, {clock(left)} left"
        if sys.stderr.isatty():
            print(f"\r{line} ", end="", file=sys.stderr, flush=True)
        else:
            print(line, flush=True)

    def report(self, jobs: Sequence[Job]) -> None:
        """Count what was written of some recordings."""
        self.files += len(jobs)
        for job in jobs:
            self.counts.update(job.counts)
            self.counts["seconds"] += job.seconds

    def summarise(self) -> None:
        """Print what was written, and what was dropped and why."""
        own = self.counts
        if not self.files:
            return
        dropped = [f"{own[name]:.0f} {words}" for name, words in DROPPED.items() if own[name]]
        print(
            f"{self.files} transcribed: {clock(own['seconds'])} of audio, "
            f"{clock(own['speech_seconds'])} of speech, {own['segments']:.0f} segments, "
            f"{own['words']:.0f} words; dropped segments: {', '.join(dropped) or 'none'}"
        )
