"""LoRA: an adapter put on a base or continued, its dropout, its layers; saving what was trained.

Legend: B batch, T positions, D width.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from peft.tuners.lora import LoraLayer
from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

from common.adapter import base_of, check_base, load_adapter, read_config
from common.cli import UserError
from common.provenance import read_record

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
FEATURE_ROOM = 2**33  # between the seeds of two modules' masks
MASKED_AT_ONCE = 2**23  # values of dropout masks drawn at once, in int64: 64 MiB a temporary


class FeatureDropout(torch.nn.Module):
    """Dropout with one mask per clip and input feature, the same at all positions of the clip.

    Whisper's windows have hundreds of positions: on a CPU a random number for each of them takes a
    tenth of a training step.
    """

    def __init__(self, p: float, width: int) -> None:
        super().__init__()
        self.p = p
        self.width = width  # D
        self.mask: torch.Tensor | None = None  # (B, 1, D): 0 or 1 / (1 - p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x (B, T, D)."""
        return x * self.mask.to(x.dtype) if self.training else x  # DeepSpeed has no autocast


class DropoutMasks:
    """The dropout masks of all adapters of a model, drawn together for each batch.

    A mask is a function of the clip's seed, the adapter and the feature alone, so it does not
    depend on the batch, process or attempt that computes the clip. Drawn one by one, the masks of
    large-v2 would take 4,800 of the 13,800 kernels that a step launched.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.dropouts = [layer for layer in model.modules() if isinstance(layer, FeatureDropout)]
        self.numbers: dict[int, torch.Tensor] = {}  # indices of the dropouts of each width

    def draw(self, clip_seeds: torch.Tensor) -> None:
        """Give each dropout its mask for a batch of clips with seeds (B), in autocast's dtype."""
        device = clip_seeds.device
        for width in {dropout.width for dropout in self.dropouts}:
            indices = [i for i, dropout in enumerate(self.dropouts) if dropout.width == width]
            if width not in self.numbers or self.numbers[width].device != device:
                self.numbers[width] = torch.tensor(indices, device=device)
            size = max(1, MASKED_AT_ONCE // (len(clip_seeds) * width))
            numbers = self.numbers[width].split(size)
            masks = (self._masks(part, clip_seeds, width) for part in numbers)
            for i, mask in zip(indices, itertools.chain.from_iterable(masks), strict=True):
                self.dropouts[i].mask = mask

    def _masks(self, numbers: torch.Tensor, clip_seeds: torch.Tensor, width: int) -> torch.Tensor:
        """Masks (adapters, B, 1, D) of adapters of one width."""
        p, kind = self.dropouts[0].p, clip_seeds.device.type
        seeds = clip_seeds + numbers[:, None] * FEATURE_ROOM  # (adapters, B)
        features = torch.arange(width, device=clip_seeds.device)  # (D)
        kept = _hash(_hash(seeds)[:, :, None, None] + features) >= p * 2**32
        autocast = torch.is_autocast_enabled(kind)
        return (kept / (1 - p)).to(torch.get_autocast_dtype(kind) if autocast else torch.float32)


def _hash(x: torch.Tensor) -> torch.Tensor:
    """Scatter non-negative int64 over 0 to 2^32: the mixing steps of Mulligan's 32-bit hash."""
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
    return (x >> 16) ^ x


def add_lora(
    base: WhisperForConditionalGeneration,
    *,
    rank: int,
    alpha: int,
    targets: Sequence[str],
    dropout: float,
    scope: str = "all",
) -> PeftModel:
    """Wrap the base with fresh LoRA layers; only they are trainable, in float32.

    Encoder layers below the first adapter run without a graph, because nothing in them or before
    them needs a gradient.

    The task type stays unset: with SEQ_2_SEQ_LM PEFT passes `input_ids`, which Whisper refuses.
    """
    _prepare_quantised(base)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(targets) if scope == "all" else scoped_modules(base, targets, scope),
        lora_dropout=dropout,
        bias="none",
    )
    return _make_trainable(get_peft_model(base, config), dropout)


def continue_lora(
    base: WhisperForConditionalGeneration, adapter: str, *, dropout: float
) -> PeftModel:
    """Put a saved adapter on the base and make it trainable, with its own rank and targets.

    Raises:
        UserError: the adapter does not fit this base, or was trained on other weights.
    """
    _prepare_quantised(base)
    record = read_record(adapter, "--init_adapter")
    if record:
        check_base(adapter, record, base.name_or_path, base, "--init_adapter")
    model = load_adapter(base, adapter, "--init_adapter")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name
    return _make_trainable(model, dropout)


def shape_of(adapter: str) -> dict[str, Any]:
    """The options of train_lora.py that a saved LoRA adapter decides by itself.

    Raises:
        UserError: no adapter there, or one of another kind.
    """
    config = read_config(adapter, "--init_adapter")
    modules = config.target_modules if isinstance(config, LoraConfig) else None
    names = {name.rpartition(".")[2] for name in modules} if isinstance(modules, set) else set()
    if not names or not names <= set(LORA_TARGETS):
        raise UserError(
            f"--init_adapter {adapter}: is no LoRA on some of {','.join(LORA_TARGETS)}: give one"
        )
    targets = ",".join(name for name in LORA_TARGETS if name in names)
    return {"lora_rank": config.r, "lora_alpha": config.lora_alpha, "lora_targets": targets}


def _make_trainable(model: PeftModel, dropout: float) -> PeftModel:
    """Train an adapter in float32, with one dropout mask per clip and feature.

    Under autocast its layers take their input as it comes, in half precision: PEFT would cast it to
    float32, dropout copy it and autocast cast it back, three kernels instead of one and 20 bytes
    a value moved instead of 4.
    """
    _cast_normalised(base_of(model))
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        own = FeatureDropout(dropout, layer.in_features) if dropout else torch.nn.Identity()
        layer.lora_dropout["default"] = own
        layer.cast_input_dtype_enabled = False
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _prepare_quantised(base: WhisperForConditionalGeneration) -> None:
    """Make a base in 8 or 4 bits ready to be trained through."""
    if getattr(base, "quantization_method", None) is not None:
        prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        _keep_trainable_on_cpu(base)


def scoped_modules(
    base: WhisperForConditionalGeneration, targets: Sequence[str], scope: str
) -> list[str]:
    """Full names of the modules that get an adapter, when not all targets do.

    Args:
        scope: "decoder", or "top_K": the decoder and the encoder's last K layers.
    """
    top = 0 if scope == "decoder" else int(scope.removeprefix("top_"))
    first = base.config.encoder_layers - top
    names = []
    for name, _ in base.named_modules():
        *path, last = name.split(".")  # model.encoder.layers.3.self_attn.q_proj
        if last in targets and ("decoder" in path or int(path[3]) >= first):
            names.append(name)
    return names


def save(
    folder: Path, model: torch.nn.Module, weights: dict[str, torch.Tensor], source: str
) -> None:
    """Write an adapter as plain PEFT loads it, or a whole model as plain transformers does.

    Args:
        weights: whole tensors by the model's names: the adapter's, or all.
        source: the checkpoint that the model is of, whose tokenizer goes with a whole one.
    """
    model.save_pretrained(folder, state_dict=weights)
    if isinstance(model, PeftModel):
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        return
    AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(folder)
    try:
        extractor = WhisperFeatureExtractor.from_pretrained(source)
    except OSError:  # not every checkpoint has its file, and the scripts do without
        extractor = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
    extractor.save_pretrained(folder)


def _keep_trainable_on_cpu(base: WhisperForConditionalGeneration) -> None:
    """Stop bitsandbytes (0.50) from repacking 4-bit weights for AVX-512 at the first evaluation.

    The repacked form has no backward pass, so training after a validation would fail.
    """
    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _cast_normalised(base: WhisperForConditionalGeneration) -> None:
    """Under autocast, let each LayerNorm return autocast's dtype.

    It would return float32, which every layer that reads it casts, base and adapter for itself; the
    encoder's output is read by 2 layers of each decoder layer. Layers of bitsandbytes do not cast:
    they compute in the dtype they are given, and the 8-bit one keeps its input for the backward
    pass, too. The decoder's last LayerNorm stays: the loss is computed in float32.
    """

    def cast(module: torch.nn.Module, given: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
        kind = out.device.type
        return out.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else out

    for module in base.modules():
        if isinstance(module, torch.nn.LayerNorm) and module is not base.model.decoder.layer_norm:
            module.register_forward_hook(cast)
