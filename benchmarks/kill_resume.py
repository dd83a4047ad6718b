"""Kill a run at random moments, again and again, and see that nothing is lost or changed.

    python -m benchmarks.kill_resume --kills 200 --output_dir kill_resume

Trains a tiny Whisper on tones; each run is killed with SIGKILL at moments drawn over its whole
life, start, checkpoints and evaluations included, started again each time, and compared with an
unbroken one: every logged figure and every byte of the adapters. Needs no data and no GPU.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # a forked process could not use its parent's threads
ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

import numpy as np  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import train_lora  # noqa: E402
from benchmarks import process  # noqa: E402
from common import cli  # noqa: E402
from common.files import write_json  # noqa: E402

COMPARED = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss", "wer_raw")
ADAPTERS = ("adapter", "adapter_best")


@dataclass
class Config:
    """Kill a run at random moments, and see that nothing is lost or changed."""

    kills: int = 200  # random moments, over all runs
    kills_per_run: int = 5  # before a run is left to end and compared
    max_steps: int = 40  # optimizer steps of a run
    num_workers: int = 0  # processes that read ahead in each run
    seed: int = 0  # of the moments
    max_minutes: float = 30.0  # gives up, and says how far it came
    output_dir: str = "kill_resume"  # work and figures; must be new


def start(options: dict[str, object], output: Path) -> int:
    """Train in a forked process, which has all libraries loaded: its number."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    tqdm.set_lock(threading.RLock())  # the inherited one may be held by a run that was killed
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train_lora.main(train_lora.Config(**options, output_dir=str(output)))
        code = 0
    finally:
        os._exit(code)
    raise AssertionError


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def result(run: Path) -> tuple[list[dict[str, float]], dict[str, bytes]]:
    """What must be the same: figures by step without timings, and the adapters' bytes."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    figures = [
        {key: record[key] for key in COMPARED if key in record} for record in map(json.loads, lines)
    ]
    adapters = {name: (run / name / "adapter_model.safetensors").read_bytes() for name in ADAPTERS}
    return figures, adapters


def runs(config: Config, options: dict[str, object], work: Path, life: float) -> Iterator[dict]:
    """Run after run, each killed at random moments and then left to end."""
    random, number = np.random.default_rng(config.seed), 0
    while True:
        run, kills = work / f"run_{number}", 0
        while kills < config.kills_per_run:
            child = start(options, run)
            time.sleep(random.uniform(0, life))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            if wait(child) != -signal.SIGKILL:  # it had ended before
                break
            kills += 1
        ended = wait(start(options, run)) == 0
        yield {"run": run, "kills": kills, "ended": ended}
        number += 1


def main(config: Config) -> None:
    output = process.new_output(config.output_dir)
    torch.set_num_threads(1)
    checkpoint = tiny.make_checkpoint(output / "model")
    source = tiny.make_corpus(output / "source", clips={"train": 21, "validation": 5, "test": 7})
    data = tiny.prepare(source, checkpoint, output / "data")
    options = {
        "model": str(checkpoint), "data_dir": str(data), "max_steps": config.max_steps,
        "global_batch_size": 4, "lora_rank": 4, "lora_alpha": 8, "log_every": 1, "save_every": 3,
        "eval_every": 5, "wer_every": 10, "num_workers": config.num_workers,
    }  # fmt: skip
    began = time.monotonic()
    assert wait(start(options, output / "whole")) == 0
    life = time.monotonic() - began
    expected = result(output / "whole")
    counts = {"kills": 0, "runs": 0, "lost": 0, "changed": 0, "life_seconds": life}
    for outcome in runs(config, options, output, life):
        counts["kills"] += outcome["kills"]
        counts["runs"] += 1
        counts["lost"] += not outcome["ended"]
        changed = outcome["ended"] and result(outcome["run"]) != expected
        counts["changed"] += changed
        if outcome["ended"] and not changed:
            shutil.rmtree(outcome["run"])
        counts["minutes"] = (time.monotonic() - began) / 60
        if counts["runs"] % 10 == 0:
            print(json.dumps(counts), flush=True)
        if counts["kills"] >= config.kills or counts["minutes"] > config.max_minutes:
            break
    write_json(output / "kill_resume.json", counts)
    print(
        f"{counts['kills']} kills in {counts['runs']} runs of {config.max_steps} steps: "
        f"{counts['lost']} lost, {counts['changed']} changed, {counts['minutes']:.1f} minutes"
    )
    sys.exit(bool(counts["lost"] or counts["changed"] or counts["kills"] < config.kills))


if __name__ == "__main__":
    cli.run(main, Config)
