"""Peak memory of training steps and decoded batches on a simulated GPU, beside the estimate.

    python -m benchmarks.simulated_memory --output_dir simulated_memory

Models have the real dimensions; nothing is computed but shapes and dtypes, so no weights are
needed, nor a GPU where torch is a CPU build and there is a C++ compiler. Prints a table, a line as
each case is done, and writes it as JSON.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import WhisperConfig

from benchmarks.process import new_output
from common import cli
from common.files import write_json
from common.labels import PROMPT_LENGTH
from common.memory import Step, Weights, predict_decoding_gib, predict_gib
from common.windows import POSITIONS_PER_SECOND

RUN = Path(__file__).resolve().parent.parent / "tests" / "simulated_cuda" / "run.py"
ALL_TARGETS = "q_proj,k_proj,v_proj,out_proj,fc1,fc2"
# Batches: encoder positions a clip (1,500 are 30 seconds, 320 a clip of 5 seconds) and its tokens.
ONE = {"clips": 1, "positions": 1500, "tokens": 128}
FOUR = {"clips": 4, "positions": 1500, "tokens": 128}
DENSE = {"clips": 8, "positions": 1500, "tokens": 400}
MANY = {"clips": 16, "positions": 1500, "tokens": 128}
SHORT = {"clips": 16, "positions": 320, "tokens": 64}
AGAIN = FOUR | {"checkpointing": True}
CACHED = FOUR | {"encoder_cached": True}
DECODED = (
    {"clips": 8, "positions": 1500, "tokens": 200},
    {"clips": 64, "positions": 320, "tokens": 80},
    {"clips": 2, "positions": 1500, "tokens": 440},
)
COLUMNS = (
    "model", "precision", "quantize", "trained", "clips x positions", "checkpointing",
    "simulated", "estimate", "ratio", "kernels",
)  # fmt: skip


@dataclass
class Config:
    """Simulated peak memory beside the estimate."""

    output_dir: str = "simulated_memory"  # for simulated_memory.json; must not exist
    models: str = "large-v2,large-v3,turbo"  # of them


def simulate(cases: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Figures of each case, as it is done; see `Case` in tests/simulated_cuda/run.py.

    A process of its own: the simulated device must be there before torch is imported.
    """
    words = [sys.executable, str(RUN), json.dumps(list(cases))]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            yield json.loads(line)
    if process.returncode:
        raise RuntimeError(f"the simulation ended with {process.returncode}; see above")


def estimate_gib(figures: dict[str, Any]) -> float:
    """What common/memory.py says of a case, weights included."""
    seconds = figures["clips"] * figures["positions"] / POSITIONS_PER_SECOND
    value = 4 if figures["precision"] == "fp32" else 2
    config = WhisperConfig(**figures["config"])
    if figures["decode"]:
        taken = predict_decoding_gib(
            config,
            seconds=seconds,
            bytes_per_value=value,
            device="cuda",
            tokens_per_second=figures["clips"] * (figures["tokens"] + PROMPT_LENGTH) / seconds,
            clips_per_second=figures["clips"] / seconds,
        )
        return figures["held_before"] / 2**30 + taken
    step = Step(
        device="cuda",
        bytes_per_value=value,
        tune=figures["tune"],
        lora_targets=tuple(figures["targets"].split(",")),
        lora_scope=figures["scope"],
        quantize=figures["quantize"],
        checkpointing=figures["checkpointing"],
        encoder_cached=figures["encoder_cached"],
    )
    return predict_gib(
        config,
        Weights(**figures["weights"]),
        step,
        seconds=seconds,
        tokens_per_second=figures["clips"] * figures["tokens"] / seconds,
    )


def grid(model: str) -> list[dict[str, Any]]:
    """The cases of one model; those that differ in their batch alone follow each other."""
    cases = []

    def add(*batches: dict[str, Any], **options: Any) -> None:
        cases.extend({"model": model} | options | batch for batch in batches)

    add(ONE, FOUR, DENSE, MANY, SHORT, AGAIN)
    add(FOUR, SHORT, AGAIN, targets=ALL_TARGETS)
    for quantize in ("int8", "nf4"):
        add(ONE, FOUR, SHORT, AGAIN, quantize=quantize)
        add(FOUR, AGAIN, quantize=quantize, targets=ALL_TARGETS)
    add(FOUR, precision="fp16")
    add(FOUR, AGAIN, precision="fp32")
    add(FOUR, precision="fp32", targets=ALL_TARGETS)
    add(ONE, FOUR, SHORT, AGAIN, tune="full")
    add(ONE, precision="fp32", tune="full")
    add(FOUR, SHORT, AGAIN, tune="encoder_frozen")
    add(FOUR, CACHED, scope="decoder")
    add(FOUR, scope="top_2")
    for precision in ("bf16", "fp32"):
        add(*DECODED, decode=True, precision=precision)
    return cases


def row(figures: dict[str, Any]) -> str:
    """A line of the table."""
    trained = {"lora": "LoRA"}.get(figures["tune"], figures["tune"])
    if figures["tune"] == "lora":
        trained += " all six" if figures["targets"] == ALL_TARGETS else " q, v"
        trained += {"all": ""}.get(figures["scope"], f", {figures['scope']}")
    trained += ", encoder cached" if figures["encoder_cached"] else ""
    if figures["decode"]:
        trained = f"decoding, {figures['tokens']} tokens"
    cells = (
        figures["model"], figures["precision"], figures["quantize"], trained,
        f"{figures['clips']} x {figures['positions']}", "yes" if figures["checkpointing"] else "",
        f"{figures['peak'] / 2**30:.2f}", f"{figures['estimate_gib']:.2f}",
        f"{figures['ratio']:.2f}", f"{figures['kernels']:,}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main(config: Config) -> None:
    models, output = config.models.split(","), new_output(config.output_dir)
    unknown = sorted(set(models) - {"large-v2", "large-v3", "turbo", "small", "tiny"})
    if unknown:
        raise cli.UserError(f"--models {config.models}: no dimensions of {', '.join(unknown)} here")
    output.mkdir(parents=True)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    done = []
    for figures in simulate([case for model in models for case in grid(model)]):
        figures["estimate_gib"] = estimate_gib(figures)
        figures["ratio"] = figures["estimate_gib"] * 2**30 / figures["peak"]
        done.append(figures)
        print(row(figures), flush=True)
    ratios = [figures["ratio"] for figures in done]
    print(f"estimate / simulated: {min(ratios):.3f} to {max(ratios):.3f} in {len(done)} cases")
    write_json(output / "simulated_memory.json", done)


if __name__ == "__main__":
    cli.run(main, Config)
