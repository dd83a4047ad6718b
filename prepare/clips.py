"""One clip: a row of the source becomes a record of the prepared dataset, or is dropped."""

import os
import unicodedata
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from common import audio
from common.labels import MAX_LABELS, make_labels
from common.prepared import SPLITS, hash64
from prepare import reading, reasons
from prepare.reasons import REASONS
from prepare.rows import Row

MAX_PEAK = 8.0  # resampling and clipped mastering overshoot far less; integers are far above


@dataclass(frozen=True)
class ClipOptions:
    """How a clip is labelled, checked and stored: options of preprocess.py with the same names."""

    model: str
    task: str
    max_seconds: float
    min_seconds: float
    max_chars_per_second: float
    audio_bits: int


class DroppedError(Exception):
    """A clip that is not kept: a member of REASONS, and a detail for `dropped.jsonl`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)


def prepare_clip(
    row: Row, options: ClipOptions, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Decode, check and label a clip; a clip that cannot be used is a record with its reason.

    Returns:
        A record of `parts.SCHEMA`.
    """
    plain = " ".join(unicodedata.normalize("NFC", row.text).lower().split())
    record = {
        "id": row.id,
        "audio": b"",
        "seconds": 0.0,
        "text": row.text,
        "labels": [],
        "language": row.language,
        "speaker": row.speaker,
        "split": SPLITS.index(row.split) + 1 if row.split else 0,
        "reason": 0,
        "detail": "",
        "id_hash": hash64(row.id.encode()),
        "pcm_hash": 0,
        "text_hash": hash64(plain.encode()),
        "speaker_hash": hash64(row.speaker.encode()) if row.speaker else 0,
    }
    try:
        record["labels"] = label_ids(row, options, tokenizer)
        pcm = read_pcm(row, options)
    except DroppedError as dropped:
        reason, detail = dropped.args
        return {**record, "labels": [], "reason": REASONS.index(reason), "detail": detail}
    seconds = len(pcm) / audio.SAMPLE_RATE
    return {
        **record,
        "audio": audio.encode_flac(audio.keep_bits(pcm, options.audio_bits)),
        "seconds": seconds,
        "pcm_hash": hash64(pcm.tobytes()),
    }


def label_ids(row: Row, options: ClipOptions, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The clip's labels; raises DroppedError for a row or text that cannot be used."""
    if row.problem:
        raise DroppedError(row.problem, row.detail)
    if not row.text:
        raise DroppedError(reasons.NO_TEXT)
    try:
        ids = make_labels(tokenizer, row.text, row.language, options.task)
    except ValueError as error:
        raise DroppedError(reasons.SPECIAL_TOKEN, str(error)) from error
    if len(ids) > MAX_LABELS:
        raise DroppedError(reasons.TOO_MANY_LABELS, f"{len(ids)} tokens")
    return ids


def read_pcm(row: Row, options: ClipOptions) -> np.ndarray:
    """The clip's samples, int16 (N,) at 16 kHz; raises DroppedError for audio not to be used."""
    if not row.audio and not os.path.isfile(row.path):  # noqa: PTH113 (Path's raises for long names)
        raise DroppedError(reasons.MISSING_AUDIO)
    try:
        samples = reading.read_audio(
            BytesIO(row.audio) if row.audio else row.path,
            start_seconds=row.start_seconds,
            end_seconds=row.end_seconds,
            max_seconds=options.max_seconds,
            channels=row.channels,
        )
    except reading.NoChannelError as error:
        raise DroppedError(reasons.MALFORMED_ROW, f"channel {row.channel} {error}") from error
    except reading.NeedsPyAVError as error:
        raise DroppedError(reasons.NEEDS_PYAV, str(error)) from error
    except audio.AudioError as error:
        raise DroppedError(reasons.UNREADABLE_AUDIO, str(error)) from error
    peak = np.abs(samples).max(initial=0.0)
    if peak > MAX_PEAK:
        raise DroppedError(
            reasons.UNREADABLE_AUDIO, f"samples up to {peak:.0f}, not between -1 and 1"
        )
    pcm = audio.to_pcm(samples)
    check_length(pcm, len(row.text), options)
    return pcm


def check_length(pcm: np.ndarray, num_characters: int, options: ClipOptions) -> None:
    """Raise DroppedError for a clip that is silent, too long, too short, or too short for its text.

    Args:
        pcm: int16 (N,) at 16 kHz.
        num_characters: of the text.
    """
    seconds = len(pcm) / audio.SAMPLE_RATE
    if not pcm.any():
        detail = "every sample is zero" if len(pcm) else "no samples"
        raise DroppedError(reasons.EMPTY_AUDIO, detail)
    if seconds > options.max_seconds:
        raise DroppedError(reasons.TOO_LONG, f"over {options.max_seconds:g} s")
    if seconds < options.min_seconds:
        raise DroppedError(reasons.TOO_SHORT, f"{seconds:.3f} s")
    if num_characters > options.max_chars_per_second * seconds:
        detail = f"{num_characters} characters in {seconds:.2f} s"
        raise DroppedError(reasons.IMPOSSIBLE_TEXT, detail)
