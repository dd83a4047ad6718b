"""A saved adapter on its base: loaded, checked tensor by tensor, merged into the weights."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import WhisperForConditionalGeneration

from common.cli import UserError, first_line
from common.whisper import base_probe, same_base

# PEFT imports bitsandbytes, which advises users of some CPUs to install another package.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
from peft import PeftConfig, PeftModel  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402

TIED = ("embed_tokens.weight", "proj_out.weight")  # one tensor, a row a token


def read_config(adapter: str, option: str = "--adapter") -> PeftConfig:
    """What kind of adapter a folder holds; raises UserError, naming `option`, if none."""
    try:
        config = PeftConfig.from_pretrained(adapter)
        if config.peft_type is None:
            raise ValueError("its adapter_config.json names no peft_type")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{option} {adapter}: no LoRA adapter there ({first_line(error)}): "
            "give the adapter folder that train_lora.py wrote"
        ) from error
    return config


def load_adapter(
    base: WhisperForConditionalGeneration, adapter: str, option: str = "--adapter"
) -> PeftModel:
    """Put a saved adapter on its base: a LoRA, or another of PEFT's kinds that change weights.

    Args:
        option: that names the adapter, for messages.

    Raises:
        UserError: no adapter there, one that is not in safetensors, or one of whose tensors not
            all belong to this base, which PEFT would load with a warning at most.
    """
    config = read_config(adapter, option)
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise UserError(
            f"{option} {adapter}: is of the kind {config.peft_type.value}, which is not in the "
            "model's weights: give a LoRA adapter"
        )
    saved = _read_adapter(adapter, option)
    config.inference_mode = True
    try:
        model = PeftModel(base, config)
        loaded = model.load_adapter(adapter, "default", torch_device="cpu")
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{option} {adapter}: does not fit --model {base.name_or_path}: {_misfit(error)}: "
            f"give what it was trained on, {config.base_model_name_or_path} as it was in that run"
        ) from error
    foreign, lacking = loaded.unexpected_keys, loaded.missing_keys
    if foreign or lacking:
        raise UserError(
            f"{option} {adapter}: {len(foreign)} of its {len(saved)} tensors do not belong to "
            f"--model {base.name_or_path}, and {len(lacking)} that it should have are missing "
            f"(such as {[*foreign, *lacking][0]}): give the model that it was trained on, and an "
            "adapter that was saved whole, without a wrapper's prefix (module., _orig_mod.)"
        )
    _untie_adapted(base)
    return model


def load_merged(base: WhisperForConditionalGeneration, adapter: str) -> torch.nn.Module:
    """The base with a saved adapter added into its weights for good; raises as `load_adapter`."""
    try:
        return load_adapter(base, adapter).merge_and_unload()
    except NotImplementedError as error:
        raise UserError(
            f"--adapter {adapter}: cannot be added into the weights ({first_line(error)}): give a "
            "plain LoRA adapter"
        ) from error


def _read_adapter(adapter: str, option: str = "--adapter") -> dict[str, torch.Tensor]:
    """The tensors of an adapter's file."""
    file = Path(adapter) / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(
            f"{option} {adapter}: has no adapter_model.safetensors, and other files could run "
            "code: give the adapter folder that train_lora.py wrote"
        )
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{option} {adapter}: its adapter_model.safetensors is damaged ({first_line(error)}):"
            " copy it again"
        ) from error
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(
            f"{option} {adapter}: {len(broken)} of its {len(tensors)} tensors hold values that "
            f"are not finite (such as {broken[0]}): its training diverged: give an earlier one"
        )
    return tensors


def changes_nothing(adapter: str) -> bool:
    """Whether a LoRA adapter has only zeros on one side of its products, as before any step.

    Or whether its products are scaled by an alpha of 0.
    """
    tensors = _read_adapter(adapter)
    sides = {
        side: [tensor for name, tensor in tensors.items() if f"lora_{side}" in name]
        for side in "AB"
    }
    is_plain = sum(map(len, sides.values())) == len(tensors) > 0
    config = PeftConfig.from_pretrained(adapter)
    alphas = {getattr(config, "lora_alpha", 1), *getattr(config, "alpha_pattern", {}).values()}
    is_zero = any(not any(map(torch.any, side)) for side in sides.values())
    return is_plain and (is_zero or alphas == {0})


def _misfit(error: Exception) -> str:
    """Why an adapter's tensors cannot be loaded, in one line: shapes, or a tensor that lacks."""
    if isinstance(error, KeyError):
        return f"its file lacks {error.args[0]}"
    sizes = re.findall(
        r"size mismatch for (\S+): .*?Size\(\[(.*?)\]\).*?Size\(\[(.*?)\]\)", str(error)
    )
    if not sizes:
        return first_line(error)
    name, saved, own = (size.replace(", ", " x ") for size in sizes[0])
    why = ", because its run changed the vocabulary" if name.endswith(TIED) else ""
    return f"{len(sizes)} of its tensors have other shapes ({name}: {saved} there, {own} here){why}"


def _untie_adapted(base: WhisperForConditionalGeneration) -> None:
    """Give the output layer weights of its own if it or the token embedding has an adapter.

    The two share a tensor. Unmerged, an adapter changes the output of one of them; merged into the
    tensor, it would change both.
    """
    embedding, projection = base.model.decoder.embed_tokens, base.proj_out
    if not any(isinstance(layer, BaseTunerLayer) for layer in (embedding, projection)):
        return
    if isinstance(projection, BaseTunerLayer):
        projection = projection.get_base_layer()
    projection.weight = torch.nn.Parameter(projection.weight.detach().clone(), requires_grad=False)


def check_base(
    adapter: str,
    record: dict[str, Any],
    model: str,
    loaded: WhisperForConditionalGeneration,
    option: str = "--adapter",
) -> None:
    """Refuse an adapter whose own record says that it was trained on another base."""
    if not same_base(record["base_probe"], base_probe(loaded)):
        raise UserError(
            f"{option} {adapter}: was trained on {record['config']['model']}, whose weights are "
            f"not those of --model {model}: give that base"
        )


def base_of(model: torch.nn.Module) -> WhisperForConditionalGeneration:
    """The Whisper itself, with or without an adapter on it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def merged(model: torch.nn.Module) -> Iterator[WhisperForConditionalGeneration]:
    """The base with the adapter added into its weights, for decoding; restored bit for bit after.

    A quantised base is left unmerged, because merging would round the adapter away. A model without
    an adapter is what it is.
    """
    base = base_of(model)
    if not isinstance(model, PeftModel):
        yield base
        return
    if getattr(base, "quantization_method", None) is not None:
        yield base
        return
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    kept = [layer.get_base_layer().weight.detach().clone() for layer in layers]
    model.merge_adapter()
    try:
        yield base
    finally:
        model.unmerge_adapter()
        for layer, weight in zip(layers, kept, strict=True):
            layer.get_base_layer().weight.data.copy_(weight)
