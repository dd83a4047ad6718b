"""What preparation and training cost as one thing grows: corpus, clips, batches, processes, window.

    python -m benchmarks.scaling --data_dir prepared --model MODEL --output_dir scaling

Every point is a short run of train_lora.py, or a whole one of preprocess.py, in processes of its
own. Prints a table and writes OUTPUT_DIR/scaling.json and OUTPUT_DIR/scaling.png.
"""

import csv
import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import matplotlib
import numpy as np
import torch

from benchmarks import process
from common import audio, cli
from common.files import write_json
from common.labels import MAX_LABELS
from common.prepared import FEATURES, RECORD_NAME, column, label_lengths, load_prepared
from common.provenance import describe_run

matplotlib.use("Agg")
from matplotlib import pyplot

GLOBAL_BATCH_SIZE = 8
AXES = {  # what grows: its unit, and the figure that is plotted
    "corpus, training": ("times", "first_step_seconds"),
    "corpus, preparation": ("times", "seconds"),
    "clip length": ("seconds", "clips_per_second"),
    "batch": ("seconds of window", "clips_per_second"),
    "processes": ("", "clips_per_second"),
    "window": ("", "clips_per_second"),
}
FIGURES = {
    "clips": "clips",
    "seconds": "command, s",
    "first_step_seconds": "first step, s",
    "clips_per_second": "clips/s",
    "audio_seconds_per_second": "audio s/s",
    "peak_memory_gib": "peak memory, GiB",
}


@dataclass
class Config:
    """Measure cost against corpus size, clip length, batch seconds, processes and window."""

    data_dir: str  # folder that preprocess.py wrote
    model: str  # Whisper checkpoint
    output_dir: str = "scaling"  # work, table and plot; must be new
    steps: int = 6  # optimizer steps of 8 clips a point; the first is not counted
    factors: str = "1,10,100"  # times that the training split is repeated
    prepare_factors: str = "1,3,10"  # times that it is repeated for preprocess.py
    lengths: str = "2,5,10,20,30"  # seconds of every clip
    batch_seconds: str = "15,30,60,120,240"  # --max_batch_seconds
    processes: str = "1,2"  # that one machine's cores or GPUs are shared out to
    num_workers: int = 2  # of preprocess.py


# ------ corpora


def write_corpus(split: datasets.Dataset, folder: Path, data: Path) -> None:
    """A prepared folder with a training split alone."""
    datasets.DatasetDict({"train": split}).save_to_disk(str(folder))
    shutil.copy(data / RECORD_NAME, folder)


def common_prefix(labels: list[list[int]]) -> list[int]:
    """The tokens that all label rows begin with: start, language, task.

    >>> common_prefix([[1, 2, 5], [1, 2, 6, 7]])
    [1, 2]
    """
    equal = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*labels, strict=False))
    return [column[0] for column in equal]


def clips_of_length(
    split: datasets.Dataset, seconds: float, number: int
) -> Iterator[dict[str, Any]]:
    """Rows of exactly so many seconds: speech of successive clips, with labels at their rate."""
    rate = (label_lengths(split).sum()) / column(split, "seconds").sum()
    prefix = common_prefix([row["labels"] for row in split.select_columns("labels")])
    wanted, rows = round(seconds * audio.SAMPLE_RATE), itertools.cycle(split)
    for i in range(number):
        pcm, text, row = np.empty(0, np.int16), [], {}
        while len(pcm) < wanted:
            row = next(rows)
            pcm = np.concatenate([pcm, audio.decode_flac(row["audio"])])
            text += row["labels"][len(prefix) : -1]
        tokens = min(round(seconds * rate), MAX_LABELS) - len(prefix) - 1
        spoken = itertools.islice(itertools.cycle(text), max(tokens, 1))
        made = {
            "id": f"clip{i}",
            "audio": audio.encode_flac(pcm[:wanted]),
            "labels": [*prefix, *spoken, row["labels"][-1]],
            "seconds": seconds,
        }
        yield row | made


def write_source(split: datasets.Dataset, factor: int, folder: Path) -> Path:
    """A manifest of every clip so many times, each time a sample shorter: no two are the same."""
    folder.mkdir()
    with (folder / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "text", "language", "speaker"])
        for i, row in enumerate(split):
            pcm = audio.decode_flac(row["audio"])
            for repetition in range(factor):
                name = f"{i}-{repetition}.flac"
                (folder / name).write_bytes(audio.encode_flac(pcm[repetition:]))
                writer.writerow([name, row["text"], row["language"], row["speaker"]])
    return folder / "manifest.csv"


# ------ points


def training(config: Config, data: Path, work: Path, processes: int, *more: Any) -> dict[str, Any]:
    """Figures of a short training run; the speed is that of all steps but the first."""
    words, environment = ["train_lora.py"], {}
    if processes > 1:
        words = [
            "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", 1,
            "--num_processes", processes, "--main_process_port", 0, "--mixed_precision", "no",
            "--dynamo_backend", "no", "train_lora.py",
        ]  # fmt: skip
        if not torch.cuda.is_available():  # --cpu would start one process without a word
            environment = {"ACCELERATE_USE_CPU": "true"}
    run = work / "run"
    cost = process.run(
        [
            *words, "--model", config.model, "--data_dir", data, "--output_dir", run,
            "--global_batch_size", GLOBAL_BATCH_SIZE, "--max_steps", config.steps,
            "--log_every", 1, "--save_every", 10**6, *more,
        ],
        work / "log.txt",
        environment,
    )  # fmt: skip
    record = json.loads((run / "train.json").read_text(encoding="utf-8"))
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines][1:]
    shutil.rmtree(run)
    return {
        "clips": len(load_prepared(str(data))[0]["train"]),
        "first_step_seconds": record["first_step_seconds"],
        "peak_memory_gib": cost.peak_memory_gib,
    } | {
        name: len(steps) / sum(1 / step[name] for step in steps)  # steps hold as many clips each
        for name in ("clips_per_second", "audio_seconds_per_second")
    }


def preparation(config: Config, source: Path, work: Path) -> dict[str, Any]:
    """Figures of preprocess.py on a manifest."""
    made = work / "made"
    cost = process.run(
        [
            "preprocess.py", "--source", source, "--model", config.model, "--output_dir", made,
            "--num_workers", config.num_workers,
        ],
        work / "log.txt",
    )  # fmt: skip
    splits = load_prepared(str(made))[0].values()
    clips = sum(map(len, splits))
    audio_seconds = sum(float(column(split, "seconds").sum()) for split in splits)
    shutil.rmtree(made)
    return {
        "clips": clips,
        "seconds": cost.seconds,
        "clips_per_second": clips / cost.seconds,
        "audio_seconds_per_second": audio_seconds / cost.seconds,
        "peak_memory_gib": cost.peak_memory_gib,
    }


def points(
    config: Config, split: datasets.Dataset, work: Path
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Axis, value and figures of every point, measured one after the other."""
    data, corpus = Path(config.data_dir), work / "corpus"
    for factor in config.factors.split(","):
        many = datasets.concatenate_datasets([split] * int(factor))
        write_corpus(many, corpus, data)
        yield "corpus, training", factor, training(config, corpus, work, 1)
        shutil.rmtree(corpus)
    for factor in config.prepare_factors.split(","):
        source = write_source(split, int(factor), work / "source")
        yield "corpus, preparation", factor, preparation(config, source, work)
        shutil.rmtree(work / "source")
    for length in config.lengths.split(","):
        rows = clips_of_length(split, float(length), GLOBAL_BATCH_SIZE * config.steps)
        write_corpus(datasets.Dataset.from_list(list(rows), FEATURES), corpus, data)
        yield "clip length", length, training(config, corpus, work, 1)
        shutil.rmtree(corpus)
    write_corpus(split, corpus, data)
    for seconds in config.batch_seconds.split(","):
        figures = training(config, corpus, work, 1, "--max_batch_seconds", seconds)
        yield "batch", seconds, figures
    for number in config.processes.split(","):
        yield "processes", number, training(config, corpus, work, int(number))
    for window in ("auto", "full"):
        yield "window", window, training(config, corpus, work, 1, "--context", window)
    shutil.rmtree(corpus)


# ------ table and plot


def table(measured: list[dict[str, Any]]) -> str:
    """All points, a line each, in Markdown."""
    lines = [
        f"| what | value | {' | '.join(FIGURES.values())} |",
        "|---" * (2 + len(FIGURES)) + "|",
    ]
    for point in measured:
        values = (point.get(name) for name in FIGURES)
        cells = ("" if value is None else f"{value:.4g}" for value in values)
        lines.append(f"| {point['axis']} | {point['value']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(measured: list[dict[str, Any]], file: Path) -> None:
    """One panel an axis, its figure and the peak memory."""
    figure, panels = pyplot.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for panel, (axis, (unit, name)) in zip(panels.flat, AXES.items(), strict=True):
        on_axis = [point for point in measured if point["axis"] == axis]
        names = [point["value"] for point in on_axis]
        panel.plot(names, [point[name] for point in on_axis], "o-", color="tab:blue")
        panel.set(title=axis, xlabel=unit, ylabel=FIGURES[name])
        panel.set_ylim(bottom=0)
        memory = panel.twinx()
        memory.plot(
            names, [point["peak_memory_gib"] for point in on_axis], "s--", color="tab:orange"
        )
        memory.set_ylabel(FIGURES["peak_memory_gib"], color="tab:orange")
        memory.set_ylim(bottom=0)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def main(config: Config) -> None:
    output = process.new_output(config.output_dir)
    split = load_prepared(config.data_dir)[0]["train"]
    work = output / "work"
    work.mkdir(parents=True)
    measured = []
    for axis, value, figures in points(config, split, work):
        measured.append({"axis": axis, "value": value} | figures)
        print(json.dumps(measured[-1]), flush=True)
    shutil.rmtree(work)
    write_json(output / "scaling.json", {"points": measured} | describe_run(config))
    plot(measured, output / "scaling.png")
    print(table(measured))


if __name__ == "__main__":
    cli.run(main, Config)
