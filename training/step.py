"""One optimizer step: forward and backward over its pieces, in halves when memory runs out.

Legend: B clips of a piece.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from common.accelerator import say
from common.adapter import base_of
from common.cli import OwnError, UserError
from common.collator import label_positions
from training import engine
from training.augment import spec_masks
from training.loss import SpeechLoss
from training.meter import Meter
from training.plan import Inputs, Step
from training.sharded import trained_parameters
from training.stop import Stop


@dataclass(frozen=True)
class TrainState:
    """The model in each of its forms, and what changes it."""

    accelerator: Accelerator
    model: torch.nn.Module  # Whisper, or PEFT's model around it: saved, restored, decoded
    speech_loss: torch.nn.Module  # SpeechLoss around it, wrapped by the engine: what training calls
    optimizer: torch.optim.Optimizer  # wrapped by the engine


def make_state(
    accelerator: Accelerator,
    model: torch.nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    max_grad_norm: float,
    gradient_checkpointing: bool,
) -> TrainState:
    """Wrap the loss around the model, and the engine around the loss and its optimizer."""
    if gradient_checkpointing:
        base_of(model).gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(
        trained_parameters(model).values(), lr=learning_rate, weight_decay=weight_decay, fused=True
    )
    speech_loss, optimizer = engine.prepare(
        accelerator, SpeechLoss(model), optimizer, max_grad_norm=max_grad_norm
    )
    speech_loss.train()
    return TrainState(accelerator, model, speech_loss, optimizer)


@dataclass
class StepOptions:
    """How steps are computed."""

    seed: int
    max_grad_norm: float
    max_batch_seconds: float
    spec_augment: bool = False
    num_parts: int = 1  # that each piece is cut into, after memory ran out


def train_step(
    state: TrainState,
    step: Step,
    collated: Iterator[Inputs],
    meter: Meter,
    stop: Stop,
    options: StepOptions,
) -> None:
    """Forward and backward over a step's pieces and one optimizer step; adds to `meter`.

    Nothing here waits for a GPU. In fp16 a step whose gradient overflows is not taken, and its loss
    is not counted.

    Where a piece does not fit the GPU's memory, on any process, the step starts again on all of
    them with pieces half as large, and so do all later steps: the same gradient but for rounding.
    DeepSpeed and FSDP exchange weights or gradients within a piece, which no process can leave:
    they end.
    """
    accelerator, optimizer = state.accelerator, state.optimizer
    received: list[Inputs] = []
    pieces = receive(collated, meter, received)
    restarts = engine.exchanges_last(accelerator)
    while True:
        loss = accumulate(state, step, pieces, options)
        fits = loss is not None
        if stop.all(fits) if restarts else fits:
            break
        received += receive(collated, meter, [])
        if not restarts or options.num_parts >= len(step.pieces[0].clips):
            error = UserError if restarts else OwnError
            raise error(
                f"--max_batch_seconds {options.max_batch_seconds}: step {step.number + 1} does not "
                "fit the GPU's memory: give fewer seconds, or --gradient_checkpointing true"
            )
        options.num_parts *= 2
        say(accelerator, f"out of memory: pieces are cut into {options.num_parts} from here on")
        engine.clear_gradient(accelerator, optimizer)
        clear_device_cache(garbage_collection=True)
        pieces = iter(received)
    engine.exchange(accelerator, optimizer)
    norm = engine.clip_gradient(accelerator, optimizer, options.max_grad_norm)
    engine.hold_if_not_finite(accelerator, optimizer, norm)
    optimizer.step()
    engine.clear_gradient(accelerator, optimizer)
    if accelerator.scaler is not None:
        loss = torch.where(torch.isfinite(norm), loss, 0.0)
    meter.loss += loss
    meter.norms.append((step, norm))


def accumulate(
    state: TrainState, step: Step, pieces: Iterator[Inputs], options: StepOptions
) -> torch.Tensor | None:
    """Add up the gradients of a step's pieces, and their loss; `None` where memory ran out.

    The gradient is that of the summed loss divided by the label tokens of the global batch. DDP
    averages over processes, hence the factor.
    """
    parts = (
        part
        for batch, piece in zip(step.pieces, pieces, strict=False)
        for part in split_rows(
            piece | draws(step, batch.clips, options),
            options.num_parts,
        )
    )
    count = sum(len(part_starts(len(piece.clips), options.num_parts)) for piece in step.pieces)
    accelerator = state.accelerator
    scale = accelerator.num_processes / step.num_tokens
    total = torch.zeros((), device=accelerator.device)
    try:
        for i in range(count):
            inputs = next(parts)
            with engine.accumulating(accelerator, state.speech_loss, last=i == count - 1):
                loss = batch_loss(state.speech_loss, inputs)
                total += loss.detach()
                accelerator.backward(loss * scale)
    except RuntimeError as error:
        is_memory = isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
        if not is_memory:
            raise
        return None
    return total


def batch_loss(speech_loss: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
    """Cross entropy summed over the label tokens of a collated batch, on any device."""
    device = next(speech_loss.parameters()).device
    return speech_loss(
        **{name: value.to(device, non_blocking=True) for name, value in inputs.items()}
    )


def receive(collated: Iterator[Inputs], meter: Meter, received: list[Inputs]) -> Iterator[Inputs]:
    """Yield a step's pieces, keep them in `received`, and count the time spent waiting for them."""
    start = time.perf_counter()
    for piece in collated:
        meter.wait_seconds += time.perf_counter() - start
        received.append(piece)
        yield piece
        start = time.perf_counter()


def draws(step: Step, clips: Sequence[int | None], options: StepOptions) -> Inputs:
    """What is drawn for the clips of a piece: seeds of the dropout, and masks of features."""
    drawn = {"clip_seeds": clip_seeds(options.seed, step.number, clips)}
    if options.spec_augment:
        masks = spec_masks(clips, step.seconds, seed=options.seed, step=step.number)
        drawn["spec_masks"] = masks.pin_memory() if torch.cuda.is_available() else masks
    return drawn


def clip_seeds(seed: int, step: int, clips: Sequence[int | None]) -> torch.Tensor:
    """Seeds (B) of the adapter's dropout, whichever process or piece computes a clip."""
    sources = ((seed, step, 0 if clip is None else clip + 1) for clip in clips)
    seeds = [int(np.random.SeedSequence(source).generate_state(1)[0]) for source in sources]
    return torch.tensor(seeds, pin_memory=torch.cuda.is_available())  # copied asynchronously


def part_starts(num_clips: int, num_parts: int) -> range:
    """Index of the first clip of each part of a piece, of parts as even as can be.

    >>> list(part_starts(8, 2)), list(part_starts(3, 4))
    ([0, 4], [0, 1, 2])
    """
    return range(0, num_clips, math.ceil(num_clips / num_parts))


def split_rows(inputs: Inputs, num_parts: int) -> Iterator[Inputs]:
    """Cut a collated piece into `num_parts` parts, or a clip each where it has fewer clips."""
    if num_parts == 1:
        yield inputs
        return
    starts = part_starts(len(inputs["labels"]), num_parts)
    for start in starts:
        part = {
            name: value[start : start + starts.step]
            for name, value in inputs.items()
            if name != "label_positions"
        }
        yield part | {"label_positions": label_positions(part["labels"])}
