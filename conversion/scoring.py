"""An export loaded again in a fresh process, and decoded at both windows.

    python -m conversion.scoring --task TASK.json --result RESULT.json

That process gets nothing but the export's folder and the prepared clips.
"""

import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from common import batching, cli, ct2, decoding, labels, predictions, whisper
from common.cli import UserError
from common.collator import read_samples
from common.decoding import token_cap
from common.predictions import Decode, DecodeOptions, Prediction
from common.prepared import column, load_prepared
from common.windows import DecodeMargin, decode_window
from conversion import ggml

PROGRAM = Path(__file__).resolve().parent.parent
MODES = ("natural", "full")
BATCH_SECONDS = 60.0  # of window: two clips at 30 seconds


@dataclass(frozen=True)
class Task:
    """What is decoded, and how."""

    data_dir: str
    split: str
    max_clips: int  # from the first on; 0: all
    task: str  # transcribe or translate
    tokens_per_second: float
    margin: tuple[int, int]  # DecodeMargin
    engine: str = ""  # one of ENGINES
    path: str = ""  # of the export


@dataclass(frozen=True)
class Decoded:
    """What a system wrote at one window."""

    texts: dict[str, Prediction]  # by clip id
    cpu_seconds: float  # of decoding, all threads together


def load_clips(data_dir: str, split: str, max_clips: int) -> Dataset:
    """The clips that are decoded.

    Args:
        max_clips: from the first on; 0: all.

    Raises:
        UserError: no such folder, or no such split in it.
    """
    splits, _ = load_prepared(data_dir)
    if split not in splits:
        raise UserError(
            f"--split {split}: --data_dir {data_dir} has only {', '.join(splits)}: give one"
        )
    clips = splits[split]
    return clips.select(range(min(max_clips or len(clips), len(clips))))


# ------ in the process that exports


def score_fresh(task: Task) -> dict[str, Decoded]:
    """Decode with an export in a process of its own; results by window.

    Raises:
        UserError: the process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder, "task.json"), Path(folder, "result.json")
        given.write_text(json.dumps(asdict(task)), encoding="utf-8")
        words = ["--task", str(given), "--result", str(result)]
        code = start([sys.executable, "-m", "conversion.scoring", *words]).wait()
        if code:
            form, name = task.engine.partition("_")[0], Path(task.path).name
            raise UserError(
                f"--formats {form}: {name} cannot be loaded and decoded (exit code {code} of a "
                "process of its own): leave this format out"
            )
        modes = json.loads(result.read_text(encoding="utf-8"))
    return {
        mode: Decoded({row["id"]: Prediction(**row) for row in own["texts"]}, own["cpu_seconds"])
        for mode, own in modes.items()
    }


def start(words: list[str]) -> subprocess.Popen:
    return subprocess.Popen(words, cwd=PROGRAM)


# ------ in both processes


def decode_both(
    transcribe: Callable[[Dataset, str], list[Prediction]], clips: Dataset
) -> dict[str, Decoded]:
    """Decode clips at each window.

    Args:
        transcribe: called with the clips and the window, "natural" or "full".
    """
    decoded = {}
    for mode in MODES:
        before = time.process_time()
        texts = transcribe(clips, mode)
        decoded[mode] = Decoded({own.id: own for own in texts}, time.process_time() - before)
    return decoded


def by_batches(
    model: Any, tokenizer: PreTrainedTokenizerBase, decode: Decode, task: Task
) -> Callable[[Dataset, str], list[Prediction]]:
    """PyTorch's or CTranslate2's texts, as eval_wer.py decodes them."""
    options = DecodeOptions(task.task, task.tokens_per_second, quiet=False)

    def transcribe(clips: Dataset, mode: str) -> list[Prediction]:
        batches = batching.decode_plan(
            column(clips, "seconds"),
            batch_seconds=BATCH_SECONDS,
            window_mode=mode,
            margin=DecodeMargin(*task.margin),
        )
        return predictions.transcribe(model, tokenizer, clips, batches, options, decode)

    return transcribe


# ------ in the fresh process


def load_hf(task: Task) -> Callable[[Dataset, str], list[Prediction]]:
    tokenizer = labels.load_tokenizer(task.path)
    model = whisper.load_base(task.path, dtype=torch.float32).eval()
    return by_batches(model, tokenizer, decoding.decode, task)


def load_ct2(task: Task) -> Callable[[Dataset, str], list[Prediction]]:
    tokenizer = labels.load_tokenizer(task.path)
    return by_batches(ct2.load(task.path, tokenizer), tokenizer, ct2.decode, task)


def load_ggml(
    task: Task, *, flash_attention: bool = True
) -> Callable[[Dataset, str], list[Prediction]]:
    """whisper.cpp's own texts, without second attempts."""
    engine = ggml.load(Path(task.path) / ggml.FILE_NAME, flash_attention=flash_attention)

    def text(row: dict[str, Any], mode: str) -> Prediction:
        cap = token_cap(row["seconds"], task.tokens_per_second)
        window = decode_window(row["seconds"], mode, DecodeMargin(*task.margin))
        options = {"language": row["language"], "task": task.task, "window": window, "cap": cap}
        written = ggml.transcribe(engine, read_samples(row), **options)
        return Prediction(row["id"], written, hit_cap=False)

    return lambda clips, mode: [text(row, mode) for row in clips]


ENGINES = {
    "hf": load_hf,
    "ct2": load_ct2,
    "ggml": load_ggml,
    "ggml_no_flash": functools.partial(load_ggml, flash_attention=False),
}


@dataclass
class Config:
    """Decode prepared clips with an export."""

    task: str = ""  # JSON file of a Task
    result: str = ""  # JSON file that is written


def main(config: Config) -> None:
    whisper.quiet_libraries()
    task = Task(**json.loads(Path(config.task).read_text(encoding="utf-8")))
    clips = load_clips(task.data_dir, task.split, task.max_clips)
    decoded = decode_both(ENGINES[task.engine](task), clips)
    result = {
        mode: {
            "texts": [asdict(text) for text in own.texts.values()],
            "cpu_seconds": own.cpu_seconds,
        }
        for mode, own in decoded.items()
    }
    Path(config.result).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    cli.run(main, Config)
