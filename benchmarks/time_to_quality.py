"""Seconds of training until our schedule is as good as the tutorial's recipe after its epoch.

    python -m benchmarks.time_to_quality --data_dir COMMON_VOICE_FOLDER --language hi \\
        --model MODEL --output_dir quality

Of each seed the recipe trains one epoch at its own options and is scored at 30 seconds. Ours trains
`--clips` of them, from the fewest on, each number a run of its own whose learning rate decays to
zero, with train_lora.py's defaults but for `--global_batch_size`, until its raw word error rate is
no higher at the natural window and at 30 seconds. Loading, validation and scoring are not counted
on either side. Both sides are scored on the test split, so a number of clips is not chosen by this
benchmark but found by it.

Prints a table and writes OUTPUT_DIR/time_to_quality.json and time_to_quality.png.
"""

import json
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib

from benchmarks import process
from benchmarks.versus_recipe import baseline_stages, our_training, run_preprocess
from common import cli
from common.files import write_json
from common.provenance import describe_run

matplotlib.use("Agg")
from matplotlib import pyplot

WINDOWS = ("natural", "full")


@dataclass
class Config:
    """Seconds of training until ours is as good as the tutorial's recipe."""

    data_dir: str  # Common Voice folder
    model: str  # Whisper checkpoint
    language: str = "hi"  # code
    output_dir: str = "quality"  # work and figures; must be new
    seeds: str = "42,43,44"  # of order, adapter and dropout
    clips: str = "96,128,160,256,523"  # that ours is trained on, each a run of its own
    global_batch_size: int = 4  # clips per step of ours
    max_steps: int = 0  # training steps of the recipe; 0 is one epoch
    precision: Literal["fp32", "bf16"] = "fp32"  # of both sides
    learning_rate: float = 1e-3  # peak, of both sides


# ------ runs


def run_ours(config: Config, data: Path, run: Path, clips: int, seed: int) -> dict[str, Any]:
    """Train one adapter, and score it at both windows."""
    batch = config.global_batch_size
    options = [
        "--global_batch_size", batch, "--max_steps", max(1, round(clips / batch)), "--seed", seed,
        "--precision", config.precision, "--learning_rate", config.learning_rate,
    ]  # fmt: skip
    stages = our_training(config.model, run, data, config.precision, options)
    scores = {
        window: stages[stage]["scores"]
        for window, stage in zip(WINDOWS, ("evaluate", "evaluate_full"), strict=True)
    }
    return {name: stages["train"][name] for name in ("clips", "steps", "seconds")} | scores


def is_as_good(ours: dict[str, Any], recipe: dict[str, Any]) -> bool:
    """Whether no rate is higher than the recipe's, which knows 30 seconds only."""
    return all(ours[window]["wer"] <= recipe["scores"]["wer"] for window in WINDOWS)


def measure(config: Config, output: Path, seed: int) -> dict[str, Any]:
    """Both sides with one seed: the recipe, and ours up to the first run that is as good."""
    work = output / f"recipe_{seed}"
    stages = baseline_stages(config, work, config.precision, seed)
    shutil.rmtree(work / "data")  # hundreds of megabytes
    recipe = stages["train"] | {"scores": stages["evaluate"]["scores"]}
    print(f"seed {seed}, recipe: {json.dumps(recipe)}", flush=True)
    runs: list[dict[str, Any]] = []
    for clips in sorted(int(number) for number in config.clips.split(",")):
        run = output / f"ours_{seed}_{clips}"
        runs.append(run_ours(config, output / "data", run, clips, seed))
        print(f"seed {seed}, ours: {json.dumps(runs[-1])}", flush=True)
        if is_as_good(runs[-1], recipe):
            break
    reached = runs[-1]["seconds"] if is_as_good(runs[-1], recipe) else None
    ratio = reached and recipe["seconds"] / reached
    return {"seed": seed, "recipe": recipe, "ours": runs, "seconds": reached, "ratio": ratio}


# ------ table and plot


def table(seeds: list[dict[str, Any]]) -> str:
    """A line a run, in Markdown."""
    lines = [
        "| seed | side | clips | seconds of training | WER, natural | WER, 30 s | times as fast |",
        "|---|---|---|---|---|---|---|",
    ]
    for outcome in seeds:
        recipe = outcome["recipe"]
        cells = f"{recipe['clips']} | {recipe['seconds']:.0f} | | {recipe['scores']['wer']:.1f}"
        lines.append(f"| {outcome['seed']} | recipe | {cells} | |")
        for run in outcome["ours"]:
            rates = " | ".join(f"{run[window]['wer']:.1f}" for window in WINDOWS)
            good = is_as_good(run, recipe)
            ratio = f"{recipe['seconds'] / run['seconds']:.1f}" if good else "not as good"
            cells = f"{run['clips']} | {run['seconds']:.0f} | {rates} | {ratio}"
            lines.append(f"| {outcome['seed']} | ours | {cells} |")
    ratios = [outcome["ratio"] for outcome in seeds if outcome["ratio"]]
    if ratios:
        lines.append(
            f"\n{len(ratios)} of {len(seeds)} seeds reach the recipe's rate, in the median "
            f"{statistics.median(ratios):.1f} times as fast."
        )
    return "\n".join(lines)


def plot(seeds: list[dict[str, Any]], file: Path) -> None:
    """Word error rate over seconds of training, a line a seed and window, the recipe's as a dot."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for color, outcome in zip(
        pyplot.rcParams["axes.prop_cycle"].by_key()["color"], seeds, strict=False
    ):
        seconds = [run["seconds"] for run in outcome["ours"]]
        for window, style in zip(WINDOWS, ("-o", "--o"), strict=True):
            rates = [run[window]["wer"] for run in outcome["ours"]]
            axes.plot(
                seconds, rates, style, color=color, label=f"ours, {window}, {outcome['seed']}"
            )
        recipe = outcome["recipe"]
        dot = [recipe["seconds"]], [recipe["scores"]["wer"]]
        axes.plot(*dot, "s", color=color, label=f"recipe, 30 s, {outcome['seed']}")
    axes.set(xscale="log", xlabel="seconds of training", ylabel="WER, %")
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


# ------ main


def main(config: Config) -> None:
    output = process.new_output(config.output_dir)
    output.mkdir(parents=True)
    data, log = output / "data", output / "prepare.log"
    run_preprocess(config.data_dir, config.language, config.model, data, log)
    seeds: list[dict[str, Any]] = []
    for seed in config.seeds.split(","):  # half an hour each: what is measured is kept
        seeds.append(measure(config, output, int(seed)))
        write_json(output / "time_to_quality.json", {"seeds": seeds} | describe_run(config))
        plot(seeds, output / "time_to_quality.png")
        print(table(seeds), flush=True)


if __name__ == "__main__":
    cli.run(main, Config)
