"""Draw a run's metrics.jsonl: training and validation loss, and word error rate.

python -m docs.curve --metrics run/metrics.jsonl --output run.png
"""

import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import matplotlib.ticker

from common import cli


@dataclass
class Config:
    """Draw the curves of a run."""

    metrics: str = "run/metrics.jsonl"  # file that train_lora.py wrote
    output: str = "run.png"  # picture to write


def main(config: Config) -> None:
    lines = Path(config.metrics).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    for key, style in (("loss", ".-"), ("eval_loss", "s--")):
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=key)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes.set(xlabel="step", ylabel="loss per label token")
    axes.legend()
    figure.savefig(config.output, dpi=100)


if __name__ == "__main__":
    cli.run(main, Config)
