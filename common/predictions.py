"""Clips -> texts by clip id, scored over the corpus once: for evaluation and validation alike.

A clip's window and token cap depend on the clip alone, predictions are gathered by clip id, and
errors are counted over the corpus, so that any number of processes gives one score.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from transformers import (
    PreTrainedTokenizerBase,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from common import batching, decoding, labels, metrics
from common.accelerator import least
from common.batching import DecodeBatch
from common.collator import SpeechCollator, load_batches
from common.ct2 import CT2Whisper
from common.decoding import Decoded, token_cap
from common.memory import device_memory_gib, plan_decoding
from common.prepared import column
from common.progress import track
from common.windows import (
    FULL_WINDOW,
    POSITIONS_PER_SECOND,
    UNTRAINED,
    DecodeMargin,
    DecodeWindowMode,
)

WAVES_ALONE = SpeechCollator(decoder_start_token_id=0, pad_token_id=0)  # reads no labels
Decode = Callable[..., list[Decoded]]  # called as `decoding.decode`


@dataclass(frozen=True)
class Prediction:
    """What was decoded from one clip."""

    id: str
    text: str
    hit_cap: bool  # the token cap cut it off: most likely a loop
    decoded_again: bool = False  # at 30 seconds, as its own window gave a loop or hit the cap
    loops: bool = False  # some tokens come again and again in a row
    logprob: float | None = None  # mean of its tokens; None: not decoded greedily


def collator_for(model: WhisperForConditionalGeneration) -> SpeechCollator:
    """The collator with a model's start token."""
    return SpeechCollator(model.config.decoder_start_token_id, model.config.pad_token_id)


# ------ decoding


def plan_batches(
    accelerator: Accelerator,
    model_config: WhisperConfig,
    seconds: np.ndarray,
    *,
    bytes_per_value: int,
    window_mode: DecodeWindowMode,
    margin: DecodeMargin,
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
    num_processes = accelerator.num_processes
    free_gib = device_memory_gib(accelerator.device, num_processes)
    fits = plan_decoding(
        model_config,
        memory_gib=least(accelerator, free_gib),
        bytes_per_value=bytes_per_value,
        num_beams=num_beams,
    )
    batch_seconds = batch_seconds or fits
    batches = batching.decode_plan(
        seconds,
        batch_seconds=batch_seconds,
        window_mode=window_mode,
        margin=margin,
        num_processes=num_processes,
    )
    return batches, batch_seconds


@dataclass(frozen=True)
class DecodeOptions:
    """How clips are decoded, whatever batch they are in."""

    task: str  # "transcribe" or "translate"
    tokens_per_second: float  # rate that 99.9 % of the prepared clips stay below
    num_beams: int = 1
    num_workers: int = 0  # processes that read audio ahead
    quiet: bool = True  # no progress
    decode_again: bool = True  # at 30 seconds, where a text loops or hits its cap


def transcribe(
    model: WhisperForConditionalGeneration | CT2Whisper,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    batches: Sequence[DecodeBatch],
    options: DecodeOptions,
    decode: Decode = decoding.decode,
) -> list[Prediction]:
    """Decode `batches` of clips of `dataset` in this process.

    A clip whose text loops or hits its cap at a window shorter than 30 seconds is decoded once more
    at 30 seconds, and that text counts, unless `options` keep the first. Whether it is depends on
    the clip alone.

    Args:
        decode: of the engine that `model` is of, PyTorch or CTranslate2.
    """
    attempts = _transcribe_once(model, tokenizer, dataset, batches, options, decode)
    failed = sorted(clip for clip, (_, is_failure) in attempts.items() if is_failure)
    if failed and options.decode_again:
        positions = max(sum(batch.windows) for batch in batches)  # as much memory as before
        plan = batching.decode_plan(
            column(dataset, "seconds")[failed],
            batch_seconds=positions / POSITIONS_PER_SECOND,
            window_mode="full",
            margin=UNTRAINED,
        )
        full = [replace(batch, clips=tuple(failed[row] for row in batch.clips)) for batch in plan]
        second = _transcribe_once(model, tokenizer, dataset, full, options, decode)
        for clip, (prediction, _) in second.items():
            attempts[clip] = replace(prediction, decoded_again=True), False
    return [prediction for prediction, _ in attempts.values()]


def _transcribe_once(
    model: WhisperForConditionalGeneration | CT2Whisper,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    batches: Sequence[DecodeBatch],
    options: DecodeOptions,
    decode: Decode,
) -> dict[int, tuple[Prediction, bool]]:
    """Predictions by row of `dataset`, each with whether it failed in a way 30 seconds may mend."""
    english_only = labels.is_english_only(tokenizer)
    ids, seconds, languages = (column(dataset, name) for name in ("id", "seconds", "language"))
    loader = load_batches(dataset, batches, WAVES_ALONE, num_workers=options.num_workers)
    attempts = {}
    collated = track(loader, total=len(batches), what="decoding, batches", quiet=options.quiet)
    for batch, inputs in zip(batches, collated, strict=True):
        clips = list(batch.clips)
        caps = [token_cap(float(seconds[clip]), options.tokens_per_second) for clip in clips]
        texts = decode(
            model,
            inputs["waves"],
            windows=batch.windows,
            languages=None if english_only else [str(languages[clip]) for clip in clips],
            task=options.task,
            caps=caps,
            num_beams=options.num_beams,
        )
        for clip, window, decoded, cap in zip(clips, batch.windows, texts, caps, strict=True):
            text = tokenizer.decode(decoded.tokens, skip_special_tokens=True).strip()
            hit_cap, loops = len(decoded.tokens) >= cap, decoding.loops(decoded.tokens)
            prediction = Prediction(
                str(ids[clip]), text, hit_cap, loops=loops, logprob=_rounded(decoded.logprob)
            )
            is_failure = window < FULL_WINDOW and (hit_cap or loops)
            attempts[clip] = prediction, is_failure
    return attempts


def _rounded(logprob: float | None) -> float | None:
    """To 3 decimals: the last bits depend on the batch that a clip is decoded in."""
    return None if logprob is None else round(logprob, 3)


def gather(predictions: list[Prediction]) -> dict[str, Prediction]:
    """All ranks' predictions by clip id, on every rank."""
    return {prediction.id: prediction for prediction in gather_object(predictions)}


# ------ scores


def written_languages(dataset: Dataset, task: str) -> list[str]:
    """The codes of the languages that the clips' texts are in: translations are English."""
    return [
        "en" if task == "translate" else str(language) for language in column(dataset, "language")
    ]


def count_errors(
    dataset: Dataset,
    predictions: dict[str, Prediction],
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: str,
) -> dict[str, metrics.ClipCounts]:
    """Count the errors of each clip on the stored transcripts, under each normaliser.

    Args:
        predictions: one for each clip of `dataset`, by id.
        tokenizer: may hold the spelling table of the English normaliser.
        task: `transcribe` or `translate`, whose texts are English.

    Returns:
        Counts by normaliser, clips in the order of `dataset`.
    """
    from common.error_rate import count_by_normaliser

    references = [str(text) for text in column(dataset, "text")]
    hypotheses = [predictions[str(clip_id)].text for clip_id in column(dataset, "id")]
    return count_by_normaliser(references, hypotheses, written_languages(dataset, task), tokenizer)


def summarise(
    predictions: dict[str, Prediction], counts: dict[str, metrics.ClipCounts]
) -> dict[str, Any]:
    """Rates of the corpus under each normaliser, and the clips that are marked."""
    return {
        "clips": len(predictions),
        "clips_at_cap": sum(prediction.hit_cap for prediction in predictions.values()),
        "clips_decoded_again": sum(prediction.decoded_again for prediction in predictions.values()),
        "clips_looping": sum(prediction.loops for prediction in predictions.values()),
        "clips_empty": sum(not prediction.text for prediction in predictions.values()),
        "normalisers": {name: clips.rates() for name, clips in counts.items()},
    }
