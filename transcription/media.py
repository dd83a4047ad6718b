"""Any audio or video file as a stream of 16 kHz mono pieces, read once, in constant memory."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.audio import SAMPLE_RATE, AudioError
from common.cli import UserError, first_line

REQUIREMENTS = "requirements-export.txt"
# A gap in the timestamps that is longer is silence that the recorder left out, as browsers do in
# webm; without it, all later times would be too early. Timestamps are rounded to milliseconds.
GAP_SECONDS = 0.1
SHORT_SHARE = 0.98  # of the announced length; a file that ends before it is cut off
SHORT_SECONDS = 1.0  # announced lengths are rounded, and estimated from the bit rate of an mp3
OPTIONS = {"protocol_whitelist": "file"}  # a playlist must not make FFmpeg open addresses


def check_installed() -> None:
    """Raise UserError unless PyAV is there."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"recordings are read with PyAV, which is not installed: pip install -r {REQUIREMENTS}"
        ) from error


def announced_seconds(path: Path) -> float:
    """The length that a file's header announces; 0 where it does not say or cannot be read."""
    import av

    try:
        with path.open("rb") as file, av.open(file, container_options=OPTIONS) as container:
            return max((container.duration or 0) / av.time_base, 0.0)
    except (av.FFmpegError, OSError, ValueError):
        return 0.0


def read_pieces(path: Path) -> Iterator[np.ndarray]:
    """Decode the first audio track of a file: float32 (n,) pieces at 16 kHz, mean of its channels.

    Sample 0 is the start of the file, also where a video's sound starts later: times are those that
    a player shows.

    Raises:
        AudioError: the file is not audio or video, has no sound, or is damaged or cut off.
    """
    import av

    try:
        with path.open("rb") as file, av.open(file, container_options=OPTIONS) as container:
            if not container.streams.audio:
                raise AudioError("it has no audio track")
            announced = (container.duration or 0) / av.time_base
            length = 0
            for piece in _resample(container, announced):
                length += len(piece)
                yield piece
    except (av.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, AudioError):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise AudioError(f"it cannot be read: {reason}") from error
    seconds = length / SAMPLE_RATE
    if seconds < min(announced * SHORT_SHARE, announced - SHORT_SECONDS):
        raise AudioError(f"it is cut off: {seconds:.1f} of {announced:.1f} s are there")
    if not length:
        raise AudioError("it holds no sound")


def _resample(container: "av.container.InputContainer", announced: float) -> Iterator[np.ndarray]:  # noqa: F821
    """Pieces of the first audio track, with silence where its timestamps leave a gap."""
    import av

    resampler = av.AudioResampler("flt", "mono", SAMPLE_RATE)
    origin = (container.start_time or 0) / av.time_base
    position, gaps = 0.0, 0.0  # seconds decoded so far, and of silence added
    for frame in itertools.chain(container.decode(audio=0), [None]):  # None: what is left
        if frame is not None:
            if frame.time is not None:
                gap = frame.time - origin - position
                if GAP_SECONDS < gap <= announced - position:
                    yield from _silence(gap)
                    position += gap
                    gaps += gap
            position += frame.samples / frame.sample_rate
            frame.pts = None  # the resampler need not know about gaps
        for part in resampler.resample(frame):
            samples = part.to_ndarray()[0]
            if not np.isfinite(samples).all():
                raise AudioError("its samples are not finite numbers")
            yield samples


def _silence(seconds: float) -> Iterator[np.ndarray]:
    left = round(seconds * SAMPLE_RATE)
    while left > 0:
        size = min(left, SAMPLE_RATE)
        yield np.zeros(size, np.float32)
        left -= size
