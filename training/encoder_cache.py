"""Outputs of a frozen encoder, computed once for every clip and read back in every epoch.

A clip's window is then a function of the clip alone, so that one output serves all epochs.

Legend: B batch, C encoder positions, D width.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from common import batching, whisper
from common.accelerator import say
from common.adapter import base_of
from common.batching import MicroBatch
from common.cli import UserError
from common.collator import SpeechCollator, load_batches
from common.files import write_json
from common.prepared import column
from common.progress import track
from common.windows import WindowMode, cache_windows
from training.step import TrainState
from training.validation import decoding_model

SPARE_SHARE = 0.05  # of the free disk, left for checkpoints and logs


@dataclass
class EncoderCache:
    """States of all clips of a dataset in one file, clip after clip."""

    folder: Path
    windows: np.ndarray  # (clips,) positions of each clip's own window
    width: int  # D
    dtype: torch.dtype
    seconds: float = 0.0  # that finding it or filling it took

    @property
    def num_values(self) -> int:
        return int(self.windows.sum()) * self.width

    @property
    def num_bytes(self) -> int:
        return self.num_values * self.dtype.itemsize

    @cached_property
    def _values(self) -> torch.Tensor:
        """All states, memory-mapped; the file is made where it is missing."""
        file = str(self.folder / "states.bin")
        return torch.from_file(file, shared=True, size=self.num_values, dtype=self.dtype)

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.windows, dtype=np.int64)]) * self.width

    def clip(self, clip: int) -> torch.Tensor:
        """The states (C, D) of one clip, to read or to fill in."""
        start, end = self._starts[clip], self._starts[clip + 1]
        return self._values[start:end].view(-1, self.width)

    def read(self, batch: MicroBatch) -> torch.Tensor:
        """The states (B, C, D) of clips of one window; zeros for filler."""
        states = torch.zeros(len(batch.clips), batch.window, self.width, dtype=self.dtype)
        for row, clip in enumerate(batch.clips):
            if clip is not None:
                states[row] = self.clip(clip)
        return states

    def fill(self, batch: MicroBatch, states: torch.Tensor) -> None:
        """Store the states (B, C, D) of clips of one window."""
        for row, clip in enumerate(batch.clips):
            self.clip(clip).copy_(states[row])


def is_filled(cache: EncoderCache, identity: dict[str, Any]) -> bool:
    """Whether a complete cache of the same clips and model is there."""
    try:
        made_for = json.loads((cache.folder / "cache.json").read_text(encoding="utf-8"))
        size = (cache.folder / "states.bin").stat().st_size
    except (OSError, ValueError):
        return False
    return made_for == identity and size == cache.num_bytes


def make_room(cache: EncoderCache) -> None:
    """Remove what is there, and refuse a cache that the disk has no room for.

    Raises:
        UserError: with the forecast and what is free.
    """
    shutil.rmtree(cache.folder, ignore_errors=True)
    cache.folder.mkdir(parents=True)
    free = shutil.disk_usage(cache.folder).free * (1 - SPARE_SHARE)
    if cache.num_bytes > free:
        cache.folder.rmdir()
        raise UserError(
            f"--cache_encoder true: takes {cache.num_bytes / 1e9:.2f} GB in {cache.folder.parent}, "
            f"which has {free / 1e9:.2f} GB to spare: give another --output_dir, or false"
        )


def load_or_fill(
    folder: Path,
    identity: dict[str, Any],
    state: TrainState,
    reload: Callable[[], torch.nn.Module],
    dataset: Dataset,
    collate: SpeechCollator,
    *,
    window_mode: WindowMode,
    dtype: torch.dtype,
    batch_seconds: float,
    num_workers: int,
) -> EncoderCache:
    """Find the cache complete, or encode every clip once on each machine. All processes must call.

    Args:
        folder: of the cache.
        identity: of model and data: a complete cache with another one is made anew.
        reload: loads the model anew, for engines that shard it.
        dtype: of the states.
        batch_seconds: of window that is encoded at once.
    """
    accelerator, start = state.accelerator, time.perf_counter()
    windows = cache_windows(column(dataset, "seconds"), window_mode)
    cache = EncoderCache(folder, windows, base_of(state.model).config.d_model, dtype)
    identity = identity | {"dtype": str(dtype), "positions": int(windows.sum())}
    is_first = accelerator.is_local_main_process  # of this machine
    filled = is_filled(cache, identity)
    accelerator.wait_for_everyone()  # all have looked
    say(
        accelerator,
        f"encoder cache: {cache.num_bytes / 1e9:.2f} GB in {cache.folder}"
        + (", found complete" if filled else ""),
    )
    if filled:
        return replace(cache, seconds=time.perf_counter() - start)
    if is_first:
        make_room(cache)
    accelerator.wait_for_everyone()
    batches = batching.window_plan(
        column(dataset, "seconds"), cache.windows, batch_seconds=batch_seconds
    )
    own = batches[accelerator.local_process_index :: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))]
    loader = load_batches(dataset, own, collate, num_workers=num_workers)
    loader = track(loader, total=len(own), what="encoding, batches", quiet=not is_first)
    with torch.no_grad(), decoding_model(state, reload) as model, accelerator.autocast():
        for batch, inputs in zip(own, loader, strict=True):
            cache.fill(batch, whisper.encode(model, inputs["waves"]))
    accelerator.wait_for_everyone()
    if is_first:
        write_json(cache.folder / "cache.json", identity)
    accelerator.wait_for_everyone()
    return replace(cache, seconds=time.perf_counter() - start)
