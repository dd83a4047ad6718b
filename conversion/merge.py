"""Whether a merged model is its base with the adapter: logits on real clips.

Legend: T tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset

from common import whisper
from common.adapter import base_of, load_adapter
from common.cli import UserError
from common.predictions import collator_for
from common.windows import UNTRAINED, decode_window

CHECK_CLIPS = 8  # from the first on
# Float32 rounds a merge to 1.5e-4 in the largest logit of whisper-base on Marathi; fp16 differs by
# 8.6e-3, bf16 by 0.39, where the adapter itself changes logits by up to 27.
TOLERANCE = 1e-3
EFFECT_FACTOR = 100  # an adapter changes some logit by this many tolerances, or was not applied


@dataclass(frozen=True)
class MergeCheck:
    """Largest differences of logits on the same clips."""

    clips: int
    difference: float  # merged and unmerged adapter
    effect: float  # unmerged adapter and base


@torch.inference_mode()
def logits(model: torch.nn.Module, clips: Dataset) -> list[torch.Tensor]:
    """Logits (T, V) of each clip's own transcript, float32 on the CPU, with or without an adapter.

    Args:
        clips: rows of a prepared split.
    """
    base, outputs = base_of(model), []
    collate = collator_for(base)
    for row in clips:
        window = decode_window(row["seconds"], "natural", UNTRAINED)
        inputs = collate([row], window=window, label_length=len(row["labels"]) - 1)
        states = whisper.encode(base, inputs["waves"])
        decoder_input_ids = inputs["decoder_input_ids"].to(states.device)
        scores = base(encoder_outputs=(states,), decoder_input_ids=decoder_input_ids).logits
        outputs.append(scores[0].float().cpu())
    return outputs


def check_unquantised(base: torch.nn.Module, model: str) -> None:
    """Refuse a base in 8 or 4 bits: merging would round the adapter away."""
    if getattr(base, "quantization_method", None) is not None:
        raise UserError(
            f"--model {model}: its weights are quantized: give the base that they were made from"
        )


def unmerged_logits(
    model: str, adapter: str, clips: Dataset
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Logits of the base, and of the base with the adapter beside its weights, in float32."""
    base = whisper.load_base(model, dtype=torch.float32).eval()
    check_unquantised(base, model)
    of_base = logits(base, clips)
    return of_base, logits(load_adapter(base, adapter).eval(), clips)


def compare(
    adapter: str,
    of_base: Sequence[torch.Tensor],
    unmerged: Sequence[torch.Tensor],
    merged: Sequence[torch.Tensor],
) -> MergeCheck:
    """Compare logits, a tensor (T, V) a clip.

    Raises:
        UserError: the merged model is not the adapted one, or the adapter changes nothing.
    """
    check = MergeCheck(len(merged), _largest(merged, unmerged), _largest(unmerged, of_base))
    if not check.difference <= TOLERANCE:
        raise UserError(
            f"--adapter {adapter}: merged into the base it changes logits by up to "
            f"{check.difference:.2g}, more than {TOLERANCE:g}, on {check.clips} clips of "
            "--data_dir: its products are too large for float32: train it again with a smaller "
            "--learning_rate"
        )
    if not check.effect >= EFFECT_FACTOR * TOLERANCE:
        raise UserError(
            f"--adapter {adapter}: changes no logit of the base by more than {check.effect:.2g} on "
            f"{check.clips} clips of --data_dir, so it was not applied, or was hardly trained: "
            "give a trained adapter of this --model"
        )
    return check


def _largest(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float:
    """NaN if any logit is."""
    pairs = zip(first, second, strict=True)
    return float(torch.stack([(own - other).abs().max() for own, other in pairs]).max())
