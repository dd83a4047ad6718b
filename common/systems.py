"""The systems that are scored: a base or an adapter on it, with the window it was trained for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from common import labels, whisper
from common.accelerator import say
from common.cli import UserError
from common.provenance import read_record
from common.windows import DecodeMargin, DecodeWindowMode, decode_margin, trained_mode

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration


@dataclass(frozen=True)
class System:
    """A model that is ready to decode, and what it is decoded with."""

    name: str  # the adapter or, without one, the model
    model: WhisperForConditionalGeneration
    window_mode: DecodeWindowMode  # "natural" or "full"
    margin: DecodeMargin
    tokenizer: PreTrainedTokenizerBase
    accelerator: Accelerator
    batch_seconds: float = 0.0  # of window; 0: what fits memory
    warning: str = ""  # what a reader of its score must know


def check_languages(
    model: str, tokenizer: PreTrainedTokenizerBase, codes: Iterable[str], where: str
) -> None:
    """Refuse a model that has no token for one of the languages.

    Args:
        codes: of the languages.
        where: they are met, for the message.
    """
    unknown = sorted({code for code in codes if not labels.has_language(tokenizer, code)})
    if unknown:
        raise UserError(
            f"--model {model}: cannot write {', '.join(unknown)}, the language of {where}: give a "
            "multilingual model that has it"
        )


def load_for_decoding(
    model: str, adapter: str, *, dtype: torch.dtype, device: torch.device
) -> WhisperForConditionalGeneration:
    """Load a base, merge the adapter (if not empty) in float32, then convert the weights once."""
    base = whisper.load_base(model, dtype=torch.float32)
    if adapter:
        from common.adapter import load_merged  # loads PEFT and bitsandbytes: seconds

        base = load_merged(base, adapter)
    return base.to(device, dtype).eval()


def load_system(
    model: str,
    adapter: str,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    *,
    window_mode: DecodeWindowMode,
    dtype: torch.dtype,
    batch_seconds: float = 0.0,
) -> System:
    """Load a base and, where `adapter` is not empty, merge the adapter into it.

    Args:
        window_mode: "auto" is the window that the system was trained for.

    Raises:
        UserError: the adapter's own record says that it was trained on another base.
    """
    loaded = load_for_decoding(model, adapter, dtype=dtype, device=accelerator.device)
    whisper.complete_generation_config(loaded, tokenizer)
    record = read_record(adapter or model, "--adapter" if adapter else "--model")
    warning = ""
    if adapter:
        from common.adapter import changes_nothing, check_base

        if record:  # of an adapter trained elsewhere only shapes can be compared
            check_base(adapter, record, model, loaded)
        if changes_nothing(adapter):
            warning = "the adapter changes nothing: its LoRA is zero, and its score is the base's"
            say(accelerator, f"warning: {adapter}: {warning}")
    if record and record.get("config", {}).get("nospeech_share"):
        whisper.allow_empty_text(loaded)
    policy = record and record["window"]
    mode = trained_mode(policy) if window_mode == "auto" else window_mode
    return System(
        adapter or model, loaded, mode, decode_margin(policy), tokenizer, accelerator,
        batch_seconds, warning,
    )  # fmt: skip
