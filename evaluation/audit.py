"""Suspect transcripts of a split, worst first, in a CSV that `preprocess.py --exclude` takes.

A transcript is suspect if the model finds it improbable, writes something else, or writes what the
transcript of the clip before or after says, or if its length does not fit that of the speech. Each
measure is compared with its own distribution over the split, so a weak model will do: what counts
is what it does worse than elsewhere.
"""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from rapidfuzz.distance import Levenshtein
from torch.nn.functional import cross_entropy

from common import batching, predictions
from common.collator import IGNORED, load_batches
from common.files import write_text
from common.labels import num_prompt_tokens
from common.metrics import count_errors, keep_marks
from common.predictions import Prediction
from common.prepared import column, label_lengths
from common.spreadsheet import protect
from common.systems import System
from common.whisper import encode
from common.windows import decode_windows
from evaluation.scores import Scores, transcribe

NAME = "audit.csv"
FAR = 3.5  # robust z-scores beyond it are outliers (Iglewicz and Hoaglin, 1993)
MAD_TO_SIGMA = 1.4826  # of a normal distribution: standard deviation / median absolute deviation
# Least spread that a z-score divides by: smaller differences mean nothing, however alike clips are.
SPREADS = {"loss": 0.1, "cer": 5.0, "length": 0.1}  # nats, per cent, logarithm of the rate
NEARER = 0.1  # more similar to a neighbour's text than to its own, of 1, is no chance
SHOWN = 20  # suspects in wer.json and report.html
COLUMNS = ("id", "score", "reason", "loss", "cer", "chars_per_second", "text", "heard")
NEIGHBOUR = "heard the text of its neighbour"  # one of the reasons


@dataclass(frozen=True)
class Clip:
    """A clip of the split and what speaks against its transcript."""

    id: str
    score: float  # by which clips are ranked
    reasons: tuple[str, ...]  # none: not suspect
    neighbour: str  # id of the clip before or after whose text is most like what was heard
    loss: float  # per label token of the text, in nats
    cer: float  # under keep_marks and without spaces, in per cent
    chars_per_second: float
    text: str
    heard: str

    def row(self) -> dict[str, Any]:
        """A row of audit.csv."""
        named = (f"{why} {self.neighbour}" if why == NEIGHBOUR else why for why in self.reasons)
        row = asdict(self) | {"reason": "; ".join(named)}
        return {name: row[name] for name in COLUMNS}


# ------ the pass over the split


def audit(
    scores: Scores,
    system: System,
) -> list[Clip]:
    """Transcribe a split, compute the loss of its transcripts, and rank. All processes must call.

    Args:
        scores: of the split; nothing is added to them.
    """
    dataset, task = scores.dataset, scores.options.task
    texts, batch_seconds = transcribe(system, dataset, scores.options)
    losses = transcript_losses(system, dataset, batch_seconds, scores.options.num_workers)
    return judge(dataset, predictions.written_languages(dataset, task), texts, losses)


@torch.no_grad()
def transcript_losses(
    system: System,
    dataset: Dataset,
    batch_seconds: float,
    num_workers: int,
) -> np.ndarray:
    """Mean loss of the tokens of each clip's text and its end, in nats: float64 (N,).

    To 3 decimals: the last bits depend on the batch.
    """
    seconds, skipped = column(dataset, "seconds"), num_prompt_tokens(system.tokenizer) - 1
    accelerator = system.accelerator
    batches = batching.window_plan(
        seconds,
        decode_windows(seconds, system.window_mode, system.margin),
        batch_seconds=batch_seconds,
        label_lengths=label_lengths(dataset) - 1,  # the start token is cut
    )
    own = batches[accelerator.process_index :: accelerator.num_processes]
    model, losses = system.model, []
    collate = predictions.collator_for(model)
    loader = load_batches(dataset, own, collate, num_workers=num_workers)
    for batch, inputs in zip(own, loader, strict=True):
        hidden = model.model.decoder(
            input_ids=inputs["decoder_input_ids"].to(model.device),
            encoder_hidden_states=encode(model, inputs["waves"]),
            use_cache=False,
        ).last_hidden_state  # (B, T, D)
        labels = inputs["labels"].to(model.device)  # (B, T)
        for row, clip in enumerate(batch.clips):
            targets = labels[row][labels[row] != IGNORED][skipped:]
            logits = model.proj_out(hidden[row, skipped : skipped + len(targets)])  # of one clip
            losses.append((clip, round(cross_entropy(logits.float(), targets).item(), 3)))
    return np.array([loss for _, loss in sorted(gather_object(losses))])


def write_audit(folder: Path, split: str, system: str, clips: Sequence[Clip]) -> dict[str, Any]:
    """Write audit.csv with all suspects, and print their number.

    Args:
        split, system: names of what was audited, and of what heard it.
        clips: as `audit` ranks them.

    Returns:
        What wer.json holds of it.
    """
    rows = [clip.row() for clip in clips if clip.reasons]
    table = io.StringIO()
    writer = csv.writer(table, quoting=csv.QUOTE_ALL)
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow(protect(str(cell)) for cell in row.values())
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / NAME, "\ufeff" + table.getvalue())  # the mark by which Excel knows UTF-8
    reasons = Counter(reason for clip in clips for reason in clip.reasons).most_common()
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons)
    print(
        f"audit of {split} by {system}: {len(rows)} of {len(clips)} transcripts are suspect"
        f"{f' ({counts})' if rows else ''}: {folder / NAME}",
        flush=True,
    )
    return {
        "split": split,
        "system": system,
        "clips": len(clips),
        "suspects": len(rows),
        "reasons": dict(reasons),
        "worst": rows[:SHOWN],
    }


# ------ what is suspect


def judge(
    dataset: Dataset,
    languages: Sequence[str],
    predictions: dict[str, Prediction],
    losses: np.ndarray,
) -> list[Clip]:
    """All clips, those that are most suspect first.

    Args:
        languages: of the clips' texts (N).
        predictions: by clip id.
        losses: (N,).
    """
    ids = [str(clip_id) for clip_id in column(dataset, "id")]
    own = [predictions[clip_id] for clip_id in ids]
    texts = [_letters(*pair) for pair in zip(column(dataset, "text"), languages, strict=True)]
    hypotheses = [
        _letters(prediction.text, language)
        for prediction, language in zip(own, languages, strict=True)
    ]
    counts = [count_errors(*pair, "char") for pair in zip(texts, hypotheses, strict=True)]
    cer = np.array([count.rate for count in counts])
    rates = np.array([len(text) for text in texts]) / column(dataset, "seconds")
    length = robust_z(np.log(np.maximum(rates, 0.1)), SPREADS["length"])
    loss_z = robust_z(losses, SPREADS["loss"])
    cer_z = robust_z(np.minimum(cer, 100.0), SPREADS["cer"])
    nearer = [nearest_neighbour(texts, hypotheses, clip) for clip in range(len(ids))]
    score = sum(
        surprise(values)
        for values in (loss_z, cer_z, abs(length), np.array([gain for gain, _ in nearer]))
    )
    transcripts, clips = column(dataset, "text"), []
    for clip, (gain, neighbour) in enumerate(nearer):
        rules = (
            (loss_z[clip] > FAR, "high loss"),
            (cer_z[clip] > FAR, "high CER"),
            (length[clip] > FAR, "many characters a second"),
            (length[clip] < -FAR, "few characters a second"),
            (gain > NEARER, NEIGHBOUR),
            (not own[clip].text, "nothing heard"),
            (own[clip].loops, "heard a loop"),
        )
        clips.append(
            Clip(
                ids[clip],
                round(float(score[clip]), 2),
                tuple(reason for holds, reason in rules if holds),
                ids[neighbour],
                float(losses[clip]),
                round(float(cer[clip]), 1),
                round(float(rates[clip]), 2),
                str(transcripts[clip]),
                own[clip].text,
            )
        )
    return sorted(clips, key=lambda clip: (-clip.score, clip.id))


def _letters(text: str, language: str) -> str:
    """A text as it is compared: under `keep_marks`, without spaces."""
    return keep_marks(str(text), language).replace(" ", "")


def robust_z(values: np.ndarray, least_spread: float) -> np.ndarray:
    """How many standard deviations values (N,) are from their median, outliers aside."""
    distances = values - np.median(values)
    return distances / max(MAD_TO_SIGMA * np.median(abs(distances)), least_spread)


def surprise(values: np.ndarray) -> np.ndarray:
    """-log10 of the share of values (N,) that are as large, 0 for those that are not positive.

    The sum over measures is Fisher's way to combine p-values: ranks count, not units.

    >>> surprise(np.array([-1.0] * 8 + [2.0, 3.0])).round(2).tolist()[-3:]
    [0.0, 0.7, 1.0]
    """
    larger = len(values) - np.searchsorted(np.sort(values), values)
    return np.where(values > 0, -np.log10(larger / len(values)), 0.0)


def nearest_neighbour(
    texts: Sequence[str], hypotheses: Sequence[str], clip: int
) -> tuple[float, int]:
    """How much more a hypothesis is like a neighbour's text than its own (-1 to 1), and which.

    Neighbours are the clips before and after in the order of the source.
    """
    own = Levenshtein.normalized_similarity(hypotheses[clip], texts[clip])
    gains = [(-1.0, clip)]
    for other in (clip - 1, clip + 1):
        if 0 <= other < len(texts):
            similarity = Levenshtein.normalized_similarity(hypotheses[clip], texts[other])
            gains.append((similarity - own, other))
    return max(gains, key=lambda gain: gain[0])
