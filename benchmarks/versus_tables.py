"""Tables and plot of benchmarks/versus_recipe.py: medians, ratios, time to the same error rate."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot, ticker

SIDES = ("recipe", "ours")
WINDOWS = {"natural": "evaluate", "full": "evaluate_full"}  # that ours is scored at: the stage
STAGES = {  # what is compared: the recipe's stage and ours
    "prepare": ("prepare", "prepare"),
    "train": ("train", "train"),
    "train decoder only, encoder cached": ("train", "cached_train"),
    "evaluate": ("evaluate", "evaluate"),
    "evaluate at 30 seconds": ("evaluate", "evaluate_full"),
}
SCORED = {  # adapter and window: side and stage
    "recipe, 30 s": ("recipe", "evaluate"),
    "ours, 30 s": ("ours", "evaluate_full"),
    "ours, natural": ("ours", "evaluate"),
    "ours decoder only, 30 s": ("ours", "cached_evaluate_full"),
    "ours decoder only, natural": ("ours", "cached_evaluate"),
}


# ------ cost and error rates of an epoch


def medians(runs: list[dict[str, Any]], stage: str) -> dict[str, float]:
    """Median, least and most clips a second, and the median peak memory."""
    speeds = [_speed(run[stage]) for run in runs]
    return {
        "clips_per_second": statistics.median(speeds),
        "least": min(speeds),
        "most": max(speeds),
        "peak_memory_gib": statistics.median(run[stage]["peak_memory_gib"] for run in runs),
    }


def _speed(stage: dict[str, Any]) -> float:
    return stage["clips"] / stage["seconds"]


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """Medians of each stage and side, and ratios: above 1 is better than the recipe."""
    compared: dict[str, Any] = {}
    runs = results["runs"]
    for stage, (theirs, ours) in STAGES.items():
        sides = {"recipe": medians(runs["recipe"], theirs), "ours": medians(runs["ours"], ours)}
        for side in sides.values():
            side["audio_seconds_per_second"] = (
                side["clips_per_second"] * results["seconds_per_clip"][theirs]
            )
        pairs = zip(runs["recipe"], runs["ours"], strict=True)
        ratios = [_speed(b[ours]) / _speed(a[theirs]) for a, b in pairs]
        compared[stage] = sides | {
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "memory_ratio": sides["recipe"]["peak_memory_gib"] / sides["ours"]["peak_memory_gib"],
        }
    for side, figures in results["work"].items():
        speed = compared["train"][side]["clips_per_second"]
        used = speed * figures["flop_per_clip"]
        compared["train"][side] |= figures | {
            "gflop_per_second": used / 1e9,
            "share_of_gemm_peak": used / results["gemm_flop_per_second"],
        }
    sizes = {side: runs[side][0]["prepare"]["bytes"] for side in SIDES}
    compared["disk"] = sizes | {"ratio": sizes["recipe"] / sizes["ours"]}
    compared["scores"] = {
        name: [run[stage]["scores"] for run in runs[side]] for name, (side, stage) in SCORED.items()
    }
    return compared


def table(compared: dict[str, Any], gemm: float, precision: str) -> str:
    """The summary for people, in Markdown."""
    lines = [
        "| | recipe | ours | ratio |",
        "|---|---|---|---|",
    ]
    for stage in STAGES:
        row = compared[stage]
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
    disk = compared["disk"]
    lines.append(
        f"| disk | {disk['recipe'] / 1e6:.1f} MB | {disk['ours'] / 1e6:.1f} MB "
        f"| {disk['ratio']:.1f} |"
    )
    train = compared["train"]
    for name, form in (
        ("encoder_padding_share", "{:.1%}"),
        ("bucket_padding_share", "{:.1%}"),
        ("gflop_per_second", "{:.0f}"),
        ("share_of_gemm_peak", "{:.1%}"),
    ):
        cells = [form.format(train[side][name]) for side in SIDES]
        lines.append(f"| train, {name.replace('_', ' ')} | {cells[0]} | {cells[1]} | |")
    lines += ["", "| adapter, window | WER, each seed | mean | CER, each seed | mean |"]
    lines.append("|---|---|---|---|---|")
    for name, seeds in compared["scores"].items():
        cells = []
        for rate in ("wer", "cer"):
            values = [rates[rate] for rates in seeds]
            cells += [
                ", ".join(f"{value:.1f}" for value in values),
                f"{statistics.mean(values):.1f}",
            ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(f"\nGEMM peak {gemm / 1e9:.0f} GFLOP/s in {precision}.")
    return "\n".join(lines)


# ------ time to the same error rate

RATES = "{wer:.1f} / {cer:.1f}"


def is_as_good(ours: dict[str, Any], recipe: dict[str, Any]) -> bool:
    """Whether no rate is higher than the recipe's, which knows 30 seconds only."""
    return all(ours[window]["wer"] <= recipe["scores"]["wer"] for window in WINDOWS)


def mean_of(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of each figure of runs of equal shape."""
    return {
        name: mean_of([run[name] for run in runs])
        if isinstance(value, dict)
        else statistics.mean(run[name] for run in runs)
        for name, value in runs[0].items()
    }


def quality_table(seeds: list[dict[str, Any]]) -> str:
    """A line a run, in Markdown, then the means over the seeds."""
    runs_of_all = zip(*(outcome["ours"] for outcome in seeds), strict=False)
    mean = {
        "seed": "mean",
        "recipe": mean_of([outcome["recipe"] for outcome in seeds]),
        "ours": [mean_of(runs) for runs in runs_of_all],
    }
    lines = [
        "| seed | side | clips | seconds of training | WER / CER, natural | WER / CER, 30 s "
        "| times as fast |",
        "|---|---|---|---|---|---|---|",
    ]
    for outcome in (*seeds, mean) if len(seeds) > 1 else seeds:
        recipe = outcome["recipe"]
        rates = RATES.format(**recipe["scores"])
        cells = f"{recipe['clips']} | {recipe['seconds']:.0f} | | {rates}"
        lines.append(f"| {outcome['seed']} | recipe | {cells} | |")
        for run in outcome["ours"]:
            rates = " | ".join(RATES.format(**run[name]) for name in WINDOWS)
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


def plot_quality(seeds: list[dict[str, Any]], file: Path) -> None:
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
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_formatter("")
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
