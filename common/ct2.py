"""Clips -> tokens by CTranslate2, at any window: `decode` and its parts are as in decoding.py.

The prompt is the tokenizer's, and what may not be written is in the export's config.json.

Legend: B clips, N samples, C encoder positions (20 ms), M mel bins, F frames, D width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from common import audio, labels, whisper
from common.audio import SAMPLES_PER_POSITION
from common.cli import UserError, first_line
from common.decoding import Decoded, group_windows
from common.whisper import ENCODED_SAMPLES

if TYPE_CHECKING:
    import ctranslate2

REQUIREMENTS = "requirements-export.txt"
WEIGHTS = "model.bin"


@dataclass(frozen=True)
class CT2Whisper:
    """A CTranslate2 Whisper that is ready to decode."""

    engine: ctranslate2.models.Whisper
    tokenizer: PreTrainedTokenizerBase  # its prompts


def check_installed() -> None:
    """Raise UserError unless ctranslate2 is installed."""
    if importlib.util.find_spec("ctranslate2") is None:
        raise UserError(f"ctranslate2 4.8 is not installed: pip install -r {REQUIREMENTS}")


def is_ct2(model: str) -> bool:
    """Whether `--model` is a folder with a CTranslate2 model."""
    return (Path(model) / WEIGHTS).is_file()


def load(
    folder: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    compute_type: str = "default",
    device: str = "cpu",
    num_threads: int = 0,
    option: str = "--model",
) -> CT2Whisper:
    """Load a CTranslate2 Whisper.

    Args:
        compute_type: "default" is that of the stored weights.
        num_threads: of a computation; 0: as many as PyTorch's.
        option: that names the folder, for messages.

    Raises:
        UserError: ctranslate2 is not installed, or the folder holds no Whisper that loads.
    """
    check_installed()
    import ctranslate2

    try:
        engine = ctranslate2.models.Whisper(
            str(folder),
            device=device,
            compute_type=compute_type,
            intra_threads=num_threads or torch.get_num_threads(),
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{option} {folder}: holds no CTranslate2 Whisper that loads ({first_line(error)}): "
            "give a folder that export.py wrote"
        ) from error
    return CT2Whisper(engine, tokenizer)


def features(model: CT2Whisper, waves: torch.Tensor) -> ctranslate2.StorageView:
    """Log-mel features (B, M, F) of int16 waves (B, N), those that PyTorch's encoder gets."""
    import ctranslate2

    filters = whisper.mel_filters(model.engine.n_mels, torch.device("cpu"))
    mel = audio.log_mel(waves.cpu().float() / 32_768, filters)
    return ctranslate2.StorageView.from_array(mel.contiguous().numpy())


def encode_windows(
    model: CT2Whisper, waves: torch.Tensor, windows: Sequence[int]
) -> list[tuple[list[int], ctranslate2.StorageView]]:
    """Encode clips of equal windows together: their rows, and their states (rows, C, D).

    The engine tells states from features by their shape. Where C is the number of mel bins it
    would encode states once more, so features (rows, M, F) stand there, which it encodes itself
    where they are used.
    """
    groups = []
    for window, rows in group_windows(windows):
        own = waves[rows, : window * SAMPLES_PER_POSITION]
        is_mistaken = window == model.engine.n_mels
        groups.append((rows, features(model, own) if is_mistaken else encode(model, own)))
    return groups


def encode(model: CT2Whisper, waves: torch.Tensor) -> ctranslate2.StorageView:
    """States (B, C, D) of int16 waves (B, N), a few clips at a time: attention is held whole."""
    import ctranslate2

    size = max(1, ENCODED_SAMPLES // waves.shape[1])
    pieces = [
        np.array(model.engine.encode(features(model, piece), to_cpu=True))
        for piece in waves.split(size)
    ]
    return ctranslate2.StorageView.from_array(np.concatenate(pieces))


def decode(
    model: CT2Whisper,
    waves: torch.Tensor,
    *,
    windows: Sequence[int],
    languages: Sequence[str] | None,
    task: str,
    caps: Sequence[int],
    num_beams: int = 1,
) -> list[Decoded]:
    """Transcribe a batch greedily; see `decoding.decode`.

    Returns:
        (B) texts; the log-probability of one that its cap cut off is not known (`None`) where a
        clip that was decoded with it has a higher cap.
    """
    assert num_beams == 1, "the engine ranks beams by a rule of its own"
    encoded = encode_windows(model, waves, windows)
    return decode_encoded(model, encoded, languages=languages, task=task, caps=caps)


def decode_encoded(
    model: CT2Whisper,
    encoded: list[tuple[list[int], ctranslate2.StorageView]],
    *,
    languages: Sequence[str] | None,
    task: str,
    caps: Sequence[int],
    num_beams: int = 1,
) -> list[Decoded]:
    """Decode clips that `encode_windows` has encoded; else as `decode`.

    With beams the engine ranks texts by the mean log-probability of their tokens, as faster-whisper
    has it do; `generate` of transformers ends its search by another rule.
    """
    texts = [Decoded([], None)] * len(caps)
    for rows, states in encoded:
        prompts = [
            labels.prompt(model.tokenizer, languages[row] if languages else "", task)
            for row in rows
        ]
        cap = max(caps[row] for row in rows)
        results = model.engine.generate(
            states,
            prompts,
            beam_size=num_beams,
            max_length=2 * cap,  # of which the engine leaves one half to the text
            length_penalty=int(num_beams > 1),  # without beams scores are sums
            return_scores=True,
            return_no_speech_prob=True,
        )
        for row, result in zip(rows, results, strict=True):
            [tokens], [score] = result.sequences_ids, result.scores
            # A longer clip of the batch may have a higher cap: how far a text went on that hit its
            # own, and so its score, depends on the batch.
            if num_beams > 1:  # a mean that leaves out the end token
                score *= max(len(tokens), 1)
            logprob = score / (len(tokens) + 1) if len(tokens) < caps[row] else None
            texts[row] = Decoded(tokens[: caps[row]], logprob, result.no_speech_prob)
    return texts
