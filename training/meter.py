"""What is counted between two log lines, and gradient norms that are looked at only now and then.

Reading a norm waits for a GPU, so norms stay there until something is to be logged, saved or
evaluated.
"""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from datasets import Dataset

from common.cli import UserError
from common.files import write_json
from training.plan import Step

MAX_SKIPPED_STEPS = 20  # fp16 steps in a row that overflow while the loss scaler finds its scale


@dataclass
class Meter:
    """Sums since the last log line, from which rates are divided once, and the norms to look at."""

    loss: torch.Tensor  # summed over this process's tokens, on its device
    tokens: int = 0  # of all processes
    clips: int = 0  # with speech
    audio_seconds: float = 0.0
    wait_seconds: float = 0.0  # spent waiting for data
    seconds: float = 0.0
    norms: list[tuple[Step, torch.Tensor]] = field(default_factory=list)  # not looked at yet
    last_norm: float | None = None  # of the last step that was taken
    first_step_seconds: float | None = None  # from the start of the process to its first step
    skipped: int = 0  # steps of the whole run that overflowed in fp16
    skipped_in_row: int = 0  # the last of them

    def add(self, step: Step, *, seconds: float) -> None:
        """Count a step that was computed in `seconds`; `train_step` adds its loss and norm."""
        if self.first_step_seconds is None:
            self.first_step_seconds = time.time() - psutil.Process().create_time()
        self.tokens += step.num_tokens
        self.clips += len(step.speech)
        self.audio_seconds += step.audio_seconds
        self.seconds += seconds

    def rates(self, loss: float, learning_rate: float) -> dict[str, float | None]:
        """What a log line says of the steps since the last one.

        Args:
            loss: summed over all processes.
            learning_rate: of the last step.
        """
        means: dict[str, float | None] = {}
        if self.tokens:  # 0 if every step was skipped
            means = {"loss": loss / self.tokens, "grad_norm": self.last_norm}
        return means | {
            "learning_rate": learning_rate,
            "clips_per_second": self.clips / self.seconds,
            "audio_seconds_per_second": self.audio_seconds / self.seconds,
            "data_wait_share": self.wait_seconds / self.seconds,
        }

    def restart(self) -> None:
        """Begin counting again after a log line; what was skipped is counted over the run."""
        self.loss = torch.zeros_like(self.loss)
        self.tokens = self.clips = 0
        self.audio_seconds = self.wait_seconds = self.seconds = 0.0
        self.last_norm = None


def check_norms(meter: Meter, *, scaled: bool) -> tuple[Step, float] | None:
    """Look at the gradient norms of the steps since the last look.

    A norm that is not finite is an overflow in fp16: AdamW has read the scaler's flag on the GPU
    and left the weights as they were. Accelerate's `optimizer_step_was_skipped` does not know of it
    (https://github.com/huggingface/accelerate/issues/4242).

    Args:
        scaled: whether a loss scaler is at work, as in fp16.

    Returns:
        The step that the run ends at with its norm, if any: the first whose norm is not finite, in
        fp16 the last of more than MAX_SKIPPED_STEPS in a row.
    """
    norms = torch.stack([norm for _, norm in meter.norms]).tolist()
    for (step, _), norm in zip(meter.norms, norms, strict=True):
        if math.isfinite(norm):
            meter.last_norm, meter.skipped_in_row = norm, 0
            continue
        meter.skipped, meter.skipped_in_row = meter.skipped + 1, meter.skipped_in_row + 1
        meter.tokens -= step.num_tokens
        if not scaled or meter.skipped_in_row > MAX_SKIPPED_STEPS:
            return step, norm
    meter.norms.clear()
    return None


def refuse_not_finite(
    meter: Meter, dataset: Dataset, folder: Path, accelerator: Accelerator
) -> None:
    """End a run whose gradient is not finite, and name the clips of that step.

    Args:
        dataset: clips that are trained on.
        folder: of the run; the first process writes bad_batch.json there.

    Raises:
        UserError: as `check_norms` says.
    """
    failure = check_norms(meter, scaled=accelerator.scaler is not None)
    if failure is None:
        return
    (step, norm), report = failure, folder / "bad_batch.json"
    rows = dataset.select_columns(["id", "seconds", "text"])
    clips = [rows[clip] for clip in step.speech]
    if accelerator.is_main_process:
        write_json(report, {"step": step.number + 1, "gradient_norm": str(norm), "clips": clips})
    ids = ", ".join(str(clip["id"]) for clip in clips)
    raise UserError(
        f"--learning_rate: the gradient's norm is {norm} in step {step.number + 1} (clips {ids}; "
        f"see {report}); nothing was saved since: lower the rate, use bf16 instead of fp16, or "
        "check these clips"
    )
