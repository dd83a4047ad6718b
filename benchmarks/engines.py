"""The same training under each engine, on two machines, against one process.

    python -m benchmarks.engines --data_dir prepared --model MODEL --output_dir engines

Needs root: the machines are two network namespaces, and what travels between them is counted on the
cable. A table says for each engine whether losses and word error rate agree, and what it costs.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import baseline, machines, process
from common import cli
from common.files import write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
ENGINES = {
    "one process": "",
    "DDP": "multi_node",
    "ZeRO-1": "deepspeed_zero1",
    "ZeRO-2": "deepspeed_zero2",
    "ZeRO-3": "deepspeed_zero3",
    "ZeRO-3, offloaded": "deepspeed_zero3_offload",
    "FSDP2": "fsdp2",
}
FIRST_PORT = 29_700  # free in a fresh namespace
POLL_SECONDS = 0.1


@dataclass
class Config:
    """The same training under each engine, on two machines, against one process."""

    data_dir: str  # folder that preprocess.py wrote
    model: str  # Whisper checkpoint
    output_dir: str = "engines"  # work and figures; must be new
    tunes: str = "lora,full"  # what is trained, as train_lora.py --tune has it
    max_steps: int = 6  # optimizer steps of 8 clips; the first is not counted
    eval_clips: int = 8  # validation clips that are scored after the last


def train(config: Config, tune: str, name: str, port: int, output: Path) -> dict[str, Any]:
    """One run on one or two machines: its figures."""
    rate = "1e-3" if tune == "lora" else "1e-5"
    words = [
        "train_lora.py", "--model", config.model, "--data_dir", config.data_dir,
        "--max_steps", str(config.max_steps), "--global_batch_size", "8", "--tune", tune,
        "--learning_rate", rate, "--log_every", "1", "--eval_every", "1000000",
        "--save_every", "1000000", "--eval_clips", str(config.eval_clips), "--num_workers", "1",
        "--max_batch_seconds", "30", "--lora_targets", baseline.TARGETS, "--nospeech_share", "0",
    ]  # fmt: skip
    commands = []
    for node in range(2 if ENGINES[name] else 1):
        folder = ["--output_dir", str(output if node == 0 else output / "of_node1")]
        launch = []
        if ENGINES[name]:
            launch = ["-m", "accelerate.commands.launch", "--mixed_precision", "no"]
            launch += ["--config_file", f"accelerate_configs/{ENGINES[name]}.yaml"]
            launch += machines.launch_words(node, port)
        commands.append(machines.on_machine(node, [sys.executable, *launch, *words, *folder]))
    threads = str(max(1, (os.cpu_count() or 1) // len(commands)))
    started, sent, running = time.monotonic(), {}, []
    for node, command in enumerate(commands):
        environment = os.environ | machines.environment(node) | {"OMP_NUM_THREADS": threads}
        with (output.parent / f"{output.name}.{node}.log").open("w") as log:
            keep = {"stdout": log, "stderr": subprocess.STDOUT}
            running.append(subprocess.Popen(command, cwd=ROOT, env=environment, **keep))
    peak, due = 0, 0.0
    while any(child.poll() is None for child in running):
        before = time.monotonic()
        if before >= due:
            used = time.process_time()
            peak = max(peak, sum(process.tree_bytes(child.pid) for child in running))
            cost = time.process_time() - used
            due = before + max(process.SAMPLE_SECONDS, cost / process.MAX_SAMPLING)
        steps = len(losses(output))
        if steps and steps not in sent:
            sent[steps] = machines.bytes_on_cable()
        time.sleep(POLL_SECONDS)
    if any(child.returncode for child in running):
        raise cli.UserError(f"--output_dir: {name} failed: see {output.parent}/{output.name}.*.log")
    record = json.loads((output / "train.json").read_text(encoding="utf-8"))
    speeds = list(losses(output, "clips_per_second").values())[1:]
    first, last = min(sent), max(sent)  # seen; what comes after the last step is seen too late
    return {
        "loss": losses(output),
        "wer": losses(output, "wer_raw")[config.max_steps],
        "engine": record["engine"],
        "processes": record["processes"],
        "step_seconds": 8 / statistics.median(speeds),
        "wall_seconds": time.monotonic() - started,
        "peak_memory_gib": peak / 2**30,
        "bytes_per_step": (sent[last] - sent[first]) / max(last - first, 1),
    }


def losses(output: Path, key: str = "loss") -> dict[int, float]:
    """A figure of metrics.jsonl by step, as far as it is written."""
    try:
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    except OSError:
        return {}
    return {record["step"]: record[key] for record in map(json.loads, lines) if key in record}


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Markdown, a row for each engine and what was trained."""
    lines = [
        "| trained | engine | largest difference of a loss | WER | s a step | peak memory, GiB "
        "| MB a step between the machines |",
        "|---|---|---|---|---|---|---|",
    ]
    for tune, engines in results.items():
        expected = engines["one process"]
        for name, engine in engines.items():
            worst = max(
                abs(engine["loss"][step] / loss - 1) for step, loss in expected["loss"].items()
            )
            agrees = "the same" if engine["wer"] == expected["wer"] else f"{engine['wer']:.2f}"
            wer = f"{engine['wer']:.2f}" if engine is expected else agrees
            sent = f"{engine['bytes_per_step'] / 1e6:.1f}"
            lines.append(
                f"| {tune} | {name} | {worst:.1e} | {wer} | {engine['step_seconds']:.2f} "
                f"| {engine['peak_memory_gib']:.2f} | {'' if engine is expected else sent} |"
            )
    return "\n".join(lines)


def main(config: Config) -> None:
    output = process.new_output(config.output_dir)
    output.mkdir(parents=True)
    config.data_dir, config.model = (
        str(Path(path).resolve()) for path in (config.data_dir, config.model)
    )
    results: dict[str, dict[str, dict[str, Any]]] = {}
    try:
        with machines.two_machines():
            for tune in config.tunes.split(","):
                results[tune] = {}
                for name in ENGINES:
                    port = FIRST_PORT + sum(len(runs) for runs in results.values())
                    run = output / f"{tune}_{name.replace(' ', '_').replace(',', '')}"
                    results[tune][name] = train(config, tune, name, port, run)
                    print(
                        json.dumps({"tune": tune, "name": name} | results[tune][name]), flush=True
                    )
    except RuntimeError as error:
        raise cli.UserError(f"--output_dir {output}: {error}") from error
    write_json(output / "engines.json", results)
    write_text(output / "engines.md", table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    cli.run(main, Config)
