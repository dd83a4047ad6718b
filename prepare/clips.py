"""One clip, from a row of the source to a record of the prepared dataset, or the reason why not."""

import os
import unicodedata
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from common import audio
from common.labels import MAX_LABELS, make_labels
from common.prepared import SPLITS
from prepare.sources import MALFORMED_ROW, NO_TEXT, OUTSIDE_SOURCE, UNKNOWN_SPLIT, Row
from prepare.splits import hash64

LOUDEST = 8.0  # overshoot of resampling and clipped mastering stay far below; integers do not
DUPLICATE = "duplicate audio"
AUDIO_OVERLAP = "audio also in another split"
TEXT_OVERLAP = "text also in training"
NO_LANGUAGE, UNKNOWN_LANGUAGE = "no language", "unknown language"
NEEDS_PYAV = "needs PyAV (pip install av)"
REASONS = (
    "",  # kept
    MALFORMED_ROW,
    OUTSIDE_SOURCE,
    UNKNOWN_SPLIT,
    NO_LANGUAGE,
    UNKNOWN_LANGUAGE,
    NO_TEXT,
    "text spells a special token",
    "labels over 448 tokens",
    "missing audio file",
    NEEDS_PYAV,
    "unreadable audio",
    "empty audio",
    "longer than max_seconds",
    "shorter than min_seconds",
    "text impossible for the duration",
    DUPLICATE,
    AUDIO_OVERLAP,
    TEXT_OVERLAP,
)


@dataclass(frozen=True)
class Checks:
    """How a clip is labelled and what it must satisfy; the script's options of the same names."""

    task: str
    max_seconds: float
    min_seconds: float
    max_chars_per_second: float
    audio_bits: int


class DroppedError(Exception):
    """A clip that is not kept: a member of REASONS, and what was found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)


def prepare_clip(row: Row, checks: Checks, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Decode, check and label one clip: a record of `parts.SCHEMA`, whatever is wrong with it."""
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
        record["labels"] = label_ids(row, checks, tokenizer)
        pcm = read_pcm(row, checks)
    except DroppedError as dropped:
        reason, detail = dropped.args
        return {**record, "labels": [], "reason": REASONS.index(reason), "detail": detail}
    seconds = len(pcm) / audio.SAMPLE_RATE
    return {
        **record,
        "audio": audio.encode_flac(audio.keep_bits(pcm, checks.audio_bits)),
        "seconds": seconds,
        "pcm_hash": hash64(pcm.tobytes()),
    }


def label_ids(row: Row, checks: Checks, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The clip's labels; raises DroppedError for a row or text that cannot be used."""
    if row.problem:
        raise DroppedError(row.problem, row.detail)
    if not row.text:
        raise DroppedError(NO_TEXT)
    try:
        ids = make_labels(tokenizer, row.text, row.language, checks.task)
    except ValueError as error:
        raise DroppedError("text spells a special token", str(error)) from error
    if len(ids) > MAX_LABELS:
        raise DroppedError("labels over 448 tokens", f"{len(ids)} tokens")
    return ids


def read_pcm(row: Row, checks: Checks) -> np.ndarray:
    """The clip's samples, int16 (N,) at 16 kHz; raises DroppedError for audio that is of no use."""
    if not row.audio and not os.path.isfile(row.path):  # noqa: PTH113 (Path's raises for long names)
        raise DroppedError("missing audio file")
    try:
        samples = audio.read_audio(
            BytesIO(row.audio) if row.audio else row.path,
            start_seconds=row.start_seconds,
            end_seconds=row.end_seconds,
            max_seconds=checks.max_seconds,
        )
    except audio.NeedsPyAVError as error:
        raise DroppedError(NEEDS_PYAV, str(error)) from error
    except audio.AudioError as error:
        raise DroppedError("unreadable audio", str(error)) from error
    peak = np.abs(samples).max(initial=0.0)
    if peak > LOUDEST:
        raise DroppedError("unreadable audio", f"samples up to {peak:.0f}, not between -1 and 1")
    pcm = audio.to_pcm(samples)
    seconds = len(pcm) / audio.SAMPLE_RATE
    if not pcm.any():
        raise DroppedError("empty audio", "every sample is zero" if len(pcm) else "no samples")
    if seconds > checks.max_seconds:
        raise DroppedError("longer than max_seconds", f"over {checks.max_seconds:g} s")
    if seconds < checks.min_seconds:
        raise DroppedError("shorter than min_seconds", f"{seconds:.3f} s")
    if len(row.text) > checks.max_chars_per_second * seconds:
        raise DroppedError(
            "text impossible for the duration", f"{len(row.text)} characters in {seconds:.2f} s"
        )
    return pcm
