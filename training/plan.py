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
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset

from common import batching
from common.batching import GlobalBatch, MicroBatch
from common.collator import EncoderStates, SpeechCollator, load_batches
from common.windows import WindowMode

Inputs = dict[str, torch.Tensor]  # a collated piece: what SpeechLoss takes, by name


@dataclass(frozen=True)
class Step:
    """One optimizer step of this process."""

    number: int  # from 0
    epoch: int
    batch: GlobalBatch
    num_tokens: int  # label tokens of the global batch, over all processes
    pieces: Sequence[MicroBatch]  # of this process


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

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.seconds) / self.global_batch_size)

    def epoch(self, epoch: int) -> list[Step]:
        """All steps of an epoch, numbered from the start of the run."""
        batches = batching.plan(
            self.seconds,
            global_batch_size=self.global_batch_size,
            seed=self.seed,
            epoch=epoch,
            window_mode=self.window_mode,
            windows=self.windows,
        )
        return [
            self._step(epoch * len(batches) + i, epoch, batch) for i, batch in enumerate(batches)
        ]

    def _step(self, number: int, epoch: int, batch: GlobalBatch) -> Step:
        pieces = batching.micro_batches(
            batch,
            rank=self.rank,
            num_processes=self.num_processes,
            max_batch_seconds=self.max_batch_seconds,
            label_lengths=self.label_lengths,
            windows=self.windows,
        )
        num_tokens = int(self.label_lengths[list(batch.clips)].sum())
        return Step(number, epoch, batch, num_tokens, pieces)


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
        steps = [step for step in plan.epoch(epoch) if first <= step.number < total]
        pieces = [piece for step in steps for piece in step.pieces]
        loader = iter(load_batches(dataset, pieces, collate, num_workers=num_workers, cache=cache))
        for step in steps:
            yield step, (next(loader) for _ in step.pieces)
