"""Whisper itself: load a base, run its encoder on a short window, add LoRA, merge it.

The only file that knows PEFT.

Legend: B batch, M mel bins, F frames (10 ms), C encoder positions (20 ms), D width, T tokens.
"""

import functools
import itertools
import logging
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedTokenizerBase,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import logging as transformers_logging

from common import audio, labels
from common.cli import UserError
from common.languages import ALIASES
from common.loss import token_loss_sum

# PEFT imports bitsandbytes, which advises users of some CPUs to install one more package.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
from bitsandbytes.nn import Linear4bit  # noqa: E402
from peft import (  # noqa: E402
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from peft.tuners.lora import LoraLayer  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402

Quantize = Literal["none", "int8", "nf4"]
COMPUTED = {"model.encoder.embed_positions.weight"}  # sinusoids: some checkpoints leave them out
TIED = ("embed_tokens.weight", "proj_out.weight")  # one tensor, a row a token
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
ENCODED_SAMPLES = 60 * audio.SAMPLE_RATE  # encoded at once where no graph is kept
FEATURE_ROOM = 2**33  # between the seeds of two modules' masks
MASKED_AT_ONCE = 2**23  # values of dropout masks drawn at once, in int64: 64 MiB a temporary
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
    """Load a Whisper from a folder or the Hub, with an encoder that takes any window up to 30 s.

    Args:
        dtype: of all weights that are not quantised.
        quantize: 8 or 4 bits for the linear layers, by bitsandbytes.
        device: where the weights go; of this process, never "auto".

    Raises:
        UserError: `--model` is not there, or is no Whisper with safetensors.
    """
    check_whisper(model)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa", **NOTHING_RANDOM}
    if quantize != "none":
        options["quantization_config"] = _quantization(quantize, dtype)
        options["device_map"] = {"": device or torch.device("cpu")}
    try:
        base, loaded = WhisperForConditionalGeneration.from_pretrained(
            model,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to tell of them, below
            **options,
        )
    except (OSError, SafetensorError, ValueError, AssertionError) as error:
        raise UserError(
            f"--model {model}: its weights cannot be loaded ({_first_line(error)}): "
            "give a checkpoint with whole model.safetensors files"
        ) from error
    _refuse_other_weights(model, loaded)
    take_any_window(base)
    return_loss_sum(base)
    return base if device is None or quantize != "none" else base.to(device)


def check_whisper(model: str) -> None:
    """Raise UserError unless `--model` names a Whisper that is here or on a reachable Hub."""
    is_folder = Path(model).is_dir()
    if is_folder and not (Path(model) / "config.json").is_file():
        raise UserError(f"--model {model}: this folder has no config.json: give a checkpoint's")
    try:
        kind = AutoConfig.from_pretrained(model, trust_remote_code=False).model_type
        if is_folder and (Path(model) / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(model)  # transformers would go on without a bad one
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


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _refuse_other_weights(model: str, loaded: dict[str, Any]) -> None:
    """Raise UserError where a checkpoint's tensors are not those of its configuration.

    The library would leave those that are missing at random values, with a warning at most.
    """
    missing = sorted(set(loaded["missing_keys"]) - COMPUTED)
    foreign = sorted(loaded["unexpected_keys"])
    misfits = sorted(str(one[0]) for one in loaded["mismatched_keys"])
    if missing or foreign or misfits:
        raise UserError(
            f"--model {model}: {len(missing)} tensors that its config.json asks for are missing, "
            f"{len(foreign)} do not belong to it and {len(misfits)} have other shapes (such as "
            f"{[*foreign, *misfits, *missing][0]}): give a checkpoint that was saved whole, "
            "without a wrapper's prefix (module., _orig_mod.)"
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
    """Give a checkpoint what old or partial configurations lack: the ids that it is asked with.

    They are the tokenizer's, which the labels have too. Prompts forced by an old configuration go:
    they would override the language asked for. And a configuration that the library has made of
    config.json no longer says so: when it was saved and loaded again, most of it would be left out.
    """
    config, ids = model.generation_config, tokenizer.get_added_vocab()
    start, end = (tokenizer.convert_tokens_to_ids(name) for name in (labels.START, labels.END))
    config._from_model_config = False
    config.forced_decoder_ids = model.config.forced_decoder_ids = None
    config.eos_token_id = end
    config.decoder_start_token_id = model.config.decoder_start_token_id = start
    config.no_timestamps_token_id = tokenizer.convert_tokens_to_ids(labels.NO_TIMESTAMPS)
    for one in (config, model.config):
        if one.pad_token_id is None:
            one.pad_token_id = end
    config.is_multilingual = not labels.is_english_only(tokenizer)
    if not config.is_multilingual:
        for name in ("language", "task", "lang_to_id", "task_to_id"):
            vars(config).pop(name, None)  # `generate` would refuse them, or detect a language
        return
    last = ids["<|translate|>"]
    config.lang_to_id = {name: at for name, at in ids.items() if start < at < last}
    config.task_to_id = {task: ids[f"<|{task}|>"] for task in labels.TASKS}
    for old, code in ALIASES.items():  # Hebrew is <|iw|> in Whisper's first releases
        if f"<|{old}|>" in config.lang_to_id:
            config.lang_to_id.setdefault(f"<|{code}|>", config.lang_to_id[f"<|{old}|>"])


# ------ features


@functools.cache
def mel_filters(bins: int, device: torch.device) -> torch.Tensor:
    """The filter bank (M, 1 + N_FFT // 2) of 80 or 128 mel bins."""
    found = WhisperFeatureExtractor(feature_size=bins).mel_filters
    return torch.tensor(found.T, dtype=torch.float32, device=device)


def features(model: WhisperForConditionalGeneration, waves: torch.Tensor) -> torch.Tensor:
    """Log-mel features (B, M, F) of int16 waves (B, N), on their device, in float32."""
    with torch.autocast(waves.device.type, enabled=False):
        filters = mel_filters(model.config.num_mel_bins, waves.device)
        return audio.log_mel(waves.float() / 32_768, filters)


# ------ encoder


def take_any_window(model: WhisperForConditionalGeneration) -> None:
    """Let the encoder take any even number of frames up to 3,000.

    Only the method changes: parameters, their names and the modules stay, so adapters, DDP and
    DeepSpeed see the stock model, and at 3,000 frames the result is bit-identical to it.
    """
    encoder = model.model.encoder
    encoder.forward = MethodType(_encode, encoder)


def _encode(
    encoder: WhisperEncoder,
    input_features: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> BaseModelOutput:
    """Stock `WhisperEncoder.forward`, with as many position embeddings as there are positions.

    Args:
        input_features: (B, M, F), F at most twice `max_source_positions`.
        attention_mask: ignored, as in the stock encoder.
    """
    features = input_features.to(encoder.conv1.weight.dtype)
    hidden = F.gelu(encoder.conv1(features))  # (B, D, F)
    hidden = F.gelu(encoder.conv2(hidden)).permute(0, 2, 1)  # (B, C, D)
    # Through the module, not its weight: sharded engines gather weights when a module is called.
    hidden = hidden + encoder.embed_positions(torch.arange(hidden.shape[1], device=hidden.device))
    hidden = F.dropout(hidden, p=encoder.dropout, training=encoder.training)
    for layer in encoder.layers:
        hidden = layer(hidden, None, **kwargs)
    return BaseModelOutput(last_hidden_state=encoder.layer_norm(hidden))


def encode(model: WhisperForConditionalGeneration, waves: torch.Tensor) -> torch.Tensor:
    """Run the encoder over int16 waves (B, N), a few clips at a time: (B, C, D) on its device."""
    weight = model.model.encoder.conv1.weight
    size = max(1, ENCODED_SAMPLES // waves.shape[1])
    pieces = (features(model, piece.to(weight.device)) for piece in waves.split(size))
    encoded = (model.model.encoder(piece.to(weight.dtype)) for piece in pieces)
    return torch.cat([one.last_hidden_state for one in encoded])


# ------ loss


def return_loss_sum(model: WhisperForConditionalGeneration) -> None:
    """Let `model(waves=..., labels=..., label_positions=...)` return the summed loss of its labels.

    Features of the waves are computed on the way, on the model's device. The stock loss is the
    mean over a micro-batch, which weighs tokens by their company, and needs the logits of all
    positions at once. The call still goes through every wrapper, and the loss through the call of
    `proj_out`, because sharded engines gather a module's weights when it is called.

    `clip_seeds` (B), where given, seed the dropout of the adapter's input.
    """
    model.dropout_masks = DropoutMasks()
    model.forward = MethodType(_forward, model)
    model.proj_out.forward = MethodType(_project, model.proj_out)


@functools.wraps(WhisperForConditionalGeneration.forward)
def _forward(
    model: WhisperForConditionalGeneration, *args: Any, **kwargs: Any
) -> torch.Tensor | Seq2SeqLMOutput:
    if kwargs.get("label_positions") is None:
        return WhisperForConditionalGeneration.forward(model, *args, **kwargs)
    labels, positions = kwargs.pop("labels"), kwargs.pop("label_positions")
    if "waves" in kwargs:
        kwargs["input_features"] = features(model, kwargs.pop("waves"))
    clip_seeds = kwargs.pop("clip_seeds", None)
    if clip_seeds is not None and model.training:
        model.dropout_masks.draw(clip_seeds)
    hidden = model.model(*args, **kwargs, use_cache=False).last_hidden_state  # (B, T, D)
    return model.proj_out(hidden, labels, positions)


def _project(
    projection: torch.nn.Linear,
    hidden: torch.Tensor,
    labels: torch.Tensor | None = None,
    label_positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits of hidden (..., D), or with labels (B, T) their summed loss."""
    if labels is None:
        return F.linear(hidden, projection.weight)
    return token_loss_sum(hidden, projection.weight, labels, label_positions)


# ------ LoRA


class DropoutMasks:
    """The dropout masks of all adapters of a model, drawn together for each batch.

    A mask is a function of the clip's seed, the adapter and the feature alone: it is the same
    whatever batch, process or attempt the clip is computed in. Drawn one by one they would be 26
    kernels an adapter: 4,800 of the 13,800 that a step of large-v2 launched.
    """

    def __init__(self) -> None:
        self.dropouts: list[FeatureDropout] = []
        self.numbers: dict[int, torch.Tensor] = {}  # of the adapters of each width

    def add(self, p: float, width: int) -> "FeatureDropout":
        """The dropout of one more adapter, on an input of `width` features."""
        self.dropouts.append(FeatureDropout(p, width))
        return self.dropouts[-1]

    def draw(self, clip_seeds: torch.Tensor) -> None:
        """Give each dropout its mask for a batch of clips with seeds (B)."""
        device = clip_seeds.device
        for width in {one.width for one in self.dropouts}:
            same = [i for i, one in enumerate(self.dropouts) if one.width == width]
            if width not in self.numbers or self.numbers[width].device != device:
                self.numbers[width] = torch.tensor(same, device=device)
            size = max(1, MASKED_AT_ONCE // (len(clip_seeds) * width))
            numbers = self.numbers[width].split(size)
            masks = (self._masks(part, clip_seeds, width) for part in numbers)
            for i, mask in zip(same, itertools.chain.from_iterable(masks), strict=True):
                self.dropouts[i].mask = mask

    def _masks(self, numbers: torch.Tensor, clip_seeds: torch.Tensor, width: int) -> torch.Tensor:
        """Masks (adapters, B, 1, D), float32, of adapters of one width."""
        p = self.dropouts[0].p
        seeds = clip_seeds + numbers[:, None] * FEATURE_ROOM  # (adapters, B)
        features = torch.arange(width, device=clip_seeds.device)  # (D)
        kept = _hash(_hash(seeds)[:, :, None, None] + features) >= p * 2**32
        return kept / (1 - p)


class FeatureDropout(torch.nn.Module):
    """Dropout that draws one mask a clip and input feature, the same at all of its positions.

    Whisper's windows have hundreds of positions: on a CPU a random number for each of them costs a
    tenth of a training step.
    """

    def __init__(self, p: float, width: int) -> None:
        super().__init__()
        self.p = p
        self.width = width  # D
        self.mask: torch.Tensor | None = None  # (B, 1, D), float32: 0 or 1 / (1 - p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x (B, T, D)."""
        return x * self.mask.to(x.dtype) if self.training else x


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
    if getattr(base, "quantization_method", None) is not None:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        _keep_trainable_on_cpu(base)
        _cast_normalised(base)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(targets) if scope == "all" else scoped_modules(base, targets, scope),
        lora_dropout=dropout,
        bias="none",
    )
    model = get_peft_model(base, config)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers if dropout else ():
        layer.lora_dropout["default"] = base.dropout_masks.add(dropout, layer.in_features)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def train_all(base: WhisperForConditionalGeneration, *, encoder: bool) -> None:
    """Make all weights trainable, with or without the encoder's; position sinusoids stay."""
    for name, parameter in base.named_parameters():
        is_encoder = name.startswith("model.encoder.")
        fixed = name == "model.encoder.embed_positions.weight" or (is_encoder and not encoder)
        parameter.requires_grad = not fixed


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


def is_scope(scope: str) -> bool:
    """Whether `--lora_scope` has a meaning.

    >>> is_scope("all"), is_scope("top_2"), is_scope("top_"), is_scope("top_0")
    (True, True, False, False)
    """
    return scope in ("all", "decoder") or re.fullmatch(r"top_[1-9]\d*", scope) is not None


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


def load_adapter(base: WhisperForConditionalGeneration, adapter: str) -> PeftModel:
    """Put a saved adapter on its base: a LoRA, or another of PEFT's kinds that change weights.

    Raises:
        UserError: no adapter there, one that is not in safetensors, or one of whose tensors not
            all belong to this base, which PEFT would load with a warning at most.
    """
    try:
        config = PeftConfig.from_pretrained(adapter)
        if config.peft_type is None:
            raise ValueError("its adapter_config.json names no peft_type")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"--adapter {adapter}: no LoRA adapter there ({_first_line(error)}): "
            "give the adapter folder that train_lora.py wrote"
        ) from error
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise UserError(
            f"--adapter {adapter}: is of the kind {config.peft_type.value}, which is not in the "
            "model's weights: give a LoRA adapter"
        )
    saved = _read_adapter(adapter)
    config.inference_mode = True
    try:
        model = PeftModel(base, config)
        loaded = model.load_adapter(adapter, "default", torch_device="cpu")
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--adapter {adapter}: does not fit --model {base.name_or_path}: {_misfit(error)}: "
            f"give what it was trained on, {config.base_model_name_or_path} as it was in that run"
        ) from error
    foreign, lacking = loaded.unexpected_keys, loaded.missing_keys
    if foreign or lacking:
        raise UserError(
            f"--adapter {adapter}: {len(foreign)} of its {len(saved)} tensors do not belong to "
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
            f"--adapter {adapter}: cannot be added into the weights ({_first_line(error)}): give a "
            "plain LoRA adapter"
        ) from error


def _read_adapter(adapter: str) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's file."""
    file = Path(adapter) / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(
            f"--adapter {adapter}: has no adapter_model.safetensors, and other files could run "
            "code: give the adapter folder that train_lora.py wrote"
        )
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"--adapter {adapter}: its adapter_model.safetensors is damaged ({_first_line(error)}):"
            " copy it again"
        ) from error
    broken = [name for name, one in tensors.items() if not one.isfinite().all()]
    if broken:
        raise UserError(
            f"--adapter {adapter}: {len(broken)} of its {len(tensors)} tensors hold values that "
            f"are not finite (such as {broken[0]}): its training diverged: give an earlier one"
        )
    return tensors


def _misfit(error: Exception) -> str:
    """Why an adapter's tensors cannot be loaded, in one line: shapes, or a tensor that lacks."""
    if isinstance(error, KeyError):
        return f"its file lacks {error.args[0]}"
    sizes = re.findall(
        r"size mismatch for (\S+): .*?Size\(\[(.*?)\]\).*?Size\(\[(.*?)\]\)", str(error)
    )
    if not sizes:
        return _first_line(error)
    name, there, here = (one.replace(", ", " x ") for one in sizes[0])
    why = ", because its run changed the vocabulary" if name.endswith(TIED) else ""
    return (
        f"{len(sizes)} of its tensors have other shapes ({name}: {there} there, {here} here){why}"
    )


def _untie_adapted(base: WhisperForConditionalGeneration) -> None:
    """Give the output layer weights of its own if it or the token embedding is adapted.

    They are one tensor. Unmerged, an adapter changes what one of them computes; merged into the
    tensor, it would change both.
    """
    embedding, projection = base.model.decoder.embed_tokens, base.proj_out
    if not any(isinstance(one, BaseTunerLayer) for one in (embedding, projection)):
        return
    if isinstance(projection, BaseTunerLayer):
        projection = projection.get_base_layer()
    projection.weight = torch.nn.Parameter(projection.weight.detach().clone(), requires_grad=False)


def _keep_trainable_on_cpu(base: WhisperForConditionalGeneration) -> None:
    """Stop bitsandbytes (0.50) from repacking 4-bit weights for AVX-512 at the first evaluation.

    The repacked form has no backward pass, so training after a validation would fail.
    """
    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _cast_normalised(base: WhisperForConditionalGeneration) -> None:
    """Under autocast, give quantised layers their input in autocast's dtype.

    Autocast's LayerNorm returns float32, which other linear layers cast. Those of bitsandbytes
    return what they compute in the dtype they are given; the 8-bit one keeps its input for the
    backward pass, too, and multiplies there in that dtype. What a LayerNorm returns is cast once,
    not by each layer that reads it: the encoder's output is read by 2 layers of each decoder layer,
    which would keep a copy each. The decoder's last one stays: the loss is computed in float32.
    """

    def cast(module: torch.nn.Module, given: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
        kind = out.device.type
        return out.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else out

    for module in base.modules():
        if isinstance(module, torch.nn.LayerNorm) and module is not base.model.decoder.layer_norm:
            module.register_forward_hook(cast)


def base_probe(model: WhisperForConditionalGeneration) -> list[float]:
    """A few weights that LoRA never touches, to tell bases of the same shape apart."""
    return model.model.decoder.layer_norm.weight[:BASE_PROBE_SIZE].float().tolist()


def same_base(probe: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two probes are of one base, whatever precision it was stored in."""
    return len(probe) == len(other) and all(
        math.isclose(a, b, rel_tol=BASE_PROBE_TOLERANCE) for a, b in zip(probe, other, strict=True)
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
