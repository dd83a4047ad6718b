"""The steps of a run from any position: the clips of each optimizer step, and its pieces.

Why not Accelerate's own loaders, `accumulate`, `gather_for_metrics` and `save_state`:

* Its loaders give each process batches of its own. Here a global batch is planned first and then
  cut, so that the clips of a step, and with them the loss curve, do not depend on the number of
  processes; pieces of one step have equal shapes on all of them.
* `accumulate` counts calls, and averages a mean over each. Here a step has as many pieces as memory
  asks for, and its loss is a sum divided once by the label tokens of the global batch.
* `gather_for_metrics` drops what a sampler repeats at the end. Here predictions are gathered by
  clip id (`common.predictions`).
* `save_state` writes pickles in each engine's own form, for as many processes as wrote it. Here
  whole tensors are saved (`training.checkpoint`), which any engine on any number of processes
  resumes from; the position is the number of the step.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset

from common import batching
from common.batching import GlobalBatch, MicroBatch
from common.collator import EncoderStates, SpeechCollator, load_batches
from common.labels import PROMPT_LENGTH, num_prompt_tokens
from common.prepared import column, label_lengths
from common.windows import WindowMode
from training import augment, nonspeech
from training.clips import EpochClips
from training.data import Data
from training.nonspeech import Nonspeech

Inputs = dict[str, torch.Tensor]  # a collated piece: what SpeechLoss takes, by name


@dataclass(frozen=True)
class Step:
    """One optimizer step of this process."""

    number: int  # from 0
    epoch: int
    batch: GlobalBatch
    num_tokens: int  # label tokens of the global batch, over all processes
    pieces: Sequence[MicroBatch]  # of this process
    speech: tuple[int, ...]  # clips of the batch that are of the dataset
    seconds: np.ndarray  # (rows,) length of each row of the epoch

    @property
    def audio_seconds(self) -> float:
        """Of the clips with speech."""
        return float(self.seconds[list(self.speech)].sum())


@dataclass(frozen=True)
class Epoch:
    """The steps of an epoch, numbered from the start of the run, and what was drawn for it.

    Its rows are the clips of the dataset and, after them, its clips without speech.
    """

    steps: list[Step]
    seconds: np.ndarray  # (rows,) length of each row, at its speed
    speeds: np.ndarray  # (N,) of the clips of the dataset
    nonspeech: list[Nonspeech]


@dataclass(frozen=True)
class TrainPlan:
    """What decides the steps of a run. The number of processes changes only their pieces."""

    seconds: np.ndarray  # (N,) length of each clip
    label_lengths: np.ndarray  # (N,) label tokens of each clip
    global_batch_size: int
    seed: int
    window_mode: WindowMode
    max_batch_seconds: float  # of window in a piece
    rank: int = 0
    num_processes: int = 1
    windows: np.ndarray | None = None  # (N,) positions of each clip, for cached encoder outputs
    speed: float = 0.0  # clips are played at 1 - speed, 1 or 1 + speed
    nospeech_share: float = 0.0  # clips without speech for each clip of the dataset
    prompt_length: int = PROMPT_LENGTH  # tokens of the prompt in labels

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.seconds) / self.global_batch_size)

    def epoch(self, epoch: int) -> Epoch:
        """All steps of an epoch, and its rows."""
        speeds = augment.speeds(self.seconds, self.speed, seed=self.seed, epoch=epoch)
        seconds = self.seconds / speeds
        batches = batching.plan(
            seconds,
            global_batch_size=self.global_batch_size,
            seed=self.seed,
            epoch=epoch,
            window_mode=self.window_mode,
            windows=self.windows,
        )
        first, added, mixed = epoch * len(batches), [], []
        for i, batch in enumerate(batches):
            group = nonspeech.beside(batch, self.nospeech_share, seed=self.seed, step=first + i)
            start = len(seconds) + len(added)
            rows = range(start, start + len(group))
            mixed.append(replace(batch, clips=(*batch.clips, *rows)))
            added += group
        seconds = np.append(seconds, seconds[[clip.partner for clip in added]])
        # Of a clip without speech: its prompt without the start token, and the end token.
        lengths = np.append(self.label_lengths, [self.prompt_length] * len(added)).astype(int)
        steps = [
            self._step(first + i, epoch, batch, seconds, lengths) for i, batch in enumerate(mixed)
        ]
        return Epoch(steps, seconds, speeds, added)

    def _step(
        self, number: int, epoch: int, batch: GlobalBatch, seconds: np.ndarray, lengths: np.ndarray
    ) -> Step:
        """Args: seconds, lengths: (rows,) length and label tokens of each row of the epoch."""
        speech = tuple(clip for clip in batch.clips if clip < len(self.seconds))
        pieces = batching.micro_batches(
            batch,
            rank=self.rank,
            num_processes=self.num_processes,
            max_batch_seconds=self.max_batch_seconds,
            label_lengths=lengths,
            windows=self.windows,
        )
        num_tokens = int(lengths[list(batch.clips)].sum())
        return Step(number, epoch, batch, num_tokens, pieces, speech, seconds)


def make_plan(data: Data, accelerator: Accelerator, **options: Any) -> TrainPlan:
    """The plan of the training clips on these processes; `options` are its other fields."""
    return TrainPlan(
        seconds=column(data.train, "seconds"),
        label_lengths=label_lengths(data.train) - 1,  # the start token is cut
        prompt_length=num_prompt_tokens(data.tokenizer),
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
        **options,
    )


def load_steps(
    plan: TrainPlan,
    dataset: Dataset,
    collate: SpeechCollator,
    *,
    first: int,
    total: int,
    num_workers: int,
    cache: EncoderStates | None = None,
) -> Iterator[tuple[Step, Iterator[Inputs]]]:
    """Yield the steps from `first` up to `total`, each with an iterator over its pieces."""
    last_epoch = math.ceil(total / plan.steps_per_epoch)
    for epoch in range(first // plan.steps_per_epoch, last_epoch):
        drawn = plan.epoch(epoch)
        steps = [step for step in drawn.steps if first <= step.number < total]
        pieces = [piece for step in steps for piece in step.pieces]
        rows = dataset
        if drawn.nonspeech or plan.speed:
            rows = EpochClips(
                dataset, drawn.seconds, drawn.speeds, drawn.nonspeech, plan.seed,
                plan.prompt_length,
            )  # fmt: skip
        loader = iter(load_batches(rows, pieces, collate, num_workers=num_workers, cache=cache))
        for step in steps:
            yield step, (next(loader) for _ in step.pieces)
