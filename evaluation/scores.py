"""The clips of one prepared folder, and what every system wrote and scored on them."""

import time
from dataclasses import dataclass, field, replace
from typing import Any

from datasets import Dataset

from common import predictions
from common.accelerator import say
from common.cli import UserError
from common.memory import peak_memory_gib
from common.metrics import ClipCounts
from common.predictions import DecodeOptions, Prediction
from common.prepared import column, load_prepared
from common.systems import System
from common.windows import POSITIONS_PER_SECOND
from evaluation.breakdown import breakdown, words_of
from evaluation.confusions import confusions
from evaluation.statistics import confidence_correlation

WORST_CLIPS = 20


@dataclass
class Panel:
    """Clips that show what a system makes up, and what each system wrote for them."""

    clips: Dataset  # as prepared, with their kind
    left_out: dict[str, int]  # clips of each kind that the scored clips cannot give
    texts: dict[str, dict[str, dict[str, Prediction]]] = field(default_factory=dict)
    # by name of the system, window and clip id


@dataclass
class Scores:
    """Clips of one folder, with the texts and the errors of every system by its name."""

    dataset: Dataset
    train: Dataset | None  # the training clips, if the folder has them
    options: DecodeOptions
    audit: dict[str, Any] | None = None  # of the split whose transcripts were audited
    systems: dict[str, dict[str, Any]] = field(default_factory=dict)  # rates and figures
    texts: dict[str, dict[str, Prediction]] = field(default_factory=dict)  # by clip id
    counts: dict[str, dict[str, ClipCounts]] = field(default_factory=dict)  # by normaliser
    other_counts: dict[str, dict[str, ClipCounts]] = field(default_factory=dict)
    # `counts` at the other window, if asked for
    panel: Panel | None = None  # None: not asked for

    @property
    def seconds(self) -> float:
        return float(column(self.dataset, "seconds").sum())

    @property
    def size(self) -> str:
        return f"{len(self.dataset)} clips, {self.seconds / 60:.1f} minutes"


def load_clips(
    data_dir: str,
    split: str,
    *,
    max_clips: int,
    num_beams: int,
    num_workers: int,
    quiet: bool,
    folder_option: str = "--data_dir",
    split_option: str = "--split",
) -> Scores:
    """The clips of a split, to be scored.

    Args:
        max_clips: from the first on; 0: all.
        num_beams, num_workers, quiet: of DecodeOptions.
        folder_option, split_option: named in error messages.

    Raises:
        UserError: the folder has no such split.
    """
    splits, report = load_prepared(data_dir, folder_option)
    if split not in splits:
        raise UserError(
            f"{split_option} {split}: {folder_option} {data_dir} has only {', '.join(splits)}: "
            "give one"
        )
    dataset = splits[split]
    if max_clips:
        dataset = dataset.select(range(min(max_clips, len(dataset))))
    options = DecodeOptions(
        task=report["config"]["task"],
        tokens_per_second=report["tokens_per_second"]["p999"],
        num_beams=num_beams,
        num_workers=num_workers,
        quiet=quiet,
    )
    return Scores(dataset, splits.get("train"), options)


def score_clips(
    scores: Scores,
    name: str,
    system: System,
) -> None:
    """Decode all clips with a system, and add it as `name`. All processes must call.

    The first process alone counts errors: it writes them.
    """
    dataset, task = scores.dataset, scores.options.task
    start = time.perf_counter()
    texts, batch_seconds = transcribe(system, dataset, scores.options)
    wall_seconds = time.perf_counter() - start
    scores.texts[name], scores.systems[name] = texts, {}
    if not system.accelerator.is_main_process:
        return
    counts = predictions.count_errors(dataset, texts, system.tokenizer, task=task)
    scores.counts[name] = counts
    scores.systems[name] = predictions.summarise(texts, counts) | {
        "window": system.window_mode,
        "warning": system.warning,
        "audio_seconds": scores.seconds,
        "batch_seconds": batch_seconds,
        "wall_seconds": wall_seconds,
        "real_time_factor": wall_seconds / scores.seconds,
        "peak_memory_gib": peak_memory_gib(),  # of rank 0, since the system began to load
        "worst": worst_clips(dataset, texts, counts["keep_marks"]),
    }


def score_other_window(
    scores: Scores,
    name: str,
    system: System,
) -> None:
    """Add the rates of a scored system at the window it was not scored at: 30 s, or natural.

    All processes must call.
    """
    dataset, options = scores.dataset, scores.options
    other = replace(system, window_mode="full" if system.window_mode == "natural" else "natural")
    texts, _ = transcribe(other, dataset, options)
    if not system.accelerator.is_main_process:
        return
    counts = predictions.count_errors(dataset, texts, system.tokenizer, task=options.task)
    scores.other_counts[name] = counts
    rates = predictions.summarise(texts, counts) | {"window": other.window_mode}
    scores.systems[name]["other_window"] = rates


def transcribe(
    system: System,
    dataset: Dataset,
    options: DecodeOptions,
) -> tuple[dict[str, Prediction], float]:
    """Decode all clips with a system: predictions by clip id, and the seconds of window a batch."""
    accelerator = system.accelerator
    batches, batch_seconds = predictions.plan_batches(
        accelerator,
        system.model.config,
        column(dataset, "seconds"),
        bytes_per_value=system.model.dtype.itemsize,
        window_mode=system.window_mode,
        margin=system.margin,
        batch_seconds=system.batch_seconds,
        num_beams=options.num_beams,
    )
    margin = system.margin.margin / POSITIONS_PER_SECOND
    silence = f" ({margin:.2f} s after the speech)" if system.window_mode == "natural" else ""
    say(
        accelerator,
        f"decoding with {system.name}, {system.window_mode} window{silence}, "
        f"{len(batches)} batches",
    )
    own = batches[accelerator.process_index :: accelerator.num_processes]
    texts = predictions.transcribe(system.model, system.tokenizer, dataset, own, options)
    return predictions.gather(texts), batch_seconds


def describe_errors(scores: Scores) -> None:
    """Add to each system where it fails, what it confuses, and what its confidence is worth."""
    dataset, task = scores.dataset, scores.options.task
    languages, seen = predictions.written_languages(dataset, task), None
    if scores.train is not None:
        seen = words_of(scores.train, predictions.written_languages(scores.train, task))
    words = {name: counts["raw"].words for name, counts in scores.counts.items()}
    groups, ids = breakdown(dataset, languages, seen, words), column(dataset, "id")
    for name, texts in scores.texts.items():
        logprobs = [texts[str(clip_id)].logprob for clip_id in ids]
        scores.systems[name] |= {
            "breakdown": groups[name],
            "confusions": confusions(dataset, texts, languages),
            "logprob_error_correlation": confidence_correlation(logprobs, words[name]),
        }


def worst_clips(
    dataset: Dataset, predictions: dict[str, Prediction], counts: ClipCounts
) -> list[dict[str, Any]]:
    """The clips with the most word errors, worst first.

    Args:
        counts: of the clips of `dataset`, in its order.
    """
    rows = []
    columns = column(dataset, "id"), column(dataset, "text"), counts.words
    for clip_id, text, words in zip(*columns, strict=True):
        prediction = predictions[str(clip_id)]
        rows.append(
            {
                "id": prediction.id,
                "word_errors": words.errors,
                "reference_words": words.reference_length,
                "reference": str(text),
                "hypothesis": prediction.text,
                "hit_cap": prediction.hit_cap,
                "decoded_again": prediction.decoded_again,
            }
        )
    return sorted(rows, key=lambda row: (-row["word_errors"], row["id"]))[:WORST_CLIPS]
