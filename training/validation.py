"""Validation during training: loss of a token, and word error rate decoded as eval_wer.py does."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, WhisperForConditionalGeneration

from common import batching, predictions
from common.adapter import merged
from common.batching import DecodeBatch, MicroBatch
from common.bootstrap import rate_interval
from common.collator import SpeechCollator, load_batches
from common.predictions import DecodeOptions, Prediction
from common.prepared import column, label_lengths
from common.windows import TRAINED, WindowMode, decode_windows, round_up
from training import engine
from training import output as outputs
from training.journal import Journal, log, log_text
from training.occasions import Occasions
from training.output import Output
from training.sharded import trained_parameters, whole
from training.step import TrainState, batch_loss

SANITY_CLIPS = 2  # validation clips that are tried before training, to fail early
SHOWN_TEXTS = 5  # validation texts shown in TensorBoard


@dataclass(frozen=True)
class Validation:
    """The clips that a run is validated on, and how."""

    dataset: Dataset
    collate: SpeechCollator
    tokenizer: PreTrainedTokenizerBase
    options: DecodeOptions
    window_mode: WindowMode
    max_batch_seconds: float  # of window in a batch of the loss
    bytes_per_value: int  # of keys and values that are decoded with
    reload: Callable[[], torch.nn.Module]  # loads the model anew, for engines that shard it


def loss_plan(validation: Validation) -> list[MicroBatch]:
    """The clips in batches of one window each, with labels."""
    seconds = column(validation.dataset, "seconds")
    return batching.window_plan(
        seconds,
        decode_windows(seconds, validation.window_mode, TRAINED),
        batch_seconds=validation.max_batch_seconds,
        label_lengths=label_lengths(validation.dataset) - 1,  # the start token is cut
    )


@torch.no_grad()
def validation_loss(
    validation: Validation, state: TrainState, batches: Sequence[MicroBatch]
) -> float:
    """Mean loss of a label token over `batches`, which are spread over the processes.

    All processes compute the same number of batches, because engines that shard weights gather them
    in all processes at once: the last batch fills up, and is counted once.
    """
    accelerator, speech_loss = state.accelerator, state.speech_loss
    num_processes = accelerator.num_processes
    own = range(accelerator.process_index, round_up(len(batches), num_processes), num_processes)
    own_batches = [batches[min(i, len(batches) - 1)] for i in own]
    sums = torch.zeros(2, dtype=torch.float64)  # loss, tokens
    speech_loss.eval()
    loader = load_batches(
        validation.dataset,
        own_batches,
        validation.collate,
        num_workers=validation.options.num_workers,
    )
    for i, inputs in zip(own, loader, strict=True):
        loss = batch_loss(speech_loss, inputs).item()
        if i < len(batches):
            sums += torch.tensor([loss, len(inputs["label_positions"])])
    speech_loss.train()
    engine.reshard(speech_loss)
    loss, tokens = accelerator.reduce(sums.to(accelerator.device)).tolist()
    return loss / tokens


def evaluate(
    due: Occasions,
    step: int,
    validation: Validation,
    state: TrainState,
    output: Output,
    journal: Journal,
) -> None:
    """Log what is due after a step, and keep the model if it is the best so far.

    The run's last evaluation has error rates: if patience ends it, they may not be due.
    """
    values = {}
    if due.eval_loss:
        values["eval_loss"] = validation_loss(validation, state, loss_plan(validation))
        log(journal, {"step": step} | values)
    if due.eval_wer:
        values |= log_error_rates(step, validation, state, journal)
    if output.criterion in values:
        outputs.keep_best(output, state, step, values[output.criterion])
    if output.exhausted and not due.eval_wer:
        log_error_rates(step, validation, state, journal)
    outputs.mark_evaluated(output, state, step)


def log_error_rates(
    step: int, validation: Validation, state: TrainState, journal: Journal
) -> dict[str, float]:
    """Log error rates and the first texts; the rates."""
    rates, texts = word_error_rates(validation, state)
    log(journal, {"step": step} | rates)
    log_text(journal, "predictions", shown_texts(validation, texts), step)
    return rates


def rehearse(validation: Validation, state: TrainState) -> None:
    """Run loss and a short decoding on the shortest clips: what fails in them fails early."""
    shortest = loss_plan(validation)[-1]
    few = replace(shortest, clips=shortest.clips[-SANITY_CLIPS:])
    validation_loss(validation, state, [few])
    short = replace(validation, options=replace(validation.options, tokens_per_second=0.0))
    transcribe(short, state, [DecodeBatch(few.clips, (few.window,) * len(few.clips))])


# ------ word error rate


def word_error_rates(
    validation: Validation, state: TrainState
) -> tuple[dict[str, float], dict[str, Prediction]]:
    """Rates for the log, in per cent, and the predictions by clip id. All processes must call."""
    batches, _ = predictions.plan_batches(
        state.accelerator,
        state.model.config,
        column(validation.dataset, "seconds"),
        bytes_per_value=validation.bytes_per_value,
        window_mode=validation.window_mode,
        margin=TRAINED,
    )
    texts = transcribe(validation, state, batches)
    dataset = validation.dataset
    counts = predictions.count_errors(
        dataset, texts, validation.tokenizer, task=validation.options.task
    )
    rates = {}
    for name in ("raw", "keep_marks"):
        scores = counts[name].rates()
        rates |= {f"wer_{name}": scores["wer"], f"cer_{name}": scores["cer"]}
    units = column(dataset, "id"), column(dataset, "speaker")
    if bounds := rate_interval(counts["raw"].words, *units):  # a single clip has none
        rates |= dict(zip(("wer_raw_low", "wer_raw_high"), bounds, strict=True))
    return rates, texts


def shown_texts(validation: Validation, texts: dict[str, Prediction]) -> str:
    """References and predictions of the first clips, for TensorBoard."""
    first = range(min(SHOWN_TEXTS, len(validation.dataset)))
    rows = validation.dataset.select_columns(["id", "text"]).select(first)
    return "\n\n".join(f"{row['id']}  \n{row['text']}  \n{texts[row['id']].text}" for row in rows)


def transcribe(
    validation: Validation, state: TrainState, batches: Sequence[DecodeBatch]
) -> dict[str, Prediction]:
    """Decode batches of validation clips, which are spread over the processes."""
    accelerator = state.accelerator
    with decoding_model(state, validation.reload) as model, decoding_precision(state, model):
        own = predictions.transcribe(
            model,
            validation.tokenizer,
            validation.dataset,
            batches[accelerator.process_index :: accelerator.num_processes],
            validation.options,
        )
    return predictions.gather(own)


@contextmanager
def decoding_model(
    state: TrainState, reload: Callable[[], Any]
) -> Iterator[WhisperForConditionalGeneration]:
    """The model as it is now, adapter merged, for evaluation: each process holds the whole of it.

    Where the engine shards the model, a copy is loaded and given the trained weights.
    """
    model = state.model
    if engine.is_sharded(state.accelerator):
        model = reload()
        copies = dict(model.named_parameters())
        for name, parameter in trained_parameters(state.model).items():
            copies[name].data.copy_(whole(parameter))
    model.eval()
    with merged(model) as whisper_model:
        yield whisper_model
    state.model.train()


def decoding_precision(
    state: TrainState, model: WhisperForConditionalGeneration
) -> AbstractContextManager[None]:
    """Autocast around weights held in float32; those in half precision need none, and are faster.

    Weights that are trained are cast once for the whole block: autocast keeps their copies.
    """
    return state.accelerator.autocast() if model.dtype == torch.float32 else nullcontext()
