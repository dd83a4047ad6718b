"""Our three scripts against the tutorial's recipe: same machine, data, weights, steps, precision.

    python -m benchmarks.versus_recipe --data_dir COMMON_VOICE_FOLDER --language hi --model MODEL \\
        --output_dir versus

Both prepare, train an adapter of the same shape on the same number of clips and score it on the
test split, one after the other, in alternating order, `--repeats` times. Prints a table of medians
and writes OUTPUT_DIR/versus_recipe.json with every single figure.
"""

import json
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoConfig, WhisperConfig

from benchmarks import flops, process, recipe
from common import batching, cli, metrics
from common.dataset import column, label_lengths, load_prepared
from common.files import write_json
from common.recipe import recipe as made_with

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIDES = ("recipe", "ours")


@dataclass
class Config:
    """Measure our scripts against the tutorial's recipe."""

    data_dir: str  # Common Voice folder
    model: str  # Whisper checkpoint
    language: str = "hi"  # code
    output_dir: str = "versus"  # work and figures; must be new
    repeats: int = 3  # of everything, each with another seed
    max_steps: int = 0  # training steps of 8 clips; 0 is one epoch
    learning_rate: float = 1e-3  # peak
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto takes the faster on this machine
    context: batching.Context = "auto"  # our window in training; the recipe's is always full


def scores(references: list[str], hypotheses: list[str]) -> dict[str, float]:
    """Raw WER and CER, by the same counter for both sides."""
    rates = metrics.ErrorRate("raw").compute(predictions=hypotheses, references=references)
    return {"wer": rates["wer"], "cer": rates["cer"]}


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# ------ the two sides, a stage at a time


def recipe_stages(config: Config, work: Path, precision: str, seed: int) -> dict[str, Any]:
    """Run the recipe's three stages; figures by stage."""
    found: dict[str, Any] = {}
    for stage in ("prepare", "train", "evaluate"):
        cost = process.run(
            [
                "-m", "benchmarks.recipe", "--stage", stage, "--source", config.data_dir,
                "--model", config.model, "--language", config.language, "--work", str(work),
                "--max_steps", str(config.max_steps), "--precision", precision,
                "--learning_rate", str(config.learning_rate), "--seed", str(seed),
            ],
            work.parent / f"{work.name}_{stage}.log",
        )  # fmt: skip
        told = json.loads((work / f"{stage}.json").read_text(encoding="utf-8"))
        seconds = told.get("seconds", cost.seconds)
        found[stage] = {
            "clips": told["clips"],
            "seconds": seconds,
            "command_seconds": cost.seconds,
            "peak_memory_gib": cost.peak_memory_gib,
        }
    found["prepare"]["bytes"] = folder_bytes(work / "data")
    found["evaluate"]["full"] = scores(told["references"], told["hypotheses"])
    return found


def our_stages(config: Config, work: Path, precision: str, seed: int) -> dict[str, Any]:
    """Run our three scripts; figures by stage. The adapter is scored at both windows."""
    work.mkdir()
    data, run = work / "data", work / "run"
    commands = {
        "prepare": [
            "preprocess.py", "--source", config.data_dir, "--language", config.language,
            "--model", config.model, "--output_dir", data, "--num_workers", recipe.NUM_WORKERS,
        ],
        "train": [
            "train_lora.py", "--model", config.model, "--data_dir", data, "--output_dir", run,
            "--global_batch_size", recipe.BATCH_SIZE, "--num_epochs", 1,
            "--max_steps", config.max_steps, "--precision", precision, "--seed", seed,
            "--learning_rate", config.learning_rate, "--context", config.context,
            "--eval_every", 10**6, "--save_every", 10**6, "--num_workers", recipe.NUM_WORKERS,
        ],
    }  # fmt: skip
    for window in ("auto", "full"):
        commands[window] = [
            "eval_wer.py", "--model", config.model, "--adapter", run / "adapter", "--data_dir",
            data, "--context", window, "--precision", precision, "--output_dir", work / window,
        ]  # fmt: skip
    costs = {
        name: process.run(words, work.parent / f"{work.name}_{name}.log")
        for name, words in commands.items()
    }
    found = {
        name: {"command_seconds": cost.seconds, "peak_memory_gib": cost.peak_memory_gib}
        for name, cost in costs.items()
    }
    found["prepare"] |= {
        "clips": prepared_clips(data),
        "seconds": costs["prepare"].seconds,
        "bytes": folder_bytes(data),
    }
    found["train"] |= training_speed(run / "metrics.jsonl", recipe.BATCH_SIZE, data)
    for window in ("auto", "full"):
        told = json.loads((work / window / "wer.json").read_text(encoding="utf-8"))["adapter"]
        rates = told["normalisers"]["raw"]
        found[window] |= {
            "clips": told["clips"],
            "seconds": told["wall_seconds"],
            "scores": {"wer": rates["wer"], "cer": rates["cer"]},
        }
    evaluate = found.pop("auto")
    full = found.pop("full")
    found["evaluate"] = evaluate | {"auto": evaluate.pop("scores"), "full": full.pop("scores")}
    found["evaluate_full"] = full
    return found


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


def training_work(config: Config, data: Path, whisper: WhisperConfig, seed: int) -> dict[str, Any]:
    """Operations and padding of an epoch's training on each side, by formula."""
    train = load_prepared(str(data))[0]["train"]
    seconds, lengths = column(train, "seconds"), label_lengths(train) - 1
    needed = sum(batching.positions(float(one)) for one in seconds)
    plan = batching.plan(
        seconds, global_batch_size=recipe.BATCH_SIZE, seed=seed, epoch=0, context=config.context
    )
    ours = sum(
        flops.lora_step(whisper, batch.context, int(lengths[clip]))
        for batch in plan
        for clip in batch.clips
    )
    padded = [flops.lora_step(whisper, batching.FULL_CONTEXT, int(one)) for one in lengths]
    held = sum(batch.context * len(batch.clips) for batch in plan)
    longest = sum(
        batching.positions(float(seconds[list(batch.clips)].max())) * len(batch.clips)
        for batch in plan
    )
    return {
        "recipe": {
            "flop_per_clip": sum(padded) / len(padded),
            "encoder_padding_share": 1 - needed / (batching.FULL_CONTEXT * len(seconds)),
        },
        "ours": {
            "flop_per_clip": ours / len(seconds),
            "encoder_padding_share": 1 - needed / held,
            "bucket_padding_share": 1 - needed / longest,
        },
    }


# ------ tables


def medians(runs: list[dict[str, Any]], stage: str) -> dict[str, float]:
    """Median, least and most clips a second, and the median peak memory."""
    speeds = [run[stage]["clips"] / run[stage]["seconds"] for run in runs]
    return {
        "clips_per_second": statistics.median(speeds),
        "least": min(speeds),
        "most": max(speeds),
        "peak_memory_gib": statistics.median(run[stage]["peak_memory_gib"] for run in runs),
    }


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """Medians of each stage and side, and ratios: above 1 is better than the recipe."""
    found: dict[str, Any] = {}
    for stage in ("prepare", "train", "evaluate"):
        sides = {side: medians(results["runs"][side], stage) for side in SIDES}
        clip_seconds = results["seconds_per_clip"][stage]
        for side in SIDES:
            speed = sides[side]["clips_per_second"]
            sides[side]["audio_seconds_per_second"] = speed * clip_seconds
        pairs = zip(results["runs"]["recipe"], results["runs"]["ours"], strict=True)
        ratios = [_speed(ours[stage]) / _speed(theirs[stage]) for theirs, ours in pairs]
        found[stage] = sides | {
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "memory_ratio": sides["recipe"]["peak_memory_gib"] / sides["ours"]["peak_memory_gib"],
        }
    for side in SIDES:
        found["train"][side] |= results["work"][side]
        used = found["train"][side]["clips_per_second"] * results["work"][side]["flop_per_clip"]
        found["train"][side]["gflop_per_second"] = used / 1e9
        found["train"][side]["share_of_gemm_peak"] = used / results["gemm_flop_per_second"]
    sizes = {side: results["runs"][side][0]["prepare"]["bytes"] for side in SIDES}
    found["disk"] = sizes | {"ratio": sizes["recipe"] / sizes["ours"]}
    found["scores"] = {
        "recipe_full": [run["evaluate"]["full"] for run in results["runs"]["recipe"]],
        "ours_auto": [run["evaluate"]["auto"] for run in results["runs"]["ours"]],
        "ours_full": [run["evaluate"]["full"] for run in results["runs"]["ours"]],
    }
    return found


def _speed(stage: dict[str, Any]) -> float:
    return stage["clips"] / stage["seconds"]


def table(found: dict[str, Any], gemm: float, precision: str) -> str:
    """The summary for people, in Markdown."""
    lines = [
        "| | recipe | ours | ratio |",
        "|---|---|---|---|",
    ]
    for stage in ("prepare", "train", "evaluate"):
        row = found[stage]
        cells = [
            f"{row[side]['clips_per_second']:.2f} ({row[side]['least']:.2f}-"
            f"{row[side]['most']:.2f}), {row[side]['audio_seconds_per_second']:.1f} s/s"
            for side in SIDES
        ]
        lines.append(f"| {stage}, clips/s | {cells[0]} | {cells[1]} | {row['ratio']:.2f} |")
        memory = [f"{row[side]['peak_memory_gib']:.2f} GiB" for side in SIDES]
        lines.append(
            f"| {stage}, peak memory | {memory[0]} | {memory[1]} | {row['memory_ratio']:.2f} |"
        )
    disk = found["disk"]
    lines.append(
        f"| disk | {disk['recipe'] / 1e6:.1f} MB | {disk['ours'] / 1e6:.1f} MB "
        f"| {disk['ratio']:.1f} |"
    )
    train = found["train"]
    for name, form in (
        ("encoder_padding_share", "{:.1%}"),
        ("gflop_per_second", "{:.0f}"),
        ("share_of_gemm_peak", "{:.1%}"),
    ):
        cells = [form.format(train[side][name]) for side in SIDES]
        lines.append(f"| train, {name.replace('_', ' ')} | {cells[0]} | {cells[1]} | |")
    for rate in ("wer", "cer"):
        cells = [
            ", ".join(f"{one[rate]:.1f}" for one in found["scores"][name])
            for name in ("recipe_full", "ours_auto", "ours_full")
        ]
        lines.append(f"| {rate.upper()} | {cells[0]} | auto {cells[1]}; full {cells[2]} | |")
    lines.append(f"\nGEMM peak {gemm / 1e9:.0f} GFLOP/s in {precision}.")
    return "\n".join(lines)


# ------ main


def main(config: Config) -> None:
    output = Path(config.output_dir).resolve()
    if output.exists():
        raise cli.UserError(f"--output_dir {config.output_dir}: exists: give a new folder")
    output.mkdir(parents=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peaks = {name: flops.gemm_peak(dtype, device) for name, dtype in DTYPES.items()}
    precision = config.precision if config.precision != "auto" else max(peaks, key=peaks.get)
    print(f"GEMM: {peaks}; both sides compute in {precision}", flush=True)

    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for repeat in range(config.repeats):
        for side in SIDES if repeat % 2 == 0 else SIDES[::-1]:
            stages = recipe_stages if side == "recipe" else our_stages
            work = output / f"{side}_{repeat}"
            runs[side].append(stages(config, work, precision, seed=42 + repeat))
            print(f"repeat {repeat}, {side}: {json.dumps(runs[side][-1])}", flush=True)
            if side == "recipe":  # hundreds of megabytes
                shutil.rmtree(work / "data")
    data = output / "ours_0" / "data"
    splits, _ = load_prepared(str(data))
    every = [float(one) for split in splits.values() for one in column(split, "seconds")]
    results = {
        "runs": runs,
        "gemm_flop_per_second": peaks[precision],
        "gemm_peaks": peaks,
        "precision": precision,
        "work": training_work(config, data, AutoConfig.from_pretrained(config.model), seed=42),
        "seconds_per_clip": {
            "prepare": statistics.mean(every),
            "train": float(column(splits["train"], "seconds").mean()),
            "evaluate": float(column(splits["test"], "seconds").mean()),
        },
    } | made_with(config)
    found = summary(results)
    write_json(output / "versus_recipe.json", results | {"summary": found})
    print(table(found, peaks[precision], precision))


if __name__ == "__main__":
    cli.run(main, Config)
