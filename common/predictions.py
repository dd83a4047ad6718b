"""Clips -> texts by clip id, scored over the corpus once: for evaluation and validation alike.

A clip's window and token cap depend on the clip alone, predictions are gathered by clip id, and
errors are counted over the corpus, so that any number of processes gives one score.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from transformers import (
    PreTrainedTokenizerBase,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from common import batching, decoding, engine, labels, metrics, whisper
from common.batching import DecodeBatch, DecodeContext, DecodeWindow
from common.collator import SpeechCollator, load_batches
from common.memory import CAP_MARGIN, device_memory_gib, plan_decoding
from common.prepared import column
from common.progress import track

CAP_EXTRA = 16  # tokens on top, for clips so short that a rate says little


@dataclass(frozen=True)
class Prediction:
    """What was decoded from one clip."""

    id: str
    text: str
    hit_cap: bool  # the token cap cut it off: most likely a loop
    decoded_again: bool = False  # at 30 seconds, as its own window gave a loop or hit the cap


def load_for_decoding(
    model: str, adapter: str, *, dtype: torch.dtype, device: torch.device
) -> WhisperForConditionalGeneration:
    """Load a base, merge the adapter (if not empty) in float32, then convert the weights once."""
    base = whisper.load_base(model, dtype=torch.float32)
    if adapter:
        base = whisper.load_merged(base, adapter)
    return base.to(device, dtype).eval()


def collator_for(model: WhisperForConditionalGeneration) -> SpeechCollator:
    """The collator with a model's start token."""
    return SpeechCollator(model.config.decoder_start_token_id, model.config.pad_token_id)


def token_cap(seconds: float, tokens_per_second: float) -> int:
    """Most new tokens a clip may take: what its duration can hold and some more.

    Args:
        tokens_per_second: the rate that 99.9 % of the prepared clips stay below.
    """
    return min(
        math.ceil(seconds * tokens_per_second * CAP_MARGIN) + CAP_EXTRA,
        labels.MAX_LABELS - decoding.PROMPT_LENGTH,
    )


# ------ decoding


def plan_batches(
    accelerator: Accelerator,
    model_config: WhisperConfig,
    seconds: np.ndarray,
    *,
    bytes_per_value: int,
    context: DecodeContext,
    window: DecodeWindow,
    batch_seconds: float = 0.0,
    num_beams: int = 1,
) -> tuple[list[DecodeBatch], float]:
    """Batches that fit the memory of every process, as many for each; their seconds of window.

    All processes must call. What earlier batches have left in the allocator's cache is given back.

    Args:
        seconds: (N,) length of each clip.
        bytes_per_value: of keys and values.
        batch_seconds: given by hand; 0 fits the memory.
    """
    clear_device_cache(garbage_collection=True)
    of = accelerator.num_processes
    fits = plan_decoding(
        model_config,
        memory_gib=engine.least(accelerator, device_memory_gib(accelerator.device, of)),
        bytes_per_value=bytes_per_value,
        num_beams=num_beams,
    )
    batch_seconds = batch_seconds or fits
    batches = batching.decode_plan(
        seconds, batch_seconds=batch_seconds, context=context, window=window, num_processes=of
    )
    return batches, batch_seconds


def transcribe(
    model: WhisperForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    batches: Sequence[DecodeBatch],
    *,
    task: str,
    tokens_per_second: float,
    num_beams: int = 1,
    num_workers: int = 0,
    quiet: bool = True,
) -> list[Prediction]:
    """Decode `batches` of clips of `dataset` in this process.

    A clip whose text loops or hits its cap at a window shorter than 30 seconds is decoded once more
    at 30 seconds, and that text counts: which clips are is a matter of each clip alone.
    """
    once = partial(
        _transcribe_once, model, tokenizer, dataset, task=task, tokens_per_second=tokens_per_second,
        num_beams=num_beams, num_workers=num_workers, quiet=quiet,
    )  # fmt: skip
    found = once(batches)
    again = sorted(clip for clip, (_, failed) in found.items() if failed)
    if again:
        held = max(sum(batch.windows) for batch in batches)  # as much memory as before
        planned = batching.decode_plan(
            column(dataset, "seconds")[again],
            batch_seconds=held / batching.POSITIONS_PER_SECOND,
            context="full",
            window=batching.UNTRAINED,
        )
        wide = [replace(one, clips=tuple(again[row] for row in one.clips)) for one in planned]
        for clip, (prediction, _) in once(wide).items():
            found[clip] = replace(prediction, decoded_again=True), False
    return [prediction for prediction, _ in found.values()]


def _transcribe_once(
    model: WhisperForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    batches: Sequence[DecodeBatch],
    *,
    task: str,
    tokens_per_second: float,
    num_beams: int,
    num_workers: int,
    quiet: bool,
) -> dict[int, tuple[Prediction, bool]]:
    """Predictions by row of `dataset`, and whether each is one that 30 seconds may mend."""
    collate = collator_for(model)
    english_only = labels.is_english_only(tokenizer)
    seconds, languages = column(dataset, "seconds"), column(dataset, "language")
    ids = column(dataset, "id")
    loader = load_batches(dataset, batches, collate, num_workers=num_workers)
    found = {}
    collated = track(loader, total=len(batches), what="decoding, batches", quiet=quiet)
    for batch, inputs in zip(batches, collated, strict=True):
        clips = list(batch.clips)
        caps = [token_cap(float(seconds[clip]), tokens_per_second) for clip in clips]
        decoded = decoding.decode(
            model,
            inputs["waves"],
            windows=batch.windows,
            languages=None if english_only else [str(languages[clip]) for clip in clips],
            task=task,
            caps=caps,
            num_beams=num_beams,
        )
        for clip, window, tokens, cap in zip(clips, batch.windows, decoded, caps, strict=True):
            text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            hit_cap = len(tokens) >= cap
            failed = window < batching.FULL_CONTEXT and (hit_cap or decoding.loops(tokens))
            found[clip] = Prediction(str(ids[clip]), text, hit_cap), failed
    return found


def gather(predictions: list[Prediction]) -> dict[str, Prediction]:
    """All ranks' predictions by clip id, on every rank."""
    return {found.id: found for found in gather_object(predictions)}


# ------ scores


def written_languages(dataset: Dataset, task: str) -> list[str]:
    """The codes of the languages that the clips' texts are in: translations are English."""
    return [
        "en" if task == "translate" else str(language) for language in column(dataset, "language")
    ]


def score(
    dataset: Dataset,
    predictions: dict[str, Prediction],
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: str,
) -> dict[str, Any]:
    """Count errors over the corpus on the stored transcripts, under each normaliser.

    Args:
        predictions: one for each clip of `dataset`, by id.
        tokenizer: may hold the spelling table of the English normaliser.
        task: `transcribe` or `translate`, whose texts are English.
    """
    languages = written_languages(dataset, task)
    references = [str(text) for text in column(dataset, "text")]
    found = [predictions[str(clip_id)] for clip_id in column(dataset, "id")]
    texts = [one.text for one in found]
    spelling = getattr(tokenizer, "english_spelling_normalizer", None)
    names = metrics.normalisers_for(languages)
    return {
        "clips": len(found),
        "clips_at_cap": sum(one.hit_cap for one in found),
        "clips_decoded_again": sum(one.decoded_again for one in found),
        "normalisers": {
            name: metrics.ErrorRate(name, spelling=spelling, languages=languages).compute(
                predictions=texts, references=references
            )
            for name in names
        },
    }
