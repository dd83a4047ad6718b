"""Whisper itself: load a base, run its encoder on a short window, add LoRA, decode a batch.

The only file that knows PEFT.

Legend: B batch, M mel bins, F frames (10 ms), C encoder positions (20 ms), D width, T tokens.
"""

import functools
import logging
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import logging as transformers_logging

from common.cli import UserError
from common.labels import MAX_LABELS
from common.loss import token_loss_sum

# PEFT imports bitsandbytes, which advises users of some CPUs to install one more package.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
from bitsandbytes.nn import Linear4bit  # noqa: E402
from peft import (  # noqa: E402
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer  # noqa: E402

Quantize = Literal["none", "int8", "nf4"]
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
PROMPT_LENGTH = 4  # start of transcript, language, task, no timestamps; English-only takes 2
ENCODED_FRAMES = (
    6000  # of 10 ms that decoding encodes at once: the encoder's memory, not the caches
)
SHRINK_AT = 0.8  # share of clips still going at which the others leave the decoder's batch
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
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa"}
    if quantize != "none":
        options["quantization_config"] = _quantization(quantize, dtype)
        options["device_map"] = {"": device or torch.device("cpu")}
    try:
        base = WhisperForConditionalGeneration.from_pretrained(
            model, use_safetensors=True, **options
        )
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"--model {model}: its weights cannot be loaded ({_first_line(error)}): "
            "give a checkpoint with whole model.safetensors files"
        ) from error
    take_any_window(base)
    return_loss_sum(base)
    return base if device is None or quantize != "none" else base.to(device)


def check_whisper(model: str) -> None:
    """Raise UserError unless `--model` names a Whisper that is here or on a reachable Hub."""
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise UserError(f"--model {model}: this folder has no config.json: give a checkpoint's")
    try:
        kind = AutoConfig.from_pretrained(model).model_type
    except (OSError, ValueError) as error:
        raise UserError(
            f"--model {model}: neither a folder here nor a model that the Hub answers for: "
            "check the spelling, the network and HF_HUB_OFFLINE"
        ) from error
    if kind != "whisper":
        raise UserError(f"--model {model}: is a {kind} model: give a Whisper")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _quantization(quantize: Quantize, dtype: torch.dtype) -> BitsAndBytesConfig:
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def mel_filters(model: WhisperForConditionalGeneration) -> np.ndarray:
    """The filter bank (1 + N_FFT // 2, M) for the model's number of mel bins: 80, or 128."""
    bins = model.config.num_mel_bins
    return np.asarray(WhisperFeatureExtractor(feature_size=bins).mel_filters, dtype=np.float32)


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
    hidden = F.gelu(encoder.conv1(input_features))  # (B, D, F)
    hidden = F.gelu(encoder.conv2(hidden)).permute(0, 2, 1)  # (B, C, D)
    hidden = hidden + encoder.embed_positions.weight[: hidden.shape[1]]
    hidden = F.dropout(hidden, p=encoder.dropout, training=encoder.training)
    for layer in encoder.layers:
        hidden = layer(hidden, None, **kwargs)
    return BaseModelOutput(last_hidden_state=encoder.layer_norm(hidden))


# ------ loss


def return_loss_sum(model: WhisperForConditionalGeneration) -> None:
    """Let `model(..., labels=..., label_positions=...)` return the summed loss of its labels.

    The stock loss is the mean over a micro-batch, which weighs tokens by their company, and needs
    the logits of all positions at once. The call still goes through every wrapper.
    """
    model.forward = MethodType(_forward, model)


@functools.wraps(WhisperForConditionalGeneration.forward)
def _forward(
    model: WhisperForConditionalGeneration, *args: Any, **kwargs: Any
) -> torch.Tensor | Seq2SeqLMOutput:
    if kwargs.get("label_positions") is None:
        return WhisperForConditionalGeneration.forward(model, *args, **kwargs)
    labels, positions = kwargs.pop("labels"), kwargs.pop("label_positions")
    hidden = model.model(*args, **kwargs, use_cache=False).last_hidden_state  # (B, T, D)
    return token_loss_sum(hidden, model.proj_out.weight, labels, positions)


# ------ LoRA


class FeatureDropout(torch.nn.Module):
    """Dropout that draws one mask a clip and input feature, the same at all of its positions.

    Whisper's windows have hundreds of positions, and on a CPU a random number for each of them
    costs a tenth of a training step.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x (B, T, D)."""
        if not self.training or not self.p:
            return x
        kept = torch.rand(len(x), 1, x.shape[-1], device=x.device) >= self.p
        return x * (kept / (1 - self.p)).to(x.dtype)


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
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(targets) if scope == "all" else scoped_modules(base, targets, scope),
        lora_dropout=dropout,
        bias="none",
    )
    model = get_peft_model(base, config)
    for module in model.modules():
        if isinstance(module, LoraLayer) and dropout:
            module.lora_dropout["default"] = FeatureDropout(dropout)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


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
    """Put a saved adapter on its base.

    Raises:
        UserError: no adapter there, or one of another base.
    """
    try:
        config = LoraConfig.from_pretrained(adapter)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"--adapter {adapter}: no LoRA adapter there ({_first_line(error)}): "
            "give the adapter folder that train_lora.py wrote"
        ) from error
    try:
        return PeftModel.from_pretrained(base, adapter, config=config)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"--adapter {adapter}: does not fit --model {base.name_or_path}: it was trained on "
            f"{config.base_model_name_or_path}: give that model"
        ) from error


def _keep_trainable_on_cpu(base: WhisperForConditionalGeneration) -> None:
    """Stop bitsandbytes (0.50) from repacking 4-bit weights for AVX-512 at the first evaluation.

    The repacked form has no backward pass, so training after a validation would fail.
    """
    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's weights by name, on the CPU."""
    found = get_peft_model_state_dict(model)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


def set_adapter_tensors(model: PeftModel, tensors: dict[str, torch.Tensor]) -> None:
    """Put back what `adapter_tensors` gave."""
    set_peft_model_state_dict(model, tensors)


def base_probe(model: WhisperForConditionalGeneration) -> list[float]:
    """A few weights that LoRA never touches, to tell bases of the same shape apart."""
    return model.model.decoder.layer_norm.weight[:BASE_PROBE_SIZE].float().tolist()


def same_base(probe: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two probes are of one base, whatever precision it was stored in."""
    return len(probe) == len(other) and all(
        math.isclose(a, b, rel_tol=BASE_PROBE_TOLERANCE) for a, b in zip(probe, other, strict=True)
    )


@contextmanager
def merged(model: PeftModel) -> Iterator[WhisperForConditionalGeneration]:
    """The base with the adapter added into its weights, for decoding; restored bit for bit after.

    A quantised base is left unmerged, because merging would round the adapter away.
    """
    base = model.get_base_model()
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


# ------ decoding


def complete_generation_config(
    model: WhisperForConditionalGeneration, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Give a checkpoint what old fine-tunes lack: the ids that language and task are asked with.

    Prompts forced by an old configuration go: they would override the language asked for.
    """
    config, ids = model.generation_config, tokenizer.get_added_vocab()
    config.forced_decoder_ids = None
    if getattr(config, "lang_to_id", None) or "<|transcribe|>" not in ids:
        return
    first, last = ids["<|startoftranscript|>"] + 1, ids["<|translate|>"]
    config.is_multilingual = True
    config.lang_to_id = {name: at for name, at in ids.items() if first <= at < last}
    config.task_to_id = {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")}
    config.no_timestamps_token_id = ids["<|notimestamps|>"]


class EndAtCap(LogitsProcessor):
    """Force the end token on each row once it has as many new tokens as its own cap."""

    def __init__(self, caps: torch.Tensor, prompt_length: int, end_token_id: int) -> None:
        self.caps = caps  # (B,)
        self.prompt_length = prompt_length
        self.end_token_id = end_token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Args: input_ids (B * beams, T) so far; scores (B * beams, vocabulary) of the next."""
        caps = self.caps.repeat_interleave(len(input_ids) // len(self.caps))
        at_cap = input_ids.shape[1] - self.prompt_length >= caps
        forced = torch.full_like(scores, -math.inf)
        forced[:, self.end_token_id] = 0.0
        return torch.where(at_cap[:, None], forced, scores)


@torch.inference_mode()
def decode(
    model: WhisperForConditionalGeneration,
    input_features: torch.Tensor,
    *,
    languages: Sequence[str] | None,
    task: str,
    caps: Sequence[int],
    num_beams: int = 1,
) -> list[list[int]]:
    """Transcribe a batch: encode once, then decode greedily or with beams.

    Args:
        input_features: (B, M, F) at any window.
        languages: (B) codes; `None` for an English-only model, which takes neither them nor a task.
        caps: (B) most new tokens of each clip, so that one looping clip ends by itself.

    Returns:
        (B) lists of text tokens, prompt and end token cut. One as long as its cap hit it.
    """
    encoded = encode(model, input_features)
    if num_beams == 1 and _is_plain_greedy(model.generation_config):
        return _greedy(model, encoded, _prompts(model, languages, task, len(caps)), caps)
    end = model.generation_config.eos_token_id
    prompt = {} if languages is None else {"language": list(languages), "task": task}
    prompt_length = 2 if languages is None else PROMPT_LENGTH
    tokens = model.generate(
        encoder_outputs=BaseModelOutput(encoded),
        return_timestamps=False,
        num_beams=num_beams,
        max_new_tokens=min(max(caps) + 1, MAX_LABELS - prompt_length),
        logits_processor=LogitsProcessorList(
            [EndAtCap(torch.tensor(caps, device=encoded.device), prompt_length, end)]
        ),
        **prompt,
    )
    return [_text_tokens(row, end) for row in tokens.tolist()]


def encode(model: WhisperForConditionalGeneration, input_features: torch.Tensor) -> torch.Tensor:
    """Run the encoder over a batch (B, M, F), a few clips at a time: (B, C, D) on its device."""
    weight = model.model.encoder.conv1.weight
    size = max(1, ENCODED_FRAMES // input_features.shape[-1])
    pieces = (piece.to(weight.device, weight.dtype) for piece in input_features.split(size))
    return torch.cat([model.model.encoder(piece).last_hidden_state for piece in pieces])


def _text_tokens(row: list[int], end_token_id: int) -> list[int]:
    """Cut a generated row at its end token."""
    return row[: row.index(end_token_id)] if end_token_id in row else row


def _is_plain_greedy(config: GenerationConfig) -> bool:
    """Whether a checkpoint asks for nothing that only `generate` knows."""
    penalty, ngrams = config.repetition_penalty, config.no_repeat_ngram_size
    return penalty in (None, 1.0) and not ngrams and not config.do_sample


def _prompts(
    model: WhisperForConditionalGeneration, languages: Sequence[str] | None, task: str, clips: int
) -> torch.Tensor:
    """The tokens (B, P) that decoding starts from, as `generate` makes them."""
    config = model.generation_config
    start, no_timestamps = config.decoder_start_token_id, config.no_timestamps_token_id
    if languages is None:
        rows = [[start, no_timestamps]] * clips
    else:
        asked = (config.lang_to_id[f"<|{code}|>"] for code in languages)
        rows = [[start, language, config.task_to_id[task], no_timestamps] for language in asked]
    return torch.tensor(rows, device=model.device)


def _greedy(
    model: WhisperForConditionalGeneration,
    encoded: torch.Tensor,
    tokens: torch.Tensor,
    caps: Sequence[int],
) -> list[list[int]]:
    """The tokens that `generate` gives, from a batch that shrinks as clips end.

    Args:
        encoded: (B, C, D).
        tokens: (B, P) prompts.
    """
    config, texts = model.generation_config, [[] for _ in caps]
    never = torch.tensor(config.suppress_tokens or [], dtype=torch.long, device=tokens.device)
    not_first = torch.tensor(
        config.begin_suppress_tokens or [], dtype=torch.long, device=tokens.device
    )
    clips, going = list(range(len(caps))), set(range(len(caps)))  # rows of the batch; not ended
    cache = None
    while going:
        output = model.model.decoder(
            input_ids=tokens, encoder_hidden_states=encoded, past_key_values=cache, use_cache=True
        )
        scores = model.proj_out(output.last_hidden_state[:, -1])  # (B, V)
        scores[:, never] = -math.inf
        if cache is None:
            scores[:, not_first] = -math.inf
        cache = output.past_key_values
        tokens = scores.argmax(dim=-1, keepdim=True)  # (B, 1)
        for clip, token in zip(clips, tokens[:, 0].tolist(), strict=True):
            if clip not in going:
                continue
            if token == config.eos_token_id:
                going.remove(clip)
                continue
            texts[clip].append(token)
            if len(texts[clip]) == caps[clip]:
                going.remove(clip)
        if going and len(going) <= SHRINK_AT * len(clips):
            rows = torch.tensor([i for i, clip in enumerate(clips) if clip in going])
            rows = rows.to(tokens.device)
            cache.batch_select_indices(rows)
            tokens, encoded = tokens[rows], encoded[rows]
            clips = [clip for clip in clips if clip in going]
    return texts
