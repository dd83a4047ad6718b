"""What a system can do besides its task, on a sample of the scored clips.

Whisper identifies languages, translates into English and writes timestamps. A fine-tune on
transcripts of one language trains none of these, and may lose them. There is no reference, so only
the form is examined.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import regex
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from common import decoding, labels, predictions
from common.accelerator import say
from common.batching import DecodeBatch
from common.collator import load_batches
from common.languages import ALIASES
from common.metrics import keep_marks
from common.predictions import Prediction
from common.prepared import column
from common.systems import System
from evaluation.scores import Scores, transcribe

SAMPLE = 16  # clips: each is encoded and decoded twice more, which takes a CPU seconds
SEED = 0
MOST_CONFUSED = 5  # pairs of languages
Encoded = list[tuple[list[int], torch.Tensor]]  # as `decoding.encode_windows` gives clips
STEPS_PER_SECOND = 50  # timestamps are 20 ms apart
# How far a text's last time may be beyond the clip. Whisper was trained on times of subtitles.
END_TOLERANCE_SECONDS = 0.5


@dataclass(frozen=True)
class Sample:
    """The clips of a sample, and what a system wrote for them as its task."""

    clips: Dataset
    languages: list[str]
    texts: list[str]


def draw_sample(scores: Scores, name: str) -> Sample:
    """At most SAMPLE clips, in their order; the same for every system."""
    number = len(scores.dataset)
    rows = np.random.default_rng(SEED).permutation(number)[:SAMPLE]
    clips = scores.dataset.select(sorted(rows.tolist()))
    texts = [scores.texts[name][str(clip_id)].text for clip_id in column(clips, "id")]
    return Sample(clips, [str(code) for code in column(clips, "language")], texts)


def measure_abilities(
    scores: Scores,
    name: str,
    system: System,
) -> None:
    """Add `abilities` to the results of a system. All processes must call, with its clips scored.

    An ability that the model never had is `None`: an English-only model has no languages and no
    tasks, and some vocabularies have no timestamps.
    """
    sample, result = draw_sample(scores, name), scores.systems[name]
    say(system.accelerator, f"languages, translation and timestamps of {len(sample.clips)} clips")
    observed = observe(sample, system, scores.options)
    ids = [str(clip_id) for clip_id in column(sample.clips, "id")]
    detected, forms = zip(*(observed[clip_id] for clip_id in ids), strict=True)
    multilingual = not labels.is_english_only(system.tokenizer)
    result["abilities"] = {
        "clips": len(ids),
        "seed": SEED,
        "languages": count_languages(sample.languages, detected) if multilingual else None,
        "other_task": examine_other_task(sample, system, scores.options) if multilingual else None,
        "timestamps": count_forms(forms) if has_timestamps(system.model) else None,
    }


@torch.inference_mode()
def observe(
    sample: Sample,
    system: System,
    options: predictions.DecodeOptions,
) -> dict[str, tuple[str, "TimestampForm | None"]]:
    """The language that is detected in each clip, and the form of its timestamps, by clip id.

    Each clip is encoded and decoded once, at the system's own window.
    """
    model = system.model
    seconds, ids = column(sample.clips, "seconds"), column(sample.clips, "id")
    batches, _ = predictions.plan_batches(
        system.accelerator,
        model.config,
        seconds,
        bytes_per_value=model.dtype.itemsize,
        window_mode=system.window_mode,
        margin=system.margin,
        batch_seconds=system.batch_seconds,
    )
    own = batches[system.accelerator.process_index :: system.accelerator.num_processes]
    loader = load_batches(sample.clips, own, predictions.collator_for(model), num_workers=0)
    multilingual = not labels.is_english_only(system.tokenizer)

    def observe_part(
        batch: DecodeBatch, waves: torch.Tensor, rows: slice
    ) -> list[tuple[str, TimestampForm | None]]:
        clips = batch.clips[rows]
        encoded = decoding.encode_windows(model, waves[rows], batch.windows[rows])
        languages = [sample.languages[clip] for clip in clips] if multilingual else None
        detected = detect_languages(model, encoded) if multilingual else [""] * len(clips)
        forms = timestamp_forms(model, encoded, languages, [seconds[i] for i in clips], options)
        return list(zip(detected, forms, strict=True))

    observed = []
    for batch, inputs in zip(own, loader, strict=True):
        part = partial(observe_part, batch, inputs["waves"])
        results = decoding.in_halves(part, len(batch.clips))
        observed += zip([str(ids[clip]) for clip in batch.clips], results, strict=True)
    return dict(gather_object(observed))


# ------ languages


def detect_languages(model: WhisperForConditionalGeneration, encoded: Encoded) -> list[str]:
    """The most probable language after the start token, for each encoded clip (B)."""
    tokens = model.generation_config.lang_to_id
    codes = {token: ALIASES.get(name[2:-2], name[2:-2]) for name, token in tokens.items()}
    detected = [""] * sum(len(rows) for rows, _ in encoded)
    for rows, states in encoded:
        ids = model.detect_language(encoder_outputs=BaseModelOutput(states)).tolist()
        for row, token in zip(rows, ids, strict=True):
            detected[row] = codes[token]
    return detected


def count_languages(languages: Sequence[str], detected: Sequence[str]) -> dict[str, Any]:
    """Clips whose language is identified, and the most frequent confusions.

    >>> count_languages(["hi", "hi", "mr"], ["ur", "hi", "mr"])
    {'correct': 2, 'confusions': [{'language': 'hi', 'detected': 'ur', 'count': 1}]}
    """
    pairs = Counter(zip(languages, detected, strict=True))
    wrong = sorted((-count, *pair) for pair, count in pairs.items() if pair[0] != pair[1])
    return {
        "correct": sum(count for (own, other), count in pairs.items() if own == other),
        "confusions": [
            {"language": own, "detected": other, "count": -count}
            for count, own, other in wrong[:MOST_CONFUSED]
        ],
    }


# ------ the other task


def examine_other_task(
    sample: Sample,
    system: System,
    options: predictions.DecodeOptions,
) -> dict[str, Any] | None:
    """Decode with the task that the folder was not prepared for, and examine the texts.

    English speech is left out, since both tasks give the same text; `None` if there is no other.
    """
    foreign = [row for row, code in enumerate(sample.languages) if code != "en"]
    if not foreign:
        return None
    task = "transcribe" if options.task == "translate" else "translate"
    clips = sample.clips.select(foreign)
    options = replace(options, task=task)
    texts, _ = transcribe(system, clips, options)
    ordered = [texts[str(clip_id)] for clip_id in column(clips, "id")]
    return {"task": task} | count_texts(ordered, [sample.texts[row] for row in foreign])


def count_texts(predictions: Sequence[Prediction], own_task: Sequence[str]) -> dict[str, Any]:
    """How many texts of a task are no texts of it.

    Args:
        predictions: of each clip (N).
        own_task: what the system writes for each clip (N) as the task it is scored on.
    """
    texts = [prediction.text for prediction in predictions]
    letters = regex.findall(r"\p{L}", "".join(texts))
    latin = sum(bool(regex.match(r"\p{Latin}", letter)) for letter in letters)
    return {
        "clips": len(texts),
        "empty": sum(not text for text in texts),
        "looping": sum(prediction.loops for prediction in predictions),
        "same_text": sum(
            bool(text) and keep_marks(text) == keep_marks(other)
            for text, other in zip(texts, own_task, strict=True)
        ),
        "letters": len(letters),
        "latin_letters": latin,
    }


# ------ timestamps


@dataclass(frozen=True)
class TimestampForm:
    """Whether the timestamps of a text have the form that Whisper was trained to write."""

    starts: bool  # <|0.00|> comes first
    ends: bool  # a time comes last, after text
    in_order: bool  # there are times, none before an earlier one, none beyond the clip


def has_timestamps(model: WhisperForConditionalGeneration) -> bool:
    return model.config.vocab_size > model.generation_config.no_timestamps_token_id + 1


def timestamp_forms(
    model: WhisperForConditionalGeneration,
    encoded: Encoded,
    languages: Sequence[str] | None,
    seconds: Sequence[float],
    options: predictions.DecodeOptions,
) -> list[TimestampForm | None]:
    """Decode encoded clips (B) with timestamps, and examine them; `None` where there are none."""
    if not has_timestamps(model):
        return [None] * len(seconds)
    texts = decoding.decode_encoded(
        model,
        encoded,
        languages=languages,
        task=options.task,
        caps=[decoding.token_cap(float(own), options.tokens_per_second) for own in seconds],
        timestamps=True,
    )
    config = model.generation_config
    first, end = config.no_timestamps_token_id + 1, config.eos_token_id
    return [
        timestamp_form(text.tokens, float(own), first=first, end=end)
        for text, own in zip(texts, seconds, strict=True)
    ]


def timestamp_form(tokens: Sequence[int], seconds: float, *, first: int, end: int) -> TimestampForm:
    """Examine the tokens of a clip, without its prompt and its end token.

    Args:
        first: id of <|0.00|>; the ids after it are 20 ms apart.
        end: id of <|endoftext|>; those of text are below it.

    >>> timestamp_form([100, 7, 8, 150, 150, 9, 200], 2.0, first=100, end=50)
    TimestampForm(starts=True, ends=True, in_order=True)
    """
    times = [token - first for token in tokens if token >= first]
    latest = math.ceil((seconds + END_TOLERANCE_SECONDS) * STEPS_PER_SECOND)
    has_text = any(token < end for token in tokens)
    return TimestampForm(
        starts=bool(tokens) and tokens[0] == first,
        ends=has_text and tokens[-1] >= first,
        in_order=bool(times) and times == sorted(times) and times[-1] <= latest,
    )


def count_forms(forms: Sequence[TimestampForm]) -> dict[str, int]:
    return {
        "starts": sum(form.starts for form in forms),
        "ends": sum(form.ends for form in forms),
        "in_order": sum(form.in_order for form in forms),
        "whole": sum(form.starts and form.ends and form.in_order for form in forms),
    }


# ------ shown


def ability_rows(systems: dict[str, dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Abilities of systems that were scored on the same clips: labels, and a cell a system."""
    own = [system["abilities"] for system in systems.values()]
    other = next((each["other_task"] for each in own if each["other_task"]), None)
    task = f"<|{other['task']}|>" if other else "<|translate|>"
    return [
        ("language identified", [_share(each["languages"], "correct", each) for each in own]),
        ("most frequent confusion", [_confusion(each["languages"]) for each in own]),
        *(
            (f"{task}: {label}", [_share(each["other_task"], key) for each in own])
            for key, label in (
                ("empty", "empty"), ("looping", "loops"), ("same_text", "same text as without"),
            )
        ),
        (f"{task}: letters in Latin script", [_latin(each["other_task"]) for each in own]),
        *(
            (f"timestamps: {label}", [_share(each["timestamps"], key, each) for each in own])
            for key, label in (
                ("starts", "start at 0.00"), ("ends", "end after the text"),
                ("in_order", "in order, within the clip"), ("whole", "all three"),
            )
        ),
    ]  # fmt: skip


NOT_APPLICABLE = "not applicable"


def _share(counts: dict[str, Any] | None, key: str, whole: dict[str, Any] | None = None) -> str:
    return f"{counts[key]} of {(whole or counts)['clips']}" if counts else NOT_APPLICABLE


def _confusion(counts: dict[str, Any] | None) -> str:
    if not counts:
        return NOT_APPLICABLE
    if not counts["confusions"]:
        return "none"
    first = counts["confusions"][0]
    return f"{first['language']} as {first['detected']}: {first['count']}"


def _latin(counts: dict[str, Any] | None) -> str:
    if not counts:
        return NOT_APPLICABLE
    return f"{100 * counts['latin_letters'] / max(counts['letters'], 1):.0f} %"


def has_abilities(systems: dict[str, dict[str, Any]]) -> bool:
    return all("abilities" in system for system in systems.values())


def abilities_shown(systems: dict[str, dict[str, Any]]) -> str:
    """The rows as a table, a line each."""
    first = next(iter(systems.values()))["abilities"]
    title = f"what it can do, {first['clips']} clips"
    lines = [f"{title:<40}" + _cells(systems)]
    lines += [f"{label:<40}" + _cells(cells) for label, cells in ability_rows(systems)]
    return "\n".join(lines)


def _cells(cells: Sequence[str] | dict[str, Any]) -> str:
    return "".join(f"{cell:>15}" for cell in cells)
