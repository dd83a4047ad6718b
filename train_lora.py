"""Fine-tune Whisper on a folder that preprocess.py wrote, with LoRA or whole: a hand-written loop.

    accelerate launch train_lora.py --model openai/whisper-large-v2 --data_dir prepared \\
        --output_dir run --num_epochs 3

Writes OUTPUT_DIR/adapter (plain PEFT; `model` with --tune full), adapter_best, checkpoints,
metrics.jsonl, tensorboard and train.json. Started again after any interruption it goes on where the
last checkpoint was, on as many processes as there are then, under any engine.

Legend: B batch, M mel bins, F frames, T label tokens.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, WhisperForConditionalGeneration

from common import batching, cli, engine, labels, precision, predictions, whisper
from common.batching import Context, DecodeBatch, GlobalBatch, MicroBatch
from common.collator import SpeechCollator, label_positions, load_batches
from common.encoder_cache import EncoderCache, finish, is_filled, make_room
from common.files import write_json
from common.memory import (
    MemoryPlan,
    count_weights,
    device_memory_gib,
    held_gib,
    peak_memory_gib,
    plan_memory,
    predict_gib,
)
from common.memory import Step as MemoryStep
from common.precision import DTYPES, Precision
from common.predictions import Prediction
from common.prepared import column, label_lengths, load_prepared
from common.progress import track
from common.provenance import describe_run
from training import checkpoint
from training.journal import Journal, log, log_text, open_journal
from training.stop import Stop, agree, listen

SANITY_CLIPS = 2  # validation clips that are tried before training, to fail early
FULL_RATE = 1e-4  # above it, full fine-tuning is warned
SHOWN_TEXTS = 5  # validation texts shown in TensorBoard
MAX_SKIPPED_STEPS = 20  # fp16 steps in a row that overflow while the loss scaler finds its scale
# Options that a resumed run may change: none of them changes what is computed, but for rounding.
FREE_ON_RESUME = {
    "output_dir", "resume", "num_workers", "log_every", "save_every", "eval_every", "wer_every",
    "keep_checkpoints", "max_batch_seconds", "memory_gib", "save_every_minutes", "max_minutes",
    "resume_changed", "collective_timeout", "cache_dir",
}  # fmt: skip

Tune = Literal["lora", "full", "encoder_frozen"]


@dataclass
class Config:
    """Fine-tune Whisper, with LoRA or whole."""

    # ------ what
    model: str = "openai/whisper-small"  # base: folder or Hub id
    data_dir: str = os.environ.get("SM_CHANNEL_TRAIN", "prepared")  # folder of preprocess.py
    output_dir: str = os.environ.get("SM_OUTPUT_DATA_DIR", "run")  # adapter, checkpoints, logs
    # ------ how long
    num_epochs: int = 3  # passes over the training split
    max_steps: int = 0  # optimizer steps, instead of --num_epochs; 0 goes by epochs
    max_minutes: float = 0.0  # stop in time to save within so many; 0 has no limit
    global_batch_size: int = 0  # clips per step, over all processes; 0: 16, from 10,000 clips on 64
    max_batch_seconds: float = 0.0  # window seconds a process computes at once; 0 fits the memory
    memory_gib: float = 0.0  # memory of a process to be fitted; 0 takes what is free
    # ------ optimizer
    learning_rate: float = 1e-3  # peak, reached after warm-up; --tune full wants about 1e-5
    warmup_ratio: float = 0.1  # share of all steps that the learning rate rises over
    schedule: Literal["linear", "cosine"] = "linear"  # decay to zero after warm-up
    weight_decay: float = 0.0  # AdamW's
    max_grad_norm: float = 1.0  # gradients are clipped to it
    # ------ what is trained
    tune: Tune = "lora"  # lora, full (all weights) or encoder_frozen (all but the encoder's)
    lora_rank: int = 32  # rank of the update
    lora_alpha: int = 64  # the update is scaled by alpha / rank
    lora_targets: str = "q_proj,v_proj"  # of q_proj,k_proj,v_proj,out_proj,fc1,fc2
    lora_dropout: float = 0.05  # on the update's input, by feature
    lora_scope: str = "all"  # all, decoder, or top_K: the decoder and the encoder's last K layers
    cache_encoder: bool = False  # keep a frozen encoder's outputs on disk; needs one that is frozen
    cache_dir: str = ""  # a local disk for these outputs; empty: OUTPUT_DIR/encoder_cache
    # ------ base
    quantize: whisper.Quantize = "none"  # int8 or nf4 hold the base in 8 or 4 bits, to fit
    precision: Precision = "auto"  # fp32, bf16 or fp16; auto: the GPU's best, or fp32 on a CPU
    gradient_checkpointing: bool = False  # less memory, a third more time; by itself at need
    context: Context = "auto"  # window: auto follows the clips' length, full is 30 seconds
    # ------ once in a while
    eval_every: int = 100  # steps between validation losses
    eval_clips: int = 128  # validation clips, the same at every time; 0 takes all
    wer_every: int = 0  # steps between validation word error rates; 0 only at the end
    save_every: int = 100  # steps between checkpoints
    save_every_minutes: float = 0.0  # minutes between checkpoints, besides; 0 goes by steps only
    keep_checkpoints: int = 2  # newest checkpoints kept
    log_every: int = 10  # steps between log lines
    resume: Literal["auto", "never"] = "auto"  # auto goes on from the newest checkpoint
    resume_changed: bool = False  # go on although options differ that change the result
    collective_timeout: float = 30.0  # minutes that a process waits for the others
    seed: int = 42  # of everything random
    num_workers: int = 2  # processes that read audio ahead; 0 reads in the main one


# ------ pure functions of the step


def learning_rate(step: int, config: Config, total_steps: int) -> float:
    """Rate of the optimizer step that follows `step` done ones: warm-up, then decay to zero."""
    warmup_steps = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    share = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * share


def clip_seeds(config: Config, step: int, clips: Sequence[int | None]) -> torch.Tensor:
    """Seeds (B) of the adapter's dropout: the same whatever process or piece a clip comes in."""
    sources = ((config.seed, step, 0 if clip is None else clip + 1) for clip in clips)
    seeds = [int(np.random.SeedSequence(source).generate_state(1)[0]) for source in sources]
    return torch.tensor(seeds, pin_memory=torch.cuda.is_available())  # copied asynchronously


# ------ data


@dataclass(frozen=True)
class Step:
    """One optimizer step of this process."""

    number: int  # from 0
    epoch: int
    batch: GlobalBatch
    num_tokens: int  # label tokens of the global batch, over all processes
    pieces: Sequence[MicroBatch]  # of this process


def plan_epoch(
    config: Config,
    accelerator: Accelerator,
    seconds: np.ndarray,
    lengths: np.ndarray,
    epoch: int,
    cache: EncoderCache | None,
) -> list[Step]:
    """All steps of an epoch. The number of processes changes only `pieces`."""
    batches = batching.plan(
        seconds,
        global_batch_size=config.global_batch_size,
        seed=config.seed,
        epoch=epoch,
        context=config.context,
        windows=None if cache is None else cache.contexts,
    )
    return [
        Step(
            number=epoch * len(batches) + i,
            epoch=epoch,
            batch=batch,
            num_tokens=int(lengths[list(batch.clips)].sum()),
            pieces=batching.micro_batches(
                batch,
                rank=accelerator.process_index,
                num_processes=accelerator.num_processes,
                max_batch_seconds=config.max_batch_seconds,
                label_lengths=lengths,
                windows=None if cache is None else cache.contexts,
            ),
        )
        for i, batch in enumerate(batches)
    ]


def load_steps(
    config: Config,
    accelerator: Accelerator,
    dataset: Dataset,
    collate: SpeechCollator,
    *,
    first: int,
    total: int,
    cache: EncoderCache | None = None,
) -> Iterator[tuple[Step, Iterator[dict[str, torch.Tensor]]]]:
    """Yield the steps from `first` up to `total` with an iterator over their collated pieces."""
    seconds, lengths = column(dataset, "seconds"), label_lengths(dataset) - 1  # start token is cut
    steps_per_epoch = math.ceil(len(dataset) / config.global_batch_size)
    for epoch in range(first // steps_per_epoch, math.ceil(total / steps_per_epoch)):
        planned = plan_epoch(config, accelerator, seconds, lengths, epoch, cache)
        steps = [step for step in planned if first <= step.number < total]
        pieces = [piece for step in steps for piece in step.pieces]
        collated = iter(
            load_batches(dataset, pieces, collate, num_workers=config.num_workers, cache=cache)
        )
        for step in steps:
            yield step, (next(collated) for _ in step.pieces)


# ------ loss


def token_loss_sum(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy summed over the label tokens of a batch, as `whisper.return_loss_sum` has it.

    Args:
        inputs: what SpeechCollator gives, on any device.
    """
    device = next(model.parameters()).device
    moved = {name: one.to(device, non_blocking=True) for name, one in inputs.items()}
    states = moved.pop("encoder_states", None)
    return model(**moved, encoder_outputs=None if states is None else (states,))


@torch.no_grad()
def validation_loss(run: "Run", batches: Sequence[MicroBatch]) -> float:
    """Mean loss of a label token over `batches`, which are shared out among the processes.

    All of them compute as many: sharded weights are gathered by all at once. The last batch fills
    up, and is not counted again.
    """
    rank, of = run.accelerator.process_index, run.accelerator.num_processes
    mine = range(rank, batching.round_up(len(batches), of), of)
    taken = [batches[min(at, len(batches) - 1)] for at in mine]
    sums = torch.zeros(2, dtype=torch.float64)  # loss, tokens
    run.wrapped.eval()
    workers = run.config.num_workers
    loader = load_batches(run.validation, taken, run.collate, num_workers=workers)
    for at, inputs in zip(mine, loader, strict=True):
        loss = token_loss_sum(run.wrapped, inputs).item()
        if at < len(batches):
            sums += torch.tensor([loss, len(inputs["label_positions"])])
    run.wrapped.train()
    engine.share_out(run.model)
    loss, tokens = run.accelerator.reduce(sums.to(run.accelerator.device)).tolist()
    return loss / tokens


# ------ what a run carries


@dataclass
class Totals:
    """Sums since the last log line; rates are divided out of them once."""

    loss: torch.Tensor  # of this process, on its device
    tokens: int = 0
    clips: int = 0
    audio_seconds: float = 0.0
    wait_seconds: float = 0.0  # of waiting for data
    seconds: float = 0.0
    norms: list[tuple[Step, torch.Tensor]] = field(default_factory=list)  # not looked at yet
    last_norm: float | None = None  # of the last step that was taken


@dataclass
class Run:
    """What the occasional phases of a run need: evaluating, saving, logging."""

    config: Config
    accelerator: Accelerator
    model: torch.nn.Module  # Whisper, or PEFT's around it
    wrapped: torch.nn.Module  # the same in its engine: what is called
    optimizer: torch.optim.Optimizer
    collate: SpeechCollator
    tokenizer: PreTrainedTokenizerBase
    validation: Dataset | None
    prepared: dict[str, Any]  # preprocess.json
    made: dict[str, Any]  # what lies beside each adapter: recipe, base, window
    identity: dict[str, Any]
    journal: Journal
    output: Path
    best: dict[str, float] | None  # step and eval_loss of adapter_best
    stop: Stop
    total_steps: int
    num_parts: int = 1  # that each piece is cut in, after memory ran out
    skipped: int = 0  # steps that overflowed in fp16
    skipped_in_row: int = 0  # the last ones of them

    def loss_plan(self) -> list[MicroBatch]:
        """The validation clips in batches of one window, with labels."""
        seconds = column(self.validation, "seconds")
        return batching.window_plan(
            seconds,
            batching.decode_windows(seconds, self.config.context, batching.TRAINED),
            batch_seconds=self.config.max_batch_seconds,
            label_lengths=label_lengths(self.validation) - 1,
        )

    def decode_plan(self) -> list[DecodeBatch]:
        """The validation clips in batches to be decoded, as large as the free memory allows."""
        dtype = DTYPES[self.config.precision]
        return predictions.plan_batches(
            self.accelerator,
            self.model.config,
            column(self.validation, "seconds"),
            bytes_per_value=dtype.itemsize,
            context=self.config.context,
            window=batching.TRAINED,
        )[0]


# ------ one step


def part_starts(num_clips: int, num_parts: int) -> range:
    """The first clip of each of so many parts, as even as can be, of a piece.

    >>> list(part_starts(8, 2)), list(part_starts(3, 4))
    ([0, 4], [0, 1, 2])
    """
    return range(0, num_clips, math.ceil(num_clips / num_parts))


def split_rows(
    inputs: dict[str, torch.Tensor], num_parts: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Cut collated inputs into as many parts, or a clip each where there are fewer clips."""
    if num_parts == 1:
        yield inputs
        return
    starts = part_starts(len(inputs["labels"]), num_parts)
    for start in starts:
        part = {
            name: one[start : start + starts.step]
            for name, one in inputs.items()
            if name != "label_positions"
        }
        yield part | {"label_positions": label_positions(part["labels"])}


def train_step(
    run: Run,
    step: Step,
    collated: Iterator[dict[str, torch.Tensor]],
    totals: Totals,
) -> None:
    """Forward and backward over a step's pieces, one optimizer step; adds to `totals`.

    Nothing here waits for a GPU: gradient norms stay there until `check_norms` looks at them.

    In fp16 a step whose gradient overflows is not taken, and its loss not counted.

    Where a piece does not fit the GPU's memory, on any process, the step starts again on all with
    pieces half as large, and so do all later steps: the same gradient but for rounding. DeepSpeed
    and FSDP exchange weights or gradients within a piece, which no process can leave: they end.
    """
    accelerator, optimizer = run.accelerator, run.optimizer
    arrived = []
    pieces = arriving(collated, totals, arrived)
    starts_again = engine.exchanges_last(accelerator)
    while True:
        loss = accumulate(run, step, pieces)
        fits = loss is not None
        if run.stop.all(fits) if starts_again else fits:
            break
        arrived += arriving(collated, totals, [])
        if not starts_again or run.num_parts >= len(step.pieces[0].clips):
            error = cli.UserError if starts_again else cli.OwnError
            raise error(
                f"--max_batch_seconds {run.config.max_batch_seconds}: step {step.number + 1} does "
                "not fit the GPU's memory: give fewer seconds, or --gradient_checkpointing true"
            )
        run.num_parts *= 2
        engine.say(accelerator, f"out of memory: pieces are cut in {run.num_parts} from here on")
        engine.clear_gradient(accelerator, optimizer)
        clear_device_cache(garbage_collection=True)
        pieces = iter(arrived)
    engine.exchange(accelerator, optimizer)
    norm = engine.clip_gradient(accelerator, optimizer, run.config.max_grad_norm)
    engine.hold_if_not_finite(accelerator, optimizer, norm)
    optimizer.step()
    engine.clear_gradient(accelerator, optimizer)
    if accelerator.scaler is not None:
        loss = torch.where(torch.isfinite(norm), loss, 0.0)
    totals.loss += loss
    totals.norms.append((step, norm))


def check_norms(run: Run, totals: Totals, dataset: Dataset) -> None:
    """Look at the gradient norms of the steps since the last look.

    One that is not finite is an overflow in fp16: AdamW has read the scaler's flag on the GPU and
    left the weights as they were. Accelerate's `optimizer_step_was_skipped` does not know of it.

    Raises:
        UserError: naming the clips of the first step whose norm is not finite, in fp16 of the last
            of more than MAX_SKIPPED_STEPS in a row.
    """
    norms = torch.stack([norm for _, norm in totals.norms]).tolist()
    for (step, _), norm in zip(totals.norms, norms, strict=True):
        if math.isfinite(norm):
            totals.last_norm, run.skipped_in_row = norm, 0
            continue
        run.skipped, run.skipped_in_row = run.skipped + 1, run.skipped_in_row + 1
        totals.tokens -= step.num_tokens
        if run.accelerator.scaler is None or run.skipped_in_row > MAX_SKIPPED_STEPS:
            raise not_finite(run, step, dataset, norm)
    totals.norms.clear()


def arriving(
    collated: Iterator[dict[str, torch.Tensor]],
    totals: Totals,
    arrived: list[dict[str, torch.Tensor]],
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield a step's pieces, keep them in `arrived`, and count the time spent waiting for them."""
    start = time.perf_counter()
    for piece in collated:
        totals.wait_seconds += time.perf_counter() - start
        arrived.append(piece)
        yield piece
        start = time.perf_counter()


def accumulate(
    run: Run,
    step: Step,
    pieces: Iterator[dict[str, torch.Tensor]],
) -> torch.Tensor | None:
    """Add up the gradients of a step's pieces, and their loss; `None` where memory ran out.

    The gradient is that of the summed loss over the global batch's token count. DDP averages over
    processes, hence the factor.
    """
    parts = (
        part
        for batch, piece in zip(step.pieces, pieces, strict=False)
        for part in split_rows(
            piece | {"clip_seeds": clip_seeds(run.config, step.number, batch.clips)}, run.num_parts
        )
    )
    count = sum(len(part_starts(len(piece.clips), run.num_parts)) for piece in step.pieces)
    scale = run.accelerator.num_processes / step.num_tokens
    total = torch.zeros((), device=run.accelerator.device)
    try:
        for i in range(count):
            inputs = next(parts)
            with engine.accumulating(run.accelerator, run.wrapped, last=i == count - 1):
                loss = token_loss_sum(run.wrapped, inputs)
                total += loss.detach()
                run.accelerator.backward(loss * scale)
    except RuntimeError as error:
        is_memory = isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
        if not is_memory:
            raise
        return None
    return total


# ------ main


def check(config: Config) -> None:
    """Refuse options that cannot be meant, all at once."""
    problems = []
    targets = config.lora_targets.split(",")
    unknown = [target for target in targets if target not in whisper.LORA_TARGETS]
    if unknown:
        problems.append(
            f"--lora_targets {config.lora_targets}: {','.join(unknown)} is not in Whisper: "
            f"give some of {','.join(whisper.LORA_TARGETS)}"
        )
    if config.tune != "lora" and config.quantize != "none":
        problems.append(
            f"--tune {config.tune}: weights in 8 or 4 bits cannot be trained, as --quantize "
            f"{config.quantize} makes them: give --tune lora, or --quantize none"
        )
    scope = config.lora_scope if config.tune == "lora" else config.tune
    if config.cache_encoder and scope not in ("decoder", "encoder_frozen"):
        option = "lora_scope" if config.tune == "lora" else "tune"
        problems.append(
            f"--cache_encoder true: the encoder changes with --{option} {scope}: give "
            f"--lora_scope decoder or --tune encoder_frozen"
        )
    if not whisper.is_scope(config.lora_scope):
        problems.append(
            f"--lora_scope {config.lora_scope}: give all, decoder, or top_ and a number: top_2"
        )
    for name in (
        "num_epochs", "learning_rate", "lora_rank",
        "lora_alpha", "max_grad_norm", "eval_every", "save_every", "keep_checkpoints", "log_every",
        "collective_timeout",
    ):  # fmt: skip
        if getattr(config, name) <= 0:
            problems.append(f"--{name} {getattr(config, name)}: give a positive number")
    for name in (
        "global_batch_size", "max_batch_seconds", "memory_gib", "max_minutes", "save_every_minutes",
    ):  # fmt: skip
        if getattr(config, name) < 0:
            problems.append(f"--{name} {getattr(config, name)}: give a positive number, or 0")
    for name in ("warmup_ratio", "lora_dropout"):
        if not 0 <= getattr(config, name) < 1:
            problems.append(f"--{name} {getattr(config, name)}: give a share from 0 up to 1")
    if problems:
        raise cli.UserError("; ".join(problems))


def check_labels(
    config: Config, tokenizer: PreTrainedTokenizerBase, prepared: dict[str, Any]
) -> None:
    """Refuse labels that this model's tokenizer did not write."""
    if labels.tokenizer_fingerprint(tokenizer) == prepared["tokenizer_fingerprint"]:
        return
    raise cli.UserError(
        f"--data_dir {config.data_dir}: its labels were made by the tokenizer of "
        f"{prepared['config']['model']}, which is not that of --model {config.model}: "
        f"run preprocess.py --model {config.model} into another folder"
    )


def fit_memory(
    config: Config, accelerator: Accelerator, model: torch.nn.Module, memory_gib: float
) -> MemoryPlan:
    """Choose the micro-batch that fits, or say what the one given by hand will take.

    Args:
        memory_gib: that this process may hold, the model included; the same on all, or their pieces
            differ.

    Where engines share weights or moments out, each process is counted as if it held all.
    """
    step = MemoryStep(
        device=accelerator.device.type,
        bytes_per_value=4 if accelerator.mixed_precision == "no" else 2,
        tune=config.tune,
        lora_targets=tuple(config.lora_targets.split(",")),
        lora_scope=config.lora_scope,
        quantize=config.quantize,
        checkpointing=config.gradient_checkpointing,
        encoder_cached=config.cache_encoder,
    )
    weights = count_weights(model, in_buckets=engine.name(accelerator) == "ddp")
    if config.max_batch_seconds:
        predicted = predict_gib(model.config, weights, step, seconds=config.max_batch_seconds)
        return MemoryPlan(config.max_batch_seconds, config.gradient_checkpointing, predicted)
    try:
        return plan_memory(model.config, weights, step, memory_gib=memory_gib)
    except ValueError as error:
        raise cli.UserError(
            f"--memory_gib {memory_gib:.1f}: {error}: take a smaller --model, --quantize nf4, or a "
            "device with more memory"
        ) from error


@torch.no_grad()
def cache_encoder(run: Run, train: Dataset, dtype: torch.dtype) -> EncoderCache:
    """Compute the encoder's outputs of all training clips, or find them done."""
    seconds, base = column(train, "seconds"), whisper.base_of(run.model)
    windows = batching.cache_windows(seconds, run.config.context)
    folder = Path(run.config.cache_dir or run.output / "encoder_cache")
    cache = EncoderCache(folder, windows, base.config.d_model, dtype)
    identity = {
        "model": run.config.model,
        "base_probe": run.made["base_probe"],
        "data_dir": run.identity["data_dir"],
        "dtype": str(dtype),
        "positions": int(windows.sum()),
    }
    filled, first = is_filled(cache, identity), run.accelerator.is_local_main_process
    run.accelerator.wait_for_everyone()  # all have looked
    engine.say(
        run.accelerator,
        f"encoder cache: {cache.num_bytes / 1e9:.2f} GB in {folder}"
        + (", found complete" if filled else ""),
    )
    if filled:
        return cache
    if first:
        make_room(cache)
    run.accelerator.wait_for_everyone()
    batches = batching.window_plan(seconds, windows, batch_seconds=run.config.max_batch_seconds)
    at, of = run.accelerator.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    mine = batches[at::of]
    loader = load_batches(train, mine, run.collate, num_workers=run.config.num_workers)
    shown = track(loader, total=len(mine), what="encoding, batches", quiet=not first)
    with decoding_model(run) as model, run.accelerator.autocast():
        for batch, inputs in zip(mine, shown, strict=True):
            cache.fill(batch, whisper.encode(model, inputs["waves"]))
    run.accelerator.wait_for_everyone()
    if first:
        finish(cache, identity)
    run.accelerator.wait_for_everyone()
    return cache


def not_finite(run: Run, step: Step, dataset: Dataset, norm: float) -> cli.UserError:
    """The error that names the clips whose gradient is not finite; they are written down, too."""
    told = dataset.select_columns(["id", "seconds", "text"])
    clips = [told[clip] for clip in step.batch.clips]
    dump = run.output / "bad_batch.json"
    if run.accelerator.is_main_process:
        write_json(dump, {"step": step.number + 1, "gradient_norm": str(norm), "clips": clips})
    ids = ", ".join(str(clip["id"]) for clip in clips)
    return cli.UserError(
        f"--learning_rate: the gradient's norm is {norm} in step {step.number + 1} (clips {ids}; "
        f"see {dump}); nothing was saved since: lower the rate, use bf16 for fp16, or look at "
        "these clips"
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def evaluate_loss(run: Run, step: int) -> None:
    """Log the validation loss; keep the adapter if it is the best so far."""
    loss = validation_loss(run, run.loss_plan())
    log(run.journal, {"step": step, "eval_loss": loss})
    if step and (run.best is None or loss < run.best["eval_loss"]):
        run.best = {"step": step, "eval_loss": loss}
        save_model(run, "best", step)


@contextmanager
def decoding_model(run: Run) -> Iterator[WhisperForConditionalGeneration]:
    """The model as it is now, for evaluation: every process holds the whole of it.

    Where the engine shards it, a copy is loaded and gets the trained weights.
    """
    model = run.model
    if engine.is_sharded(run.accelerator):
        config, dtype = run.config, whisper.base_of(run.model).dtype
        base = whisper.load_base(config.model, dtype=dtype, device=run.accelerator.device)
        base.generation_config = whisper.base_of(run.model).generation_config
        model = trainable_model(config, base)
        copies = dict(model.named_parameters())
        for name, parameter in engine.trained_parameters(run.model).items():
            copies[name].data.copy_(engine.whole(parameter))
    model.eval()
    with whisper.merged(model) as merged:
        yield merged
    run.model.train()


def transcribe_validation(
    run: Run, batches: Sequence[DecodeBatch], tokens_per_second: float
) -> dict[str, Prediction]:
    """Decode batches of validation clips, shared out among the processes."""
    with decoding_model(run) as model, decoding_precision(run, model):
        mine = predictions.transcribe(
            model,
            run.tokenizer,
            run.validation,
            batches[run.accelerator.process_index :: run.accelerator.num_processes],
            task=run.prepared["config"]["task"],
            tokens_per_second=tokens_per_second,
            num_workers=run.config.num_workers,
        )
    return predictions.gather(mine)


def decoding_precision(
    run: Run, model: WhisperForConditionalGeneration
) -> AbstractContextManager[None]:
    """Autocast around weights held in float32; those in half precision need none, and are faster.

    Weights that are trained are cast once for the whole block: autocast keeps their copies.
    """
    return run.accelerator.autocast() if model.dtype == torch.float32 else nullcontext()


def try_validation(run: Run) -> None:
    """Run loss and a short decoding on the shortest clips: what fails in them fails early."""
    shortest = run.loss_plan()[-1]
    few = replace(shortest, clips=shortest.clips[-SANITY_CLIPS:])
    validation_loss(run, [few])
    windows = (few.context,) * len(few.clips)
    transcribe_validation(run, [DecodeBatch(few.clips, windows)], tokens_per_second=0.0)


def evaluate_wer(run: Run, step: int) -> None:
    """Log the validation word error rate, with a few texts for TensorBoard."""
    rate = run.prepared["tokens_per_second"]["p999"]
    texts_by_id = transcribe_validation(run, run.decode_plan(), rate)
    task = run.prepared["config"]["task"]
    rates = predictions.score(run.validation, texts_by_id, run.tokenizer, task=task)["normalisers"]
    record = {"step": step}
    for name in ("raw", "keep_marks"):
        record |= {f"wer_{name}": rates[name]["wer"], f"cer_{name}": rates[name]["cer"]}
    log(run.journal, record)
    few = range(min(SHOWN_TEXTS, len(run.validation)))
    shown = run.validation.select_columns(["id", "text"]).select(few)
    texts = (f"{row['id']}  \n{row['text']}  \n{texts_by_id[row['id']].text}" for row in shown)
    log_text(run.journal, "predictions", "\n\n".join(texts), step)


def evaluation_is_due(run: Run, step: int) -> bool:
    """Whether something is to be evaluated after a step; all is after the last one."""
    config = run.config
    due = step >= run.total_steps or _due(step, config.eval_every) or _due(step, config.wer_every)
    return due and run.validation is not None


def evaluate(run: Run, step: int) -> None:
    """Evaluate what is due after a step, and note in its checkpoint, if any, that it is done."""
    last = step >= run.total_steps
    if _due(step, run.config.eval_every) or last:
        evaluate_loss(run, step)
    if _due(step, run.config.wer_every) or last:
        evaluate_wer(run, step)
    if run.accelerator.is_main_process:
        checkpoint.update(run.output / "checkpoints", step, evaluated=True, best=run.best)


def save_model(run: Run, name: str, step: int) -> None:
    """Write OUTPUT_DIR/adapter, adapter_best, model or model_best with its recipe."""
    kind = "adapter" if run.config.tune == "lora" else "model"
    folder = run.output / (f"{kind}_{name}" if name else kind)
    checkpoint.save_model(
        folder, run.accelerator, run.model, run.config.model, run.made | {"step": step}
    )


def save_checkpoint(run: Run, step: int, totals: Totals, *, evaluated: bool) -> None:
    """Write a checkpoint to go on from, with the loss since the last log line.

    Args:
        evaluated: whether what was to be evaluated after this step has been.
    """
    start = time.monotonic()
    loss = run.accelerator.reduce(totals.loss.clone()).item()
    scaler = run.accelerator.scaler
    checkpoint.save(
        run.output / "checkpoints",
        run.accelerator,
        step=step,
        model=run.model,
        optimizer=run.optimizer,
        state={
            "identity": run.identity,
            "best": run.best,
            "loss": loss,
            "tokens": totals.tokens,
            "evaluated": evaluated,
            "scaler": None if scaler is None else scaler.state_dict(),
            "skipped": [run.skipped, run.skipped_in_row],
        },
        keep=run.config.keep_checkpoints,
    )
    run.stop.saved(time.monotonic() - start)


def find_checkpoint(
    config: Config, accelerator: Accelerator, identity: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The checkpoint to go on from ("" for none) and its state, as the first process sees them."""
    found: list[Any] = [
        "",
        {"step": 0, "best": None, "loss": 0.0, "tokens": 0, "evaluated": True},
        "",
    ]
    if accelerator.is_main_process and config.resume == "auto":
        try:
            folder, warnings = checkpoint.find(
                Path(config.output_dir) / "checkpoints",
                identity,
                changed_too=config.resume_changed,
            )
            for warning in warnings:
                engine.say(accelerator, warning)
            if folder is not None:
                found[:2] = [str(folder), checkpoint.read_state(folder)]
        except cli.UserError as error:
            found[2] = str(error)
    path, state, problem = broadcast_object_list(found)
    if problem:
        raise cli.UserError(problem)
    return path, state


def trainable_model(config: Config, base: WhisperForConditionalGeneration) -> torch.nn.Module:
    """The base with what is to be trained: a fresh adapter on it, or its own weights."""
    if config.tune != "lora":
        whisper.train_all(base, encoder=config.tune == "full")
        return base
    return whisper.add_lora(
        base,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        targets=config.lora_targets.split(","),
        dropout=config.lora_dropout,
        scope=config.lora_scope,
    )


def main(config: Config) -> None:
    check(config)
    limits = {"max_minutes": config.max_minutes, "save_every_minutes": config.save_every_minutes}
    with engine.clear_errors(config.collective_timeout), listen(**limits) as stop:
        accelerator = train(config, stop)  # its frame held the model, which holds groups
        stop.leave()
        engine.close(accelerator)


def train(config: Config, stop: Stop) -> Accelerator:
    """All of a run but its end, which is for `engine.close` once nothing here is held."""
    whisper.quiet_libraries()
    started = time.perf_counter()
    output = Path(config.output_dir)
    config = replace(config, precision=precision.choose(config.precision))
    accelerator = engine.open_accelerator(
        precision=config.precision, output=output, timeout_minutes=config.collective_timeout
    )
    engine.check(accelerator, quantize=config.quantize, precision=config.precision)
    stop.join(accelerator, config.collective_timeout)
    say, leader = partial(engine.say, accelerator), accelerator.is_main_process

    # ------ data
    splits, prepared = load_prepared(config.data_dir)
    if "train" not in splits:
        raise cli.UserError(f"--data_dir {config.data_dir}: has no train split: prepare one")
    train, validation = splits["train"], splits.get("validation")
    if validation is not None and config.eval_clips:
        chosen = np.random.default_rng(config.seed).permutation(len(validation))
        validation = validation.select(sorted(chosen[: config.eval_clips].tolist()))
    tokenizer = labels.load_tokenizer(config.model)
    check_labels(config, tokenizer, prepared)
    seconds = column(train, "seconds")
    if not config.global_batch_size:
        config = replace(config, global_batch_size=batching.default_batch_size(len(train)))
    steps_per_epoch = math.ceil(len(train) / config.global_batch_size)
    total_steps = config.max_steps or config.num_epochs * steps_per_epoch

    # ------ resume?
    identity = {name: value for name, value in asdict(config).items() if name not in FREE_ON_RESUME}
    identity["precision"] = accelerator.mixed_precision
    identity["data_dir"] = hashlib.sha256(json.dumps(prepared).encode()).hexdigest()[:16]
    found, state = find_checkpoint(config, accelerator, identity)

    # ------ model
    # Weights that are trained are held in float32.
    held = DTYPES[config.precision] if config.tune == "lora" else torch.float32
    base = whisper.load_base(
        config.model, dtype=held, quantize=config.quantize, device=accelerator.device
    )
    whisper.complete_generation_config(base, tokenizer)
    set_seed(config.seed)
    bare = trainable_model(config, base)
    free_gib = device_memory_gib(accelerator.device, accelerator.num_processes)
    own_gib = held_gib(accelerator.device) + free_gib
    memory_gib = config.memory_gib or engine.least(accelerator, own_gib)
    memory = fit_memory(config, accelerator, bare, memory_gib)
    config = replace(
        config,
        max_batch_seconds=memory.max_batch_seconds,
        gradient_checkpointing=memory.checkpointing,
    )
    made = describe_run(config) | {  # as used: nothing in it says "auto" any more
        "base_probe": whisper.base_probe(base),
        "window": batching.window_policy(config.context),
    }
    if memory.checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    trainable = engine.trained_parameters(bare).values()
    num_trainable = sum(one.numel() for one in trainable)
    optimizer = torch.optim.AdamW(
        trainable, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    model, optimizer = engine.prepare(
        accelerator, bare, optimizer, max_grad_norm=config.max_grad_norm
    )
    model.train()

    # ------ run
    if leader and not found:
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
    accelerator.wait_for_everyone()
    journal = open_journal(
        accelerator, output, done=state["step"], total=total_steps, evaluated=state["evaluated"]
    )
    run = Run(
        config, accelerator, bare, model, optimizer, predictions.collator_for(base), tokenizer,
        validation, prepared, made, identity, journal, output, state["best"], stop, total_steps,
    )  # fmt: skip
    say(
        f"{len(train)} clips, {seconds.sum() / 3600:.2f} hours; {total_steps} steps of "
        f"{config.global_batch_size} clips on {accelerator.num_processes} processes "
        f"({engine.name(accelerator)}); {num_trainable:,} trainable parameters; "
        f"{accelerator.device.type}, {config.precision}, base {config.quantize}"
    )
    if config.tune != "lora" and config.learning_rate > FULL_RATE:
        say(f"warning: --learning_rate {config.learning_rate:g} is for LoRA: try 1e-5")
    say(
        f"micro-batches of {memory.max_batch_seconds:g} s of window, "
        f"{memory.predicted_gib:.1f} GiB at most by formula"
        + (", gradient checkpointing" if memory.checkpointing else "")
    )
    totals = Totals(torch.zeros((), device=accelerator.device))
    if found:
        checkpoint.restore(Path(found), accelerator, bare, optimizer, state["optimizer_steps"])
        if accelerator.scaler is not None and state["scaler"]:  # none, if it was not fp16 before
            accelerator.scaler.load_state_dict(state["scaler"])
        run.skipped, run.skipped_in_row = state.get("skipped", (0, 0))
        totals.loss += state["loss"] if leader else 0.0
        totals.tokens = state["tokens"]
        say(f"resumed at step {state['step']} from {found}")
        if state["step"] >= total_steps:
            save_model(run, "", total_steps)
        if not state["evaluated"] and evaluation_is_due(run, state["step"]):  # stopped before
            evaluate(run, state["step"])
    elif validation is None:
        say("no validation split: no validation loss, no adapter_best")
    else:
        try_validation(run)

    # ------ training
    mark = time.perf_counter()
    cache = cache_encoder(run, train, held) if config.cache_encoder else None
    cache_seconds = time.perf_counter() - mark
    first_step_seconds = None  # since the process was started
    steps = load_steps(
        config, accelerator, train, run.collate, first=state["step"], total=total_steps, cache=cache
    )
    occasions = (config.log_every, config.eval_every, config.wer_every)
    mark = time.perf_counter()
    done, reason = state["step"], ""
    last = done >= total_steps
    for step, collated in steps:
        began = time.monotonic()
        rate = learning_rate(step.number, config, total_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        train_step(run, step, collated, totals)
        totals.tokens += step.num_tokens
        totals.clips += len(step.batch.clips)
        totals.audio_seconds += float(seconds[list(step.batch.clips)].sum())
        totals.seconds += time.perf_counter() - mark
        journal.bar.update()
        if first_step_seconds is None:
            first_step_seconds = time.time() - psutil.Process().create_time()

        # ------ once in a while
        done = step.number + 1
        last = done == total_steps
        reason, save_now = agree(stop, time.monotonic() - began)
        save_now = save_now or bool(reason) or last or _due(done, config.save_every)
        if save_now or any(_due(done, every) for every in occasions):
            check_norms(run, totals, train)  # before anything is kept
        if _due(done, config.log_every) or last:
            record = {"step": done, "epoch": done / steps_per_epoch}
            loss = accelerator.reduce(totals.loss).item()
            if totals.tokens:  # none, if all steps were skipped
                record |= {"loss": loss / totals.tokens, "grad_norm": totals.last_norm}
            speed = totals.clips / totals.seconds
            shown = f"{record.get('loss', math.nan):.3f}"
            journal.bar.set_postfix(loss=shown, clips_s=f"{speed:.1f}")
            record |= {
                "learning_rate": rate,
                "clips_per_second": speed,
                "audio_seconds_per_second": totals.audio_seconds / totals.seconds,
                "data_wait_share": totals.wait_seconds / totals.seconds,
            }
            if accelerator.scaler is not None:
                record["skipped_steps"] = run.skipped
            log(run.journal, record)
            totals = Totals(torch.zeros_like(totals.loss))
        stopped = bool(reason) and not last
        due = evaluation_is_due(run, done)
        if save_now:  # before the evaluation, which may fail
            save_checkpoint(run, done, totals, evaluated=not due)
        if last:
            save_model(run, "", total_steps)
        if stopped:
            break
        if due:
            evaluate(run, done)
        mark = time.perf_counter()

    # ------ results
    journal.bar.close()
    steps.close()  # ends the processes that read ahead
    if not last:
        say(f"stopped by {reason} after step {done}, saved: the same command goes on from there")
        return accelerator
    if leader:
        write_json(
            output / "train.json",
            {
                "steps": total_steps,
                "wall_seconds": time.perf_counter() - started,
                "first_step_seconds": first_step_seconds,
                "encoder_cache_seconds": cache_seconds if cache else None,
                "peak_memory_gib": peak_memory_gib(),
                "processes": accelerator.num_processes,
                "engine": engine.name(accelerator),
                "skipped_steps": run.skipped,
                "best": run.best,
                "last": journal.last,
            }
            | made,
        )
    say(f"{'adapter' if config.tune == 'lora' else 'model'} in {output}, figures in train.json")
    return accelerator


if __name__ == "__main__":
    cli.run(main, Config)
