"""The systems that are scored: a base or an adapter on it, with the window it was trained for."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase, WhisperForConditionalGeneration

from common import predictions, whisper
from common.accelerator import say
from common.adapter import changes_nothing
from common.cli import UserError
from common.windows import DecodeMargin, DecodeWindowMode, decode_margin, trained_mode


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
    loaded = predictions.load_for_decoding(model, adapter, dtype=dtype, device=accelerator.device)
    whisper.complete_generation_config(loaded, tokenizer)
    record = read_record(adapter or model, "--adapter" if adapter else "--model")
    if adapter and record:  # of an adapter trained elsewhere only shapes can be compared
        check_base(adapter, record, model, loaded)
    policy = record and record["window"]
    mode = trained_mode(policy) if window_mode == "auto" else window_mode
    warning = ""
    if adapter and changes_nothing(adapter):
        warning = "the adapter changes nothing: its LoRA is zero, and its score is the base's"
        say(accelerator, f"warning: {adapter}: {warning}")
    return System(
        adapter or model, loaded, mode, decode_margin(policy), tokenizer, accelerator,
        batch_seconds, warning,
    )  # fmt: skip


def read_record(folder: str, option: str) -> dict[str, Any] | None:
    """What train_lora.py wrote beside an adapter or a model; `None` for one trained elsewhere."""
    file = Path(folder) / "recipe.json"
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{option} {folder}: its recipe.json is damaged ({error}): copy it again, or remove "
            "it to score at 30 seconds"
        ) from error
    is_ours = isinstance(record, dict) and {"base_probe", "window"} <= record.keys()
    return record if is_ours else None  # written by another program


def check_base(
    adapter: str, record: dict[str, Any], model: str, loaded: WhisperForConditionalGeneration
) -> None:
    """Refuse an adapter whose own record says that it was trained on another base."""
    if not whisper.same_base(record["base_probe"], whisper.base_probe(loaded)):
        raise UserError(
            f"--adapter {adapter}: was trained on {record['config']['model']}, whose weights are "
            f"not those of --model {model}: give that base"
        )
