"""Whisper itself: load a base, compute features, run its encoder on a short window.

Legend: B batch, M mel bins, F frames (10 ms), C encoder positions (20 ms), D width, T tokens.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedTokenizerBase,
    WhisperFeatureExtractor,
)
from transformers.utils import logging as transformers_logging

from common import audio, labels
from common.cli import UserError, first_line
from common.languages import ALIASES

if TYPE_CHECKING:  # loads for seconds what an export to CTranslate2 does not need
    from transformers import WhisperForConditionalGeneration
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

Quantize = Literal["none", "int8", "nf4"]
COMPUTED = {"model.encoder.embed_positions.weight"}  # sinusoids: some checkpoints leave them out
ENCODED_SAMPLES = 60 * audio.SAMPLE_RATE  # encoded at once where no graph is kept
# What a base's config may ask for in training. These draw by micro-batch, so the loss would depend
# on how a batch is cut; SpecAugment also masks silence as if it were speech.
NOTHING_RANDOM = {
    "apply_spec_augment": False,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}
FOR_SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
)  # fmt: skip
FOR_BEAMS = ("early_stopping", "length_penalty")
BASE_PROBE_SIZE = 8  # weights kept beside an adapter to know its base again
BASE_PROBE_TOLERANCE = 0.02  # covers a checkpoint stored in bfloat16


def quiet_libraries() -> None:
    """Silence the libraries' advice and loading bars; errors still speak."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.* is deprecated")


# ------ base


def load_base(
    model: str,
    *,
    dtype: torch.dtype,
    quantize: Quantize = "none",
    device: torch.device | None = None,
) -> WhisperForConditionalGeneration:
    """Load a Whisper from a folder or the Hub.

    Args:
        dtype: of all weights that are not quantised.
        quantize: 8 or 4 bits for the linear layers, by bitsandbytes.
        device: where the weights go; of this process, never "auto".

    Raises:
        UserError: `--model` is not there, or is no Whisper with safetensors.
    """
    check_whisper(model)
    from transformers import WhisperForConditionalGeneration

    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa", **NOTHING_RANDOM}
    if quantize != "none":
        options["quantization_config"] = _quantization(quantize, dtype)
        options["device_map"] = {"": device or torch.device("cpu")}
    try:
        base, loaded = WhisperForConditionalGeneration.from_pretrained(
            model,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below
            **options,
        )
    except (OSError, SafetensorError, ValueError, AssertionError) as error:
        raise UserError(
            f"--model {model}: its weights cannot be loaded ({first_line(error)}): "
            "give a checkpoint with whole model.safetensors files"
        ) from error
    _refuse_other_weights(model, loaded)
    base = base if device is None or quantize != "none" else base.to(device)
    _refuse_broken_weights(model, base)
    return base


def check_whisper(model: str) -> None:
    """Raise UserError unless `--model` names a Whisper that is here or on a reachable Hub."""
    is_folder = Path(model).is_dir()
    if is_folder and not (Path(model) / "config.json").is_file():
        raise UserError(f"--model {model}: this folder has no config.json: give a checkpoint's")
    try:
        kind = AutoConfig.from_pretrained(model, trust_remote_code=False).model_type
        if is_folder and (Path(model) / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(model)  # transformers ignores a damaged one
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        if is_folder:
            raise UserError(
                f"--model {model}: its configuration cannot be used ({_one_line(error)}): give a "
                "checkpoint with whole config.json and generation_config.json"
            ) from error
        raise UserError(
            f"--model {model}: neither a folder here nor a model that the Hub answers for: "
            "check the spelling, the network and HF_HUB_OFFLINE"
        ) from error
    if kind != "whisper":
        raise UserError(f"--model {model}: is a {kind} model: give a Whisper")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _refuse_other_weights(model: str, loaded: dict[str, Any]) -> None:
    """Raise UserError where a checkpoint's tensors are not those of its configuration.

    The library would leave those that are missing at random values, with a warning at most.
    """
    missing = sorted(set(loaded["missing_keys"]) - COMPUTED)
    foreign = sorted(loaded["unexpected_keys"])
    misfits = sorted(str(key) for key, *_ in loaded["mismatched_keys"])
    if missing or foreign or misfits:
        raise UserError(
            f"--model {model}: {len(missing)} tensors that its config.json asks for are missing, "
            f"{len(foreign)} do not belong to it and {len(misfits)} have other shapes (such as "
            f"{[*foreign, *misfits, *missing][0]}): give a checkpoint that was saved whole, "
            "without a wrapper's prefix (module., _orig_mod.)"
        )


def _refuse_broken_weights(model: str, base: WhisperForConditionalGeneration) -> None:
    """Raise UserError if weights are NaN or infinite: the model would write text all the same.

    A sum shows it, and takes a tenth of the time of a look at each value. Quantised weights are not
    looked at.
    """
    names, weights = zip(
        *((name, weight) for name, weight in base.named_parameters() if weight.is_floating_point()),
        strict=True,
    )
    with torch.no_grad():
        sums = torch.stack([weight.sum(dtype=torch.float32) for weight in weights])
    finite = sums.isfinite().tolist()  # waits for the device once
    broken = [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]
    if broken:
        raise UserError(
            f"--model {model}: {len(broken)} of its {len(names)} tensors hold values that are not "
            f"finite (such as {broken[0]}): its training diverged, or the file is damaged: give "
            "an earlier checkpoint, or download it again"
        )


def _quantization(quantize: Quantize, dtype: torch.dtype) -> BitsAndBytesConfig:
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def complete_generation_config(
    model: WhisperForConditionalGeneration, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Give a checkpoint what old or partial configurations lack: the ids of the prompt.

    They are the tokenizer's, as in the labels. Prompts forced by an old configuration are removed,
    because they would override the requested language. The mark that the library made the
    configuration from config.json is removed as well: with it, most of it would not be saved.
    """
    config, ids = model.generation_config, tokenizer.get_added_vocab()
    start, end = (tokenizer.convert_tokens_to_ids(name) for name in (labels.START, labels.END))
    config._from_model_config = False
    config.forced_decoder_ids = model.config.forced_decoder_ids = None
    config.eos_token_id = end
    config.decoder_start_token_id = model.config.decoder_start_token_id = start
    config.no_timestamps_token_id = tokenizer.convert_tokens_to_ids(labels.NO_TIMESTAMPS)
    for settings in (config, model.config):
        if settings.pad_token_id is None:
            settings.pad_token_id = end
    config.is_multilingual = not labels.is_english_only(tokenizer)
    if not config.is_multilingual:
        for name in ("language", "task", "lang_to_id", "task_to_id"):
            vars(config).pop(name, None)  # `generate` would refuse them, or detect a language
        return
    config.lang_to_id = {f"<|{code}|>": token for code, token in language_ids(tokenizer).items()}
    config.task_to_id = {task: ids[f"<|{task}|>"] for task in labels.TASKS}


def language_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids of the language tokens by code; none for an English-only model."""
    if labels.is_english_only(tokenizer):
        return {}
    ids = tokenizer.get_added_vocab()
    first, last = tokenizer.convert_tokens_to_ids(labels.START), ids["<|translate|>"]
    by_code = {name[2:-2]: token for name, token in ids.items() if first < token < last}
    for old, code in ALIASES.items():  # Hebrew is <|iw|> in Whisper's first releases
        if old in by_code:
            by_code.setdefault(code, by_code[old])
    return by_code


def allow_empty_text(model: WhisperForConditionalGeneration) -> None:
    """Let decoding end before the first word, for a model that was trained on empty texts.

    Checkpoints of Whisper forbid it (`begin_suppress_tokens`): they say silence by another token.
    """
    config = model.generation_config
    first = config.begin_suppress_tokens or []
    config.begin_suppress_tokens = [token for token in first if token != config.eos_token_id]


def drop_unused_flags(model: WhisperForConditionalGeneration) -> None:
    """Remove what the generation config of a checkpoint sets and, as it is set, never uses.

    The library saves no configuration that has such flags.
    """
    config = model.generation_config
    for name in () if config.do_sample else FOR_SAMPLING:
        setattr(config, name, None)
    for name in () if (config.num_beams or 1) > 1 else FOR_BEAMS:
        setattr(config, name, None)


# ------ features


@functools.cache
def mel_filters(bins: int, device: torch.device) -> torch.Tensor:
    """The filter bank (M, 1 + N_FFT // 2) of 80 or 128 mel bins."""
    filters = WhisperFeatureExtractor(feature_size=bins).mel_filters
    return torch.tensor(filters.T, dtype=torch.float32, device=device)


def features(model: WhisperForConditionalGeneration, waves: torch.Tensor) -> torch.Tensor:
    """Log-mel features (B, M, F) of int16 waves (B, N), on their device, in float32."""
    with torch.autocast(waves.device.type, enabled=False):
        filters = mel_filters(model.config.num_mel_bins, waves.device)
        return audio.log_mel(waves.float() / 32_768, filters)


# ------ encoder


def run_encoder(encoder: WhisperEncoder, features: torch.Tensor) -> torch.Tensor:
    """Run the encoder on a window of any length up to 30 seconds.

    The stock `WhisperEncoder.forward` with as many position embeddings as there are positions: at
    3,000 frames the result is bit-identical to it, and below them it refuses its input.

    Args:
        features: (B, M, F), F even and at most twice `max_source_positions`.

    Returns:
        States (B, C, D), C half of F.
    """
    hidden = F.gelu(encoder.conv1(features.to(encoder.conv1.weight.dtype)))  # (B, D, F)
    hidden = F.gelu(encoder.conv2(hidden)).permute(0, 2, 1)  # (B, C, D)
    # Through the module, not its weight: sharded engines gather weights when a module is called.
    hidden = hidden + encoder.embed_positions(torch.arange(hidden.shape[1], device=hidden.device))
    for layer in encoder.layers:
        hidden = layer(hidden, None)
    return encoder.layer_norm(hidden)


def encode(model: WhisperForConditionalGeneration, waves: torch.Tensor) -> torch.Tensor:
    """Run the encoder over int16 waves (B, N), a few clips at a time: (B, C, D) on its device."""
    encoder = model.model.encoder
    size = max(1, ENCODED_SAMPLES // waves.shape[1])
    pieces = (features(model, piece.to(model.device)) for piece in waves.split(size))
    return torch.cat([run_encoder(encoder, piece) for piece in pieces])


# ------ which base an adapter was trained on


def base_probe(model: WhisperForConditionalGeneration) -> list[float]:
    """A few weights that LoRA never touches, to tell bases of the same shape apart."""
    return model.model.decoder.layer_norm.weight[:BASE_PROBE_SIZE].float().tolist()


def same_base(probe: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two probes are of one base, whatever precision it was stored in."""
    return len(probe) == len(other) and all(
        math.isclose(a, b, rel_tol=BASE_PROBE_TOLERANCE) for a, b in zip(probe, other, strict=True)
    )
