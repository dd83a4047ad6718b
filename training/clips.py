"""The rows of an epoch: the clips of the dataset at their speeds, then clips without speech."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from common.collator import read_samples
from training import nonspeech
from training.augment import play
from training.nonspeech import Nonspeech


@dataclass(frozen=True)
class EpochClips:
    """A map-style dataset: row i is clip i as it is in this epoch; the rest is without speech."""

    dataset: Dataset
    seconds: np.ndarray  # (rows,) length of each row in this epoch
    speeds: np.ndarray  # (clips,)
    nonspeech: Sequence[Nonspeech]  # of the rows after the clips
    seed: int
    prompt_length: int  # tokens of the prompt in labels

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row whose audio is int16 (N,) where it was changed, and FLAC where it was not.

        Raises:
            UserError: audio that cannot be decoded.
        """
        if index >= len(self.dataset):
            return nonspeech.make_row(
                self.nonspeech[index - len(self.dataset)], float(self.seconds[index]),
                self.dataset, seed=self.seed, prompt_length=self.prompt_length,
            )  # fmt: skip
        row, speed = self.dataset[index], float(self.speeds[index])
        return row if speed == 1.0 else row | {"audio": play(read_samples(row), speed)}
