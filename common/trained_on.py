"""What a model was trained on, as hashes in a small file beside it: texts, audio, speakers.

64 bits a text and a recording: 16 bytes a clip, 80 MB for 10,000 hours. A hash does not give the
text back, but whoever has a text can find out whether it was in training.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from common.cli import UserError, first_line
from common.metrics import keep_marks
from common.predictions import written_languages
from common.prepared import audio_hashes, column, hash64

NAME = "trained_on.safetensors"


@dataclass(frozen=True)
class ClipHashes:
    """Hashes of clips, uint64; 0 is unknown."""

    texts: np.ndarray  # (N,) of the text under keep_marks
    audio: np.ndarray  # (N,) of the samples as they are stored
    speakers: np.ndarray  # (N,)


def normalised(dataset: Dataset, task: str) -> list[str]:
    """Texts (N) as they are compared, under `keep_marks`; empty for one without words."""
    pairs = zip(column(dataset, "text"), written_languages(dataset, task), strict=True)
    return [keep_marks(str(text), language) for text, language in pairs]


def hash_clips(dataset: Dataset, task: str) -> ClipHashes:
    """Hashes of the clips of a prepared split, in its order; no audio is decoded."""
    speakers = (str(speaker or "") for speaker in column(dataset, "speaker"))
    return ClipHashes(
        _hashes(normalised(dataset, task)), audio_hashes(dataset), _hashes(list(speakers))
    )


def _hashes(texts: list[str]) -> np.ndarray:
    return np.array([hash64(text.encode()) if text else 0 for text in texts], np.uint64)


def pack(clips: ClipHashes) -> bytes:
    """The content of the file: texts and audio sorted, every speaker once."""
    return save({name: _sorted(name, hashes) for name, hashes in asdict(clips).items()})


def _sorted(name: str, hashes: np.ndarray) -> np.ndarray:
    return np.unique(hashes) if name == "speakers" else np.sort(hashes)


def read(folder: str, option: str) -> ClipHashes | None:
    """What stands beside an adapter or a model; `None` for one without the file.

    Raises:
        UserError: the file is damaged.
    """
    file = Path(folder) / NAME
    if not file.is_file():
        return None
    try:
        return ClipHashes(**load_file(file))
    except (OSError, SafetensorError, TypeError) as error:
        raise UserError(
            f"{option} {folder}: its {NAME} is damaged ({first_line(error)}): copy it again, or "
            "remove it to compare with the train split of --data_dir"
        ) from error


def same_clips(recorded: ClipHashes, clips: ClipHashes) -> bool:
    """Whether the clips of a split are those that were recorded."""
    pairs = zip(asdict(recorded).items(), asdict(clips).values(), strict=True)
    return all(np.array_equal(own, _sorted(name, others)) for (name, own), others in pairs)
