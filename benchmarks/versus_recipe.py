"""Our three scripts against the tutorial's recipe: same machine, data, weights, steps, precision.

    python -m benchmarks.versus_recipe --data_dir COMMON_VOICE_FOLDER --language hi --model MODEL \\
        --output_dir versus

Both prepare, train an adapter of the same shape on the same number of clips and score it on the
test split, one after the other, in alternating order, `--repeats` times, each with another seed.

Then, with each seed, time to the same error rate: ours trains each of `--quality_clips` of the
clips, a run of its own whose learning rate decays to zero, with train_lora.py's defaults but for
`--quality_batch_size` and `--quality_learning_rate`. The time is that of the fewest whose raw word
error rate at the natural window and at 30 seconds is no higher than the recipe's after its epoch;
the others show whether that lasts. Loading, validation and scoring are not counted on either side.
Both sides are scored on the test split, so a number of clips is not chosen by this benchmark but
found by it.

Prints tables and writes OUTPUT_DIR/versus_recipe.json with every single figure, anew after each
seed, and time_to_quality.png.
"""

import json
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile
import torch
from transformers import AutoConfig, WhisperConfig

from benchmarks import baseline, flops, process, versus_tables
from benchmarks.versus_tables import SIDES, WINDOWS
from common import batching, cli
from common.error_rate import ErrorRate
from common.files import write_json, write_text
from common.prepared import column, label_lengths, load_prepared
from common.provenance import describe_run
from common.windows import FULL_WINDOW, POSITIONS_PER_SECOND, WindowMode, positions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Config:
    """Measure our scripts against the tutorial's recipe."""

    data_dir: str  # Common Voice folder
    model: str  # Whisper checkpoint
    language: str = "hi"  # code
    output_dir: str = "versus"  # work and figures; must be new
    repeats: int = 3  # of everything, each with another seed
    seed: int = 42  # of the first repeat
    max_steps: int = 0  # training steps of 8 clips; 0 is one epoch
    learning_rate: float = 1e-3  # peak
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto takes the faster on this machine
    context: WindowMode = "auto"  # our window in training; the recipe's is always full
    max_seconds: float = 30.0  # longer clips are left out on both sides
    quality_clips: str = "96,128,256,523"  # of ours, a run each; empty leaves this out
    quality_batch_size: int = 2  # clips per step of those runs
    quality_learning_rate: float = 7e-4  # peak of those runs


def scores(references: list[str], hypotheses: list[str]) -> dict[str, float]:
    """Raw WER and CER, by the same counter for both sides."""
    rates = ErrorRate("raw").compute(predictions=hypotheses, references=references)
    return {"wer": rates["wer"], "cer": rates["cer"]}


def shorter_clips(source: Path, max_seconds: float, folder: Path) -> Path:
    """Copy a Common Voice folder without the clips that are longer."""
    (folder / "clips").mkdir(parents=True)
    for name in ("train", "dev", "test"):
        head, *rows = (source / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
        index, kept = head.split("\t").index("path"), [head]
        for row in rows:
            clip = source / "clips" / row.split("\t")[index]
            if soundfile.info(clip).duration <= max_seconds:
                shutil.copy(clip, folder / "clips")
                kept.append(row)
        write_text(folder / f"{name}.tsv", "\n".join(kept) + "\n")
    return folder


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# ------ the two sides, a stage at a time


def baseline_stages(config: Config, work: Path, precision: str, seed: int) -> dict[str, Any]:
    """Run the recipe's three stages; figures by stage."""
    stages: dict[str, Any] = {}
    for stage in ("prepare", "train", "evaluate"):
        cost = process.run(
            [
                "-m", "benchmarks.baseline", "--stage", stage, "--source", config.data_dir,
                "--model", config.model, "--language", config.language, "--work", str(work),
                "--max_steps", str(config.max_steps), "--precision", precision,
                "--learning_rate", str(config.learning_rate), "--seed", str(seed),
            ],
            work.parent / f"{work.name}_{stage}.log",
        )  # fmt: skip
        record = json.loads((work / f"{stage}.json").read_text(encoding="utf-8"))
        seconds = record.get("seconds", cost.seconds)
        stages[stage] = {
            "clips": record["clips"],
            "seconds": seconds,
            "command_seconds": cost.seconds,
            "peak_memory_gib": cost.peak_memory_gib,
        }
    stages["prepare"]["bytes"] = folder_bytes(work / "data")
    stages["evaluate"]["scores"] = scores(record["references"], record["hypotheses"])
    return stages


def our_stages(config: Config, work: Path, precision: str, seed: int) -> dict[str, Any]:
    """Run our three scripts; figures by stage. Each adapter is scored at both windows.

    The second adapter, `cached`, is of the decoder only, on encoder outputs computed once.
    """
    work.mkdir()
    data = work / "data"
    log = work.parent / f"{work.name}_prepare.log"
    cost = run_preprocess(config.data_dir, config.language, config.model, data, log)
    prepare = {
        "clips": prepared_clips(data),
        "seconds": cost.seconds,
        "command_seconds": cost.seconds,
        "peak_memory_gib": cost.peak_memory_gib,
        "bytes": folder_bytes(data),
    }
    same = [
        "--global_batch_size", baseline.BATCH_SIZE, "--lora_targets", baseline.TARGETS,
        "--nospeech_share", 0, "--max_steps", config.max_steps, "--context", config.context,
        "--learning_rate", config.learning_rate, "--precision", precision, "--seed", seed,
    ]  # fmt: skip
    stages = {"prepare": prepare} | our_training(config.model, work / "run", data, precision, same)
    only_decoder = [*same, "--lora_scope", "decoder", "--cache_encoder", "true"]
    cached = our_training(config.model, work / "cached", data, precision, only_decoder)
    cache = work / "cached" / "encoder_cache"
    cached["train"]["cache_bytes"] = folder_bytes(cache)
    shutil.rmtree(cache)
    return stages | {f"cached_{stage}": figures for stage, figures in cached.items()}


def time_to_quality(
    config: Config, work: Path, data: Path, precision: str, seed: int, recipe: dict[str, Any]
) -> dict[str, Any]:
    """Train ours on more and more clips; each run, and the ratio of the first that is as good."""
    work.mkdir()
    recipe = recipe["train"] | {"scores": recipe["evaluate"]["scores"]}
    runs: list[dict[str, Any]] = []
    for clips in sorted(int(number) for number in config.quality_clips.split(",")):
        options = [
            "--global_batch_size", config.quality_batch_size,
            "--max_steps", max(1, round(clips / config.quality_batch_size)),
            "--precision", precision, "--learning_rate", config.quality_learning_rate,
            "--seed", seed,
        ]  # fmt: skip
        stages = our_training(config.model, work / str(clips), data, precision, options)
        run = {name: stages["train"][name] for name in ("clips", "steps", "seconds")}
        run |= {window: stages[stage]["scores"] for window, stage in WINDOWS.items()}
        runs.append(run)
        print(f"seed {seed}, ours: {json.dumps(run)}", flush=True)
    good = (run["seconds"] for run in runs if versus_tables.is_as_good(run, recipe))
    reached = next(good, None)
    ratio = reached and recipe["seconds"] / reached
    return {"seed": seed, "recipe": recipe, "ours": runs, "seconds": reached, "ratio": ratio}


def run_preprocess(
    source: str, language: str, model: str, data: Path, log: Path
) -> process.Measured:
    """Run our preprocess.py into the folder `data`."""
    return process.run(
        [
            "preprocess.py", "--source", source, "--language", language, "--model", model,
            "--output_dir", data, "--num_workers", baseline.NUM_WORKERS,
        ],
        log,
    )  # fmt: skip


def our_training(
    model: str, run: Path, data: Path, precision: str, options: Sequence[Any]
) -> dict[str, Any]:
    """Train one adapter for an epoch at most, and score it at both windows.

    Args:
        precision: of the scoring.
        options: of the training, besides its folders.
    """
    commands = {
        "train": [
            "train_lora.py", "--model", model, "--data_dir", data, "--output_dir", run,
            "--num_epochs", 1, "--eval_every", 10**6, "--save_every", 10**6, "--num_workers",
            baseline.NUM_WORKERS, *options,
        ],
    }  # fmt: skip
    for window in WINDOWS:
        commands[window] = [
            "eval_wer.py", "--model", model, "--adapter", run / "adapter", "--data_dir",
            data, "--context", window, "--precision", precision, "--output_dir", run / window,
            "--panels", "false",
        ]  # fmt: skip
    costs = {
        name: process.run(words, run.parent.parent / f"{run.parent.name}_{run.name}_{name}.log")
        for name, words in commands.items()
    }
    stages = {
        name: {"command_seconds": cost.seconds, "peak_memory_gib": cost.peak_memory_gib}
        for name, cost in costs.items()
    }
    record = json.loads((run / "train.json").read_text(encoding="utf-8"))
    batch_size = record["config"]["global_batch_size"]
    stages["train"] |= training_speed(run / "metrics.jsonl", batch_size, data)
    stages["train"] |= {
        name: record[name] for name in ("first_step_seconds", "encoder_cache_seconds")
    }
    for window in WINDOWS:
        record = json.loads((run / window / "wer.json").read_text(encoding="utf-8"))["adapter"]
        rates = record["normalisers"]["raw"]
        stages[window] |= {
            "clips": record["clips"],
            "seconds": record["wall_seconds"],
            "clips_at_cap": record["clips_at_cap"],
            "clips_decoded_again": record["clips_decoded_again"],
            "scores": {"wer": rates["wer"], "cer": rates["cer"]},
        }
    return {WINDOWS.get(name, name): figures for name, figures in stages.items()}


def prepared_clips(data: Path) -> int:
    splits, _ = load_prepared(str(data))
    return sum(len(split) for split in splits.values())


def training_speed(journal: Path, batch_size: int, data: Path) -> dict[str, Any]:
    """Clips and seconds of the training steps, from the log lines."""
    lines = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    logged = [line for line in lines if "clips_per_second" in line]
    train = load_prepared(str(data))[0]["train"]
    ends = [min(line["step"] * batch_size, len(train)) for line in logged]
    clips = np.diff([0, *ends])
    seconds = clips / [line["clips_per_second"] for line in logged]  # of each interval
    waits = seconds * [line["data_wait_share"] for line in logged]
    return {
        "clips": int(clips.sum()),
        "seconds": float(seconds.sum()),
        "data_wait_share": float(waits.sum() / seconds.sum()),
        "steps": logged[-1]["step"],
    }


# ------ what was computed


def mean_seconds(data: Path) -> dict[str, float]:
    """Mean duration of the clips of each stage."""
    splits, _ = load_prepared(str(data))
    every = [float(length) for split in splits.values() for length in column(split, "seconds")]
    return {
        "prepare": statistics.mean(every),
        "train": float(column(splits["train"], "seconds").mean()),
        "evaluate": float(column(splits["test"], "seconds").mean()),
    }


def training_work(config: Config, data: Path, whisper: WhisperConfig) -> dict[str, Any]:
    """Operations and padding of an epoch's training on each side, by formula."""
    train = load_prepared(str(data))[0]["train"]
    seconds, lengths = column(train, "seconds"), label_lengths(train) - 1
    needed = sum(positions(float(length)) for length in seconds)
    plan = batching.plan(
        seconds,
        global_batch_size=baseline.BATCH_SIZE,
        seed=config.seed,
        epoch=0,
        window_mode=config.context,
    )
    ours = sum(
        flops.lora_step(whisper, batch.window, int(lengths[clip]))
        for batch in plan
        for clip in batch.clips
    )
    padding = 1 - needed / (FULL_WINDOW * len(seconds))
    padded = [flops.lora_step(whisper, FULL_WINDOW, int(length)) for length in lengths]
    held = sum(batch.window * len(batch.clips) for batch in plan)
    longest = sum(
        positions(float(seconds[list(batch.clips)].max())) * len(batch.clips) for batch in plan
    )
    return {
        "recipe": {
            "flop_per_clip": sum(padded) / len(padded),
            "encoder_padding_share": padding,
            "bucket_padding_share": padding,
        },
        "ours": {
            "flop_per_clip": ours / len(seconds),
            "encoder_padding_share": 1 - needed / held,
            "bucket_padding_share": 1 - needed / longest,
        },
    }


# ------ main


def main(config: Config) -> None:
    output = process.new_output(config.output_dir)
    output.mkdir(parents=True)
    if config.max_seconds < FULL_WINDOW / POSITIONS_PER_SECOND:
        clips = shorter_clips(Path(config.data_dir), config.max_seconds, output / "source")
        config = replace(config, data_dir=str(clips))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peaks = {name: flops.gemm_peak(dtype, device) for name, dtype in DTYPES.items()}
    precision = config.precision if config.precision != "auto" else max(peaks, key=peaks.get)
    print(f"GEMM: {peaks}; both sides compute in {precision}", flush=True)

    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    qualities: list[dict[str, Any]] = []
    for repeat in range(config.repeats):
        seed = config.seed + repeat
        for side in SIDES if repeat % 2 == 0 else SIDES[::-1]:
            stages = baseline_stages if side == "recipe" else our_stages
            work = output / f"{side}_{repeat}"
            runs[side].append(stages(config, work, precision, seed))
            print(f"repeat {repeat}, {side}: {json.dumps(runs[side][-1])}", flush=True)
            if side == "recipe":  # hundreds of megabytes
                shutil.rmtree(work / "data")
        data = output / "ours_0" / "data"
        if config.quality_clips:
            work, recipe = output / f"quality_{repeat}", runs["recipe"][-1]
            qualities.append(time_to_quality(config, work, data, precision, seed, recipe))
            versus_tables.plot_quality(qualities, output / "time_to_quality.png")
        results = {
            "runs": runs,
            "time_to_quality": qualities,
            "gemm_flop_per_second": peaks[precision],
            "gemm_peaks": peaks,
            "precision": precision,
            "work": training_work(config, data, AutoConfig.from_pretrained(config.model)),
            "seconds_per_clip": mean_seconds(data),
        } | describe_run(config)
        compared = versus_tables.summary(results)
        write_json(output / "versus_recipe.json", results | {"summary": compared})
        print(versus_tables.table(compared, peaks[precision], precision), flush=True)
        if qualities:
            print(versus_tables.quality_table(qualities), flush=True)


if __name__ == "__main__":
    cli.run(main, Config)
