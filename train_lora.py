"""Fine-tune Whisper on a folder that preprocess.py wrote, with LoRA or whole: a hand-written loop.

    accelerate launch train_lora.py --model openai/whisper-large-v2 --data_dir prepared \\
        --output_dir run --num_epochs 3

Writes OUTPUT_DIR/adapter (plain PEFT; `model` with --tune full), adapter_best, checkpoints,
metrics.jsonl, tensorboard and train.json. Run again after an interruption, it resumes from the last
checkpoint, on any number of processes and under any engine.
"""

import gc
import os
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    gc.disable()  # until cli.run: collecting takes a quarter of the imports, which leave no garbage

from accelerate import Accelerator

from common import batching, cli, memory, precision, whisper
from common.accelerator import close, explain_lost_contact, open_accelerator, say
from common.adapter import base_of
from common.precision import DTYPES, Precision
from common.predictions import collator_for
from common.provenance import describe_run, hub_id
from common.trained_on import hash_clips, pack
from common.windows import WindowMode, window_policy
from training import augment, checkpoint, engine, lora, tuning
from training import output as outputs
from training.data import Data, load_data
from training.data import describe as describe_data
from training.fit import fit_memory
from training.journal import announce, log_rates
from training.meter import refuse_not_finite
from training.occasions import Every, criterion, occasions
from training.output import Output
from training.plan import load_steps, make_plan
from training.run import Run, cache_outputs, finish, start
from training.schedule import Decay, learning_rate, set_rate
from training.step import StepOptions, make_state, train_step
from training.stop import Stop, agree, listen
from training.validation import Validation, evaluate

FULL_RATE = 1e-4  # a higher learning rate is warned of in full fine-tuning


@dataclass
class Config:
    """Fine-tune Whisper, with LoRA or whole."""

    # ------ what
    model: str = "openai/whisper-small"  # base model: a folder or a Hub id
    data_dir: str = os.environ.get("SM_CHANNEL_TRAIN", "prepared")  # output of preprocess.py
    output_dir: str = os.environ.get("SM_OUTPUT_DATA_DIR", "run")  # adapter, checkpoints, logs
    # ------ how long
    num_epochs: int = 3  # passes over the training split
    max_steps: int = 0  # optimizer steps; 0: as many as --num_epochs takes
    max_minutes: float = 0.0  # time limit in minutes, including the final save; 0: none
    global_batch_size: int = 0  # clips per step over all processes; 0: 8, or 64 from 10,000 clips
    max_batch_seconds: float = 0.0  # seconds of audio window per forward pass; 0: what fits memory
    memory_gib: float = 0.0  # memory that a process may use, in GiB; 0: what is free
    # ------ optimizer
    learning_rate: float = 1e-3  # peak, reached after warm-up; for --tune full about 1e-5
    warmup_ratio: float = 0.1  # share of all steps in which the learning rate rises
    schedule: Decay = "linear"  # decay to zero after warm-up
    weight_decay: float = 0.0  # of AdamW
    max_grad_norm: float = 1.0  # maximum norm of the gradient
    # ------ what is trained
    tune: tuning.Tune = "lora"  # lora, full (all weights) or encoder_frozen (all but the encoder's)
    init_adapter: str = ""  # adapter to continue from, with its rank and targets; empty: a new one
    lora_rank: int = 32  # rank of the update
    lora_alpha: int = 64  # the update is scaled by alpha / rank
    lora_targets: str = "q_proj,k_proj,v_proj,out_proj,fc1,fc2"  # layers with an adapter
    lora_dropout: float = 0.05  # on the update's input, by feature
    lora_scope: str = "all"  # all, decoder, or top_K: decoder and the encoder's last K layers
    cache_encoder: bool = False  # keep outputs of a frozen encoder on disk
    cache_dir: str = ""  # folder for them on a local disk; empty: OUTPUT_DIR/encoder_cache
    # ------ clips without speech, augmentation
    nospeech_share: float = 0.05  # clips of silence or noise, with no text, per clip of speech
    speed: float = 0.0  # play clips at 1 - speed, 1 or 1 + speed, drawn anew each epoch: 0.1
    spec_augment: bool = False  # SpecAugment: mask stretches of time and frequency with silence
    # ------ base
    quantize: whisper.Quantize = "none"  # int8 or nf4: hold the base in 8 or 4 bits
    precision: Precision = "auto"  # fp32, bf16 or fp16; auto: the GPU's best, or fp32 on a CPU
    gradient_checkpointing: bool = False  # a third slower; enabled automatically when needed
    context: WindowMode = "auto"  # window: auto follows the clips' length, full is 30 seconds
    # ------ once in a while
    eval_every: int = 100  # steps between validation losses
    eval_clips: int = 128  # validation clips, the same every time; 0: all
    patience: int = 0  # evaluations in a row without a better model that end the run; 0: none
    wer_every: int = 0  # steps between validation word error rates; 0: only at the end
    save_every: int = 100  # steps between checkpoints
    save_every_minutes: float = 0.0  # minutes between checkpoints as well; 0: by steps only
    keep_checkpoints: int = 2  # number of newest checkpoints to keep
    log_every: int = 10  # steps between log lines
    resume: Literal["auto", "never"] = "auto"  # auto resumes from the newest checkpoint
    resume_changed: bool = False  # resume although options differ that change results
    collective_timeout: float = 30.0  # minutes a process waits for the other processes
    seed: int = 42  # of everything random
    num_workers: int = 2  # processes that read audio ahead; 0: the main process

    def tuning(self) -> tuning.Tuning:
        """Which weights are trained."""
        return tuning.Tuning(
            self.tune, self.init_adapter, self.lora_rank, self.lora_alpha, self.lora_targets,
            self.lora_scope, self.lora_dropout,
        )  # fmt: skip

    def memory_step(self, device: str) -> memory.Step:
        """What a training step computes on "cpu" or "cuda", as far as its memory depends on it."""
        return memory.Step(
            device=device,
            bytes_per_value=4 if self.precision == "fp32" else 2,
            tune=self.tune,
            lora_targets=tuple(self.lora_targets.split(",")),
            lora_scope=self.lora_scope,
            quantize=self.quantize,
            checkpointing=self.gradient_checkpointing,
            encoder_cached=self.cache_encoder,
        )


# ------ options


def check(config: Config) -> None:
    """Refuse impossible options, all of them in one message."""
    cli.refuse(
        tuning.problems(
            config.tuning(), quantize=config.quantize, cache_encoder=config.cache_encoder
        )
        + augment.problems(
            speed=config.speed, spec_augment=config.spec_augment,
            cache_encoder=config.cache_encoder,
        )
        + cli.out_of_range(
            config,
            positive=(
                "num_epochs", "learning_rate", "lora_rank", "lora_alpha", "max_grad_norm",
                "eval_every", "save_every", "keep_checkpoints", "log_every", "collective_timeout",
            ),
            not_negative=(
                "global_batch_size", "max_batch_seconds", "memory_gib", "max_minutes",
                "save_every_minutes", "patience",
            ),
            shares=("warmup_ratio", "lora_dropout", "nospeech_share", "speed"),
        )
    )  # fmt: skip


# ------ main


def main(config: Config) -> None:
    check(config)
    limits = {"max_minutes": config.max_minutes, "save_every_minutes": config.save_every_minutes}
    with explain_lost_contact(config.collective_timeout), listen(**limits) as stop:
        accelerator = train(config, stop)  # its frame held the model, which holds groups
        stop.leave()
        close(accelerator)


def train(config: Config, stop: Stop) -> Accelerator:
    """All of a run but its end, which is for `close` once nothing here is held."""
    started = time.perf_counter()
    whisper.quiet_libraries()
    config = replace(config, precision=precision.choose(config.precision))
    if config.init_adapter:
        config = replace(config, **lora.shape_of(config.init_adapter))
    accelerator = open_accelerator(
        precision=config.precision, output=Path(config.output_dir),
        timeout_minutes=config.collective_timeout,
    )  # fmt: skip
    engine.check(accelerator, quantize=config.quantize, precision=config.precision)
    stop.join(accelerator, config.collective_timeout)
    data = load_data(
        config.data_dir, config.model, eval_clips=config.eval_clips, seed=config.seed,
        patience=config.patience,
    )  # fmt: skip
    batch_size = config.global_batch_size or batching.default_batch_size(len(data.train))
    config = replace(config, global_batch_size=batch_size)
    if config.cache_encoder and config.nospeech_share:
        say(
            accelerator,
            "no clips without speech: outputs of the encoder are cached for speech only",
        )
        config = replace(config, nospeech_share=0.0)
    identity = checkpoint.identify(asdict(config), accelerator, data.report)
    resumed_from, saved = checkpoint.agree(
        Path(config.output_dir) / "checkpoints", identity, accelerator,
        resume=config.resume, changed=config.resume_changed,
    )  # fmt: skip
    config, run = build(config, accelerator, data, identity, saved["best"])
    state, output, plan, total_steps = run.state, run.output, run.plan, run.total_steps
    journal, meter = start(run, resumed_from, saved)
    done, reason, cache = saved["step"], "", None
    if config.cache_encoder:
        dtype = config.tuning().held_dtype(config.precision)
        cache = cache_outputs(run, config.cache_dir, dtype=dtype, num_workers=config.num_workers)
        plan = replace(plan, windows=cache.windows)

    # ------ the loop
    rate_of = partial(
        learning_rate, total_steps=total_steps, peak=config.learning_rate,
        warmup_ratio=config.warmup_ratio, decay=config.schedule,
    )  # fmt: skip
    options = StepOptions(
        config.seed, config.max_grad_norm, config.max_batch_seconds, config.spec_augment
    )
    steps = load_steps(
        plan, data.train, run.collate, first=done, total=done if output.exhausted else total_steps,
        num_workers=config.num_workers, cache=cache,
    )  # fmt: skip
    mark = time.perf_counter()
    for step, pieces in steps:
        began = time.monotonic()
        rate = rate_of(step.number)
        set_rate(state.optimizer, rate)
        train_step(state, step, pieces, meter, stop, options)
        meter.add(step, seconds=time.perf_counter() - mark)
        journal.bar.update()

        # ------ once in a while
        done = step.number + 1
        reason, save_now = agree(stop, time.monotonic() - began)
        due = occasions(done, total_steps, run.every, stopping=bool(reason), save_now=save_now)
        if due.check:
            refuse_not_finite(meter, data.train, output.folder, accelerator)
        if due.log:
            log_rates(journal, meter, step=done, epoch=done / plan.steps_per_epoch, rate=rate)
        if due.save:  # before the evaluation, which may fail
            outputs.save_checkpoint(output, state, meter, stop, done, evaluated=not due.evaluate)
        if due.last:
            outputs.save_model(output, state, done)
        if due.stop:
            break
        if due.evaluate:
            evaluate(due, done, run.validation, state, output, journal)
        if output.exhausted:
            outputs.save_undue(output, state, meter, stop, done, due)
            break
        mark = time.perf_counter()

    journal.bar.close()
    steps.close()  # ends the processes that read ahead
    finish(run, meter, journal, done, reason, started=started, cache=cache)
    return accelerator


# ------ build


def build(
    config: Config,
    accelerator: Accelerator,
    data: Data,
    identity: dict[str, Any],
    best: dict[str, float] | None,
) -> tuple[Config, Run]:
    """Load the model, fit its steps in memory, and say what is about to be trained.

    Returns the options as used, in which nothing says "auto" any more, and the run.

    Args:
        identity, best: of the run that is resumed, if one is.
    """
    reload = partial(
        tuning.load_model, config.model, config.tuning(), data.tokenizer,
        precision=config.precision, quantize=config.quantize, device=accelerator.device,
        empty_text=config.nospeech_share > 0, seed=config.seed,
    )  # fmt: skip
    model = reload()
    base = base_of(model)
    fitted = fit_memory(
        accelerator, model, config.memory_step(accelerator.device.type),
        max_batch_seconds=config.max_batch_seconds, memory_gib=config.memory_gib,
    )  # fmt: skip
    config = replace(
        config,
        max_batch_seconds=fitted.max_batch_seconds,
        gradient_checkpointing=fitted.checkpointing,
    )
    provenance = describe_run(config) | {
        "base_probe": whisper.base_probe(base),  # before an engine shards the weights
        "window": window_policy(config.context),
        "base_id": hub_id(config.model),
        "data": describe_data(data),
    }
    state = make_state(
        accelerator, model, learning_rate=config.learning_rate, weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm, gradient_checkpointing=config.gradient_checkpointing,
    )  # fmt: skip
    collate = collator_for(base)
    validation = None
    if data.validation is not None:
        validation = Validation(
            data.validation, collate, data.tokenizer, data.decode_options(config.num_workers),
            config.context, config.max_batch_seconds, DTYPES[config.precision].itemsize, reload,
        )  # fmt: skip
    plan = make_plan(
        data, accelerator, global_batch_size=config.global_batch_size, seed=config.seed,
        window_mode=config.context, max_batch_seconds=config.max_batch_seconds,
        speed=config.speed, nospeech_share=config.nospeech_share,
    )  # fmt: skip
    total_steps = config.max_steps or config.num_epochs * plan.steps_per_epoch
    every = Every(
        config.log_every, config.eval_every, config.wer_every, config.save_every,
        has_validation=validation is not None,
    )  # fmt: skip
    trained_on = b""
    if accelerator.is_main_process:
        trained_on = pack(hash_clips(data.train, data.report["config"]["task"]))
    output = Output(
        Path(config.output_dir), config.tuning().kind, config.model, provenance, identity,
        trained_on, config.keep_checkpoints, best, criterion(every, total_steps), config.patience,
    )  # fmt: skip
    weights = f"{config.precision}, base {config.quantize}"
    announce(state, plan, fitted, total_steps=total_steps, weights=weights)
    if config.tune != "lora" and config.learning_rate > FULL_RATE:
        say(accelerator, f"warning: --learning_rate {config.learning_rate:g} is for LoRA: try 1e-5")
    return config, Run(state, data, validation, collate, plan, total_steps, every, output, reload)


if __name__ == "__main__":
    cli.run(main, Config)
