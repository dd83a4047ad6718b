"""Stretches of speech in a stream of samples, found by the voice activity detector alone.

A stretch ends at a pause and has at most 30 seconds; a longer one is split at its quietest frame. A
frame has 32 ms. Only the samples of the stretch that is being heard are held.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from common.audio import CHUNK_SECONDS, SAMPLE_RATE, to_pcm
from transcription.vad import FRAME, SileroVAD, SpeechProbabilities

# Silero's defaults are 0.5 and 0.35. On 40 Hindi clips with pauses these lost 0.2 % of the frames
# of speech, and the lower ones 0.006 %; the highest probability of silence, noise, hum and clicks
# was 0.065.
SPEECH_AT, PAUSE_BELOW = 0.3, 0.2
PAD_SECONDS = 0.2  # kept before and after speech
MIN_PAUSE_SECONDS = 0.5  # a shorter pause does not end a stretch
BLOCK_FRAMES = 512  # frames that the detector computes at once
SMOOTH_FRAMES = 5  # over which energy is averaged: longer than the silence inside a consonant
FRAME_SECONDS = FRAME / SAMPLE_RATE
ONSET_SAMPLES = 80  # 5 ms, to which the start of speech is refined
ONSET_DECIBELS = 25.0  # that speech begins with below its loudest parts


def with_pauses(start: float, end: float, *, before: float, after: float) -> tuple[float, float]:
    """Seconds from `start` to `end`, with as much of the pauses around them as was decoded.

    Args:
        before: where the speech before ends.
        after: where the speech after begins.
    """
    first = max(start - PAD_SECONDS, (before + start) / 2)
    last = min(end + PAD_SECONDS, (end + after) / 2)
    return round(first, 2), round(last, 2)


def to_frames(seconds: float) -> int:
    return round(seconds / FRAME_SECONDS)


PAD = to_frames(PAD_SECONDS)
MAX_FRAMES = int(CHUNK_SECONDS / FRAME_SECONDS) - 2 * PAD


@dataclass(frozen=True)
class Stretch:
    """Speech between two pauses."""

    start: float  # seconds from the start of the recording, padding included
    speech_start: float  # where the detector hears speech
    speech_end: float
    samples: np.ndarray  # int16 (N,)

    @property
    def seconds(self) -> float:
        return len(self.samples) / SAMPLE_RATE


@dataclass
class Splitter:
    """Frame by frame, which frames form a stretch: a pure function of the frames so far."""

    min_pause: int = to_frames(MIN_PAUSE_SECONDS)
    start: int | None = None  # first frame of the open stretch
    pause: int | None = None  # first frame of the pause that may end it
    frame: int = 0  # number of frames so far
    is_cut: bool = False  # the open stretch continues one that was split
    energies: deque[float] = field(default_factory=deque)  # of the frames of the open stretch

    def push(self, probability: float, energy: float) -> tuple[int, int, bool, bool] | None:
        """Add a frame: first frame and end of a stretch that is over, and whether each is a split.

        Args:
            probability: of speech.
            energy: mean square of the samples.
        """
        now, self.frame = self.frame, self.frame + 1
        if self.start is None:
            if probability < SPEECH_AT:
                return None
            self.start, self.pause, self.is_cut = now, None, False
            self.energies.clear()
        self.energies.append(energy)
        if probability >= SPEECH_AT:
            self.pause = None
        elif probability < PAUSE_BELOW and self.pause is None:
            self.pause = now
        if self.pause is not None and now + 1 - self.pause >= self.min_pause:
            return self.close()
        if now + 1 - self.start >= MAX_FRAMES:
            return self._split()
        return None

    def close(self) -> tuple[int, int, bool, bool] | None:
        """End the open stretch, if there is one, at its last frame of speech."""
        if self.start is None:
            return None
        end = self.frame if self.pause is None else self.pause
        stretch = (self.start, end, self.is_cut, False)
        self.start = None
        return stretch if end > stretch[0] else None

    def _split(self) -> tuple[int, int, bool, bool]:
        """End the open stretch at the quietest frame of its second half, and open the next."""
        window = np.full(SMOOTH_FRAMES, 1 / SMOOTH_FRAMES)
        smooth = np.convolve(np.array(self.energies), window, mode="same")
        middle = len(smooth) // 2
        quietest = middle + int(smooth[middle:-SMOOTH_FRAMES].argmin())
        cut = self.start + quietest
        stretch = (self.start, cut, self.is_cut, True)
        for _ in range(quietest):
            self.energies.popleft()
        self.start, self.is_cut = cut, True
        if self.pause is not None:
            self.pause = max(self.pause, cut)
        return stretch


def find_stretches(
    pieces: Iterable[np.ndarray], vad: SileroVAD, *, min_pause: float = MIN_PAUSE_SECONDS
) -> Iterator[Stretch]:
    """Stretches of speech in float32 pieces (n,) at 16 kHz, as they end.

    Args:
        min_pause: seconds without speech that end a stretch.
    """
    hear, splitter = SpeechProbabilities(vad), Splitter(max(2 * PAD, to_frames(min_pause)))
    held, first = np.zeros(0, np.int16), 0  # samples from frame `first` on

    def cut(limits: tuple[int, int, bool, bool]) -> Stretch:
        start, end, is_cut, ends_in_cut = limits
        low = start if is_cut else max(start - PAD, 0)
        high = end if ends_in_cut else end + PAD
        samples = held[(low - first) * FRAME : (high - first) * FRAME].copy()
        begin = start * FRAME if is_cut else low * FRAME + _onset(samples, (start - low) * FRAME)
        return Stretch(low * FRAME_SECONDS, begin / SAMPLE_RATE, end * FRAME_SECONDS, samples)

    for block in _blocks(pieces):
        held = np.concatenate([held, to_pcm(block)])
        frames = np.pad(block, (0, -len(block) % FRAME))  # the last block
        energies = np.square(frames.reshape(-1, FRAME)).mean(axis=1)
        for probability, energy in zip(hear(frames).tolist(), energies.tolist(), strict=True):
            limits = splitter.push(probability, energy)
            if limits:
                yield cut(limits)
        needed = splitter.frame if splitter.start is None else splitter.start
        keep = max(needed - PAD, first)
        held, first = held[(keep - first) * FRAME :], keep
    limits = splitter.close()
    if limits:
        yield cut(limits)


def _onset(samples: np.ndarray, detected: int) -> int:
    """Where speech becomes loud, in samples, close to where it was detected.

    The detector notices speech up to a frame late, and its frames are coarse.
    """
    low, high = max(detected - 2 * FRAME, 0), detected + FRAME
    pieces = samples[: len(samples) // ONSET_SAMPLES * ONSET_SAMPLES].astype(np.float64)
    energy = np.square(pieces.reshape(-1, ONSET_SAMPLES)).mean(axis=1)
    if not len(energy):
        return detected
    is_loud = energy > np.percentile(energy, 95) * 10 ** (-ONSET_DECIBELS / 10)
    near = np.flatnonzero(is_loud[low // ONSET_SAMPLES : high // ONSET_SAMPLES])
    return low + int(near[0]) * ONSET_SAMPLES if len(near) else detected


def _blocks(pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The same samples in blocks of BLOCK_FRAMES frames, wherever the pieces end."""
    size, waiting, number = BLOCK_FRAMES * FRAME, [], 0
    for piece in pieces:
        waiting.append(piece)
        number += len(piece)
        if number >= size:
            joined = np.concatenate(waiting)
            whole = len(joined) // size * size
            yield from joined[:whole].reshape(-1, size)
            waiting, number = [joined[whole:]], len(joined) - whole
    if number:
        yield np.concatenate(waiting)
