"""What is trained: a new LoRA adapter, an adapter that is continued, or the base's own weights."""

import re
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerBase, WhisperForConditionalGeneration

from common import whisper
from common.precision import DTYPES
from training.lora import LORA_TARGETS, add_lora, continue_lora

Tune = Literal["lora", "full", "encoder_frozen"]


@dataclass(frozen=True)
class Tuning:
    """Which weights are trained, as the options name them."""

    tune: Tune
    init_adapter: str  # folder of an adapter to continue from; empty: a new one
    rank: int
    alpha: int
    targets: str  # layers with an adapter
    scope: str  # all, decoder, or top_K
    dropout: float

    @property
    def kind(self) -> str:
        """What a run writes, "adapter" or "model"."""
        return "adapter" if self.tune == "lora" else "model"

    def held_dtype(self, precision: str) -> torch.dtype:
        """Of the base's weights: those that are trained are held in float32."""
        return DTYPES[precision] if self.tune == "lora" else torch.float32


def problems(tuning: Tuning, *, quantize: str, cache_encoder: bool) -> list[tuple[bool, str]]:
    """Rules for `cli.refuse` about what is trained."""
    tune, targets, scope = tuning.tune, tuning.targets, tuning.scope
    init_adapter = tuning.init_adapter
    unknown = [target for target in targets.split(",") if target not in LORA_TARGETS]
    option, trained = ("lora_scope", scope) if tune == "lora" else ("tune", tune)
    return [
        (
            bool(unknown),
            f"--lora_targets {targets}: {','.join(unknown)} is not in Whisper: give some of "
            f"{','.join(LORA_TARGETS)}",
        ),
        (
            tune != "lora" and quantize != "none",
            f"--tune {tune}: weights in 8 or 4 bits cannot be trained, as --quantize {quantize} "
            "makes them: give --tune lora, or --quantize none",
        ),
        (
            bool(init_adapter) and (tune != "lora" or scope != "all"),
            f"--init_adapter {init_adapter}: is what is trained: leave out --{option} {trained}",
        ),
        (
            cache_encoder and trained not in ("decoder", "encoder_frozen"),
            f"--cache_encoder true: the encoder changes with --{option} {trained}: give "
            "--lora_scope decoder or --tune encoder_frozen",
        ),
        (
            not is_scope(scope),
            f"--lora_scope {scope}: give all, decoder, or top_ and a number: top_2",
        ),
    ]


def is_scope(scope: str) -> bool:
    """Whether `--lora_scope` has a meaning.

    >>> is_scope("all"), is_scope("top_2"), is_scope("top_"), is_scope("top_0")
    (True, True, False, False)
    """
    return scope in ("all", "decoder") or re.fullmatch(r"top_[1-9]\d*", scope) is not None


def load_model(
    model: str,
    tuning: Tuning,
    tokenizer: PreTrainedTokenizerBase,
    *,
    precision: str,
    quantize: whisper.Quantize,
    device: torch.device,
    empty_text: bool,
    seed: int,
) -> torch.nn.Module:
    """The base with what is to be trained: an adapter on it, or its own weights.

    Args:
        empty_text: whether the model is to learn that a clip may have no text.
        seed: of the first weights of a new adapter.
    """
    dtype = tuning.held_dtype(precision)
    base = whisper.load_base(model, dtype=dtype, quantize=quantize, device=device)
    whisper.complete_generation_config(base, tokenizer)
    if empty_text:
        whisper.allow_empty_text(base)
    whisper.drop_unused_flags(base)
    set_seed(seed)
    return trainable_model(base, tuning)


def trainable_model(base: WhisperForConditionalGeneration, tuning: Tuning) -> torch.nn.Module:
    """Put what is to be trained on a base."""
    if tuning.tune != "lora":
        train_all(base, encoder=tuning.tune == "full")
        return base
    if tuning.init_adapter:
        return continue_lora(base, tuning.init_adapter, dropout=tuning.dropout)
    return add_lora(
        base, rank=tuning.rank, alpha=tuning.alpha, targets=tuning.targets.split(","),
        dropout=tuning.dropout, scope=tuning.scope,
    )  # fmt: skip


def train_all(base: WhisperForConditionalGeneration, *, encoder: bool) -> None:
    """Make all weights trainable, with or without the encoder's; position sinusoids stay."""
    for name, parameter in base.named_parameters():
        is_encoder = name.startswith("model.encoder.")
        fixed = name == "model.encoder.embed_positions.weight" or (is_encoder and not encoder)
        parameter.requires_grad = not fixed
