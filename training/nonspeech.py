"""Clips without speech beside those of a training batch, so that a model learns to write nothing.

They are extra clips: an epoch still has every clip of the corpus once, and their share is what they
cost in time. Each has a partner in its batch, whose length and prompt it takes; its text is empty.
What it sounds like is a function of (seed, step, number in the step).

Legend: N samples at 16 kHz.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from common.audio import to_pcm
from common.batching import GlobalBatch
from common.collator import read_samples
from common.levels import MIN_PAUSE_SECONDS, lengthen, longest_pause, num_samples
from training.augment import generator
from training.sounds import KINDS

PAUSE_SHARE = 0.2  # of clips without speech are pauses; the other kinds are equally frequent
SEARCHED = 4  # clips at most that a pause is looked for in, before another kind is taken


@dataclass(frozen=True)
class Nonspeech:
    """A clip without speech."""

    step: int
    number: int  # in the step
    partner: int  # row of the clip whose length and prompt it takes


def beside(batch: GlobalBatch, share: float, *, seed: int, step: int) -> list[Nonspeech]:
    """The clips without speech of a step, `share` for each clip of its batch.

    Their number is rounded at random, so that the share is exact on the average of many steps.
    """
    rng = generator(seed, "nonspeech", step)
    count = int(share * len(batch.clips) + rng.random())
    partners = rng.integers(len(batch.clips), size=count)
    return [Nonspeech(step, i, batch.clips[partner]) for i, partner in enumerate(partners)]


def draw_samples(clip: Nonspeech, seconds: float, dataset: Dataset, seed: int) -> np.ndarray:
    """What a clip without speech sounds like, int16 (N,).

    Args:
        seconds: its length.
        dataset: clips that pauses are cut from: those that are trained on.

    Raises:
        UserError: a clip that a pause is looked for in is damaged.
    """
    rng = generator(seed, "sound", clip.step, clip.number)
    if rng.random() < PAUSE_SHARE:
        for row in rng.integers(len(dataset), size=SEARCHED).tolist():
            pause = longest_pause(read_samples(dataset[row]).astype(np.float32) / 32_768)
            if len(pause) >= num_samples(MIN_PAUSE_SECONDS):
                return to_pcm(lengthen(pause, seconds))
    kinds = list(KINDS.values())
    return to_pcm(kinds[rng.integers(len(kinds))](rng, seconds))


def empty_labels(labels: Sequence[int], prompt_length: int) -> list[int]:
    """Labels without a text: the prompt of `labels` and the end token.

    >>> empty_labels([7, 1, 2, 3, 50, 51, 9], 4)
    [7, 1, 2, 3, 9]
    """
    return [*labels[:prompt_length], labels[-1]]


def make_row(
    clip: Nonspeech, seconds: float, dataset: Dataset, *, seed: int, prompt_length: int
) -> dict[str, Any]:
    """A clip without speech as a row of the prepared dataset; raises as `draw_samples`."""
    partner = dataset[clip.partner]
    return {
        "id": f"without speech {clip.number + 1} of step {clip.step + 1}",
        "audio": draw_samples(clip, seconds, dataset, seed),
        "labels": empty_labels(partner["labels"], prompt_length),
    }
