"""SpeechCollator: rows of the prepared dataset -> waves (B, N), labels (B, T), and the decoder's
inputs, which are the labels shifted right, and where in them label tokens are.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from common import audio
from common.batching import DecodeBatch, MicroBatch
from common.cli import OwnError, UserError

IGNORED = -100  # label value that torch's cross entropy leaves out


@dataclass(frozen=True)
class SpeechCollator:
    """Pad stored clips with silence to the window of their batch, and pad their labels.

    Features are computed by the model, on its device. Label rows lose their start token, which
    shifting right puts back before them; padding is `IGNORED` by length, so the end token stays in
    the loss.

    >>> import numpy as np
    >>> collate = SpeechCollator(decoder_start_token_id=7, pad_token_id=9)
    >>> clip = {"audio": audio.encode_flac(np.zeros(16_000)), "labels": [7, 3, 4, 9]}
    >>> batch = collate([clip, None], window=160, label_length=5)
    >>> batch["waves"].shape
    torch.Size([2, 51200])
    >>> batch["labels"].tolist()
    [[3, 4, 9, -100, -100], [-100, -100, -100, -100, -100]]
    >>> batch["decoder_input_ids"].tolist()
    [[7, 3, 4, 9, 9], [7, 9, 9, 9, 9]]
    >>> batch["label_positions"].tolist()
    [0, 1, 2]
    """

    decoder_start_token_id: int
    pad_token_id: int  # of decoder inputs; the same as the end token in every Whisper

    def __call__(
        self, rows: Sequence[dict[str, Any] | None], *, window: int, label_length: int
    ) -> dict[str, torch.Tensor]:
        """Collate rows (`None` is filler: silence, nothing in the loss) at `window` positions.

        Args:
            label_length: T; 0 leaves the labels out, for decoding.

        Raises:
            UserError: a label row that does not begin with the start token, or audio that cannot be
                decoded.
        """
        waves = self.waves(rows, window)
        return waves | (self.labels(rows, label_length) if label_length else {})

    def waves(self, rows: Sequence[dict[str, Any] | None], window: int) -> dict[str, torch.Tensor]:
        """waves: int16 (B, N) at 16 kHz, N that of `window` positions."""
        waves = torch.zeros(len(rows), window * audio.SAMPLES_PER_POSITION, dtype=torch.int16)
        for i, row in enumerate(rows):
            if row is not None:
                clip = torch.from_numpy(read_samples(row))[: waves.shape[1]]
                waves[i, : len(clip)] = clip  # the window holds the clip but for rounding
        return {"waves": waves}

    def labels(
        self, rows: Sequence[dict[str, Any] | None], label_length: int
    ) -> dict[str, torch.Tensor]:
        """labels (B, T), decoder_input_ids (B, T) and label_positions (N)."""
        from transformers.models.whisper.modeling_whisper import shift_tokens_right

        labels = torch.full((len(rows), label_length), IGNORED)  # (B, T)
        for i, row in enumerate(rows):
            if row is None:
                continue
            tokens = row["labels"]
            if tokens[0] != self.decoder_start_token_id:
                raise OwnError(
                    f"--data_dir: labels of clip {row.get('id')!r} begin with token {tokens[0]}, "
                    f"not with the start of transcript, {self.decoder_start_token_id}: run "
                    "preprocess.py again"
                )
            labels[i, : len(tokens) - 1] = torch.tensor(tokens[1:])
        shifted = shift_tokens_right(labels, self.pad_token_id, self.decoder_start_token_id)
        return {
            "decoder_input_ids": shifted,
            "labels": labels,
            "label_positions": label_positions(labels),
        }


def read_samples(row: dict[str, Any]) -> np.ndarray:
    """A clip's samples, int16 (N,): its audio is FLAC, or those already.

    Raises:
        UserError: they are not what was stored.
    """
    if isinstance(row["audio"], np.ndarray):
        return row["audio"]
    try:
        samples = audio.decode_flac(row["audio"])
        lacking = row.get("seconds", 0.0) - (len(samples) + 1) / audio.SAMPLE_RATE
        if lacking > 0:
            raise audio.AudioError(f"its last {lacking:.2f} s are missing")
    except audio.AudioError as error:
        raise OwnError(
            f"--data_dir: the audio of clip {row.get('id')!r} is damaged ({error}): copy the "
            "folder again or run preprocess.py again"
        ) from error
    return samples


def label_positions(labels: torch.Tensor) -> torch.Tensor:
    """Where in flattened labels (B, T) the label tokens are: (N)."""
    return (labels.flatten() != IGNORED).nonzero()[:, 0]


class Rows(Protocol):
    """A prepared dataset, or what makes such rows."""

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class EncoderStates(Protocol):
    """Cached outputs of a frozen encoder, which take the place of waves."""

    def read(self, batch: MicroBatch) -> torch.Tensor:
        """The states (B, C, D) of the clips of a batch."""


@dataclass(frozen=True)
class MicroBatches:
    """The micro-batches of one process as a map-style dataset: item i is the i-th, collated."""

    dataset: Rows
    batches: Sequence[MicroBatch] | Sequence[DecodeBatch]
    collate: SpeechCollator
    cache: EncoderStates | None = None

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor] | UserError:
        batch = self.batches[index]
        try:
            rows = [None if clip is None else self.dataset[clip] for clip in batch.clips]
            if self.cache is not None:
                states = {"encoder_states": self.cache.read(batch)}
                return states | self.collate.labels(rows, batch.label_length)
            return self.collate(rows, window=batch.window, label_length=batch.label_length)
        except UserError as error:
            return error  # raised where it is read: a worker would wrap it in a traceback


def load_batches(
    dataset: Dataset | Rows,
    batches: Sequence[MicroBatch] | Sequence[DecodeBatch],
    collate: SpeechCollator,
    *,
    num_workers: int,
    cache: EncoderStates | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """Collated batches in order, prepared ahead by `num_workers` processes.

    Raises:
        UserError: naming a clip that cannot be collated.
    """
    if cache is not None:
        dataset = dataset.select_columns(["id", "labels"])  # audio is not read
    loader = DataLoader(
        MicroBatches(dataset, batches, collate, cache),
        batch_size=None,  # items are batches already
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker if num_workers else None,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _start_worker(_worker: int) -> None:
    torch.set_num_threads(1)  # what a worker does gains nothing from more
    os.setpgid(0, 0)  # a signal to the run's process group is for the run, which ends its workers
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
