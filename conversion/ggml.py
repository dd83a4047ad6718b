"""A file for whisper.cpp, and its text of a clip.

The format is that of whisper.cpp's `whisper_model_load`: hyperparameters, mel filters, the bytes of
each token in the order of ids, then named tensors. Special tokens are not in it: whisper.cpp
computes their ids from the size of the vocabulary.
"""

import importlib.util
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, WhisperForConditionalGeneration
from transformers.convert_slow_tokenizer import bytes_to_unicode

from common import labels, whisper
from common.cli import UserError
from common.ct2 import REQUIREMENTS

if TYPE_CHECKING:
    from pywhispercpp.model import Model

FILE_NAME = "ggml-model-f16.bin"
TYPES = ("f16",)
MAGIC = 0x67676D6C  # "ggml"
F32, F16 = 0, 1
VOCABULARIES = (51_864, 51_865, 51_866)  # English-only, multilingual, with Cantonese
TIMESTAMPS = 1501  # tokens after <|notimestamps|>
FFN_FACTOR = 4  # whisper.cpp knows no other width of the feed-forward layers
OPENAI_NAMES = {  # in transformers -> in openai/whisper, in the order of replacement
    "model.": "", ".layers.": ".blocks.",
    "self_attn_layer_norm": "attn_ln", "encoder_attn_layer_norm": "cross_attn_ln",
    "self_attn": "attn", "encoder_attn": "cross_attn",
    "q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out",
    "fc1": "mlp.0", "fc2": "mlp.2", "final_layer_norm": "mlp_ln",
    "encoder.layer_norm": "encoder.ln_post", "decoder.layer_norm": "decoder.ln",
    "embed_positions.weight": "positional_embedding", "embed_tokens": "token_embedding",
}  # fmt: skip


def check_installed() -> None:
    """Raise UserError unless pywhispercpp, which reads the file again, is installed."""
    if importlib.util.find_spec("pywhispercpp") is None:
        raise UserError(
            "--formats ggml: is checked with pywhispercpp 1.5, which is not installed: "
            f"pip install -r {REQUIREMENTS}"
        )


def check_model(model: WhisperForConditionalGeneration, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if whisper.cpp cannot read such a model, or would read it wrongly."""
    config, token_id = model.config, tokenizer.convert_tokens_to_ids
    widths = {config.encoder_ffn_dim, config.decoder_ffn_dim}
    end = VOCABULARIES[0] - 1608 + (config.vocab_size > VOCABULARIES[0])
    ids = [token_id(labels.END), token_id(labels.START), token_id(labels.NO_TIMESTAMPS)]
    reason = ""
    if config.vocab_size not in VOCABULARIES:
        reason = f"its vocabulary has {config.vocab_size} tokens, none of {VOCABULARIES}"
    elif ids != [end, end + 1, config.vocab_size - TIMESTAMPS - 1]:
        reason = "its special tokens have other ids than in Whisper"
    elif widths != {FFN_FACTOR * config.d_model}:
        reason = (
            f"its feed-forward layers are {sorted(widths)} wide, not {FFN_FACTOR * config.d_model}"
        )
    elif not torch.equal(model.proj_out.weight, model.model.decoder.embed_tokens.weight):
        reason = "its output layer is not its token embedding: an adapter changed one of the two"
    if reason:
        raise UserError(
            f"--formats ggml: whisper.cpp cannot run this model ({reason}): leave it out"
        )


# ------ write


def write(
    file: Path, model: WhisperForConditionalGeneration, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write the file: matrices in 16 bits, vectors and positions in 32."""
    config, filters = model.config, whisper.mel_filters(model.config.num_mel_bins, CPU)
    sizes = (
        config.vocab_size,
        config.max_source_positions, config.d_model,
        config.encoder_attention_heads, config.encoder_layers,
        config.max_target_positions, config.d_model,
        config.decoder_attention_heads, config.decoder_layers,
        config.num_mel_bins, F16,
    )  # fmt: skip
    end = tokenizer.convert_tokens_to_ids(labels.END)
    byte_of = {sign: byte for byte, sign in bytes_to_unicode().items()}
    with file.open("wb") as out:
        _write_numbers(out, MAGIC, *sizes, *filters.shape)
        out.write(filters.numpy().astype("<f4").tobytes())
        _write_numbers(out, end)
        for token in tokenizer.convert_ids_to_tokens(range(end)):
            content = bytes(byte_of[sign] for sign in token)
            _write_numbers(out, len(content))
            out.write(content)
        for name, tensor in model.state_dict().items():
            if name != "proj_out.weight":  # the token embedding
                _write_tensor(out, name, tensor)


CPU = torch.device("cpu")


def _write_numbers(out: BinaryIO, *numbers: int) -> None:
    out.write(struct.pack(f"<{len(numbers)}i", *numbers))


def _write_tensor(out: BinaryIO, name: str, tensor: torch.Tensor) -> None:
    for theirs, own in OPENAI_NAMES.items():
        name = name.replace(theirs, own)
    is_conv_bias = name.endswith(("conv1.bias", "conv2.bias"))
    values = tensor.numpy()[:, None] if is_conv_bias else tensor.numpy()
    is_small = tensor.ndim == 1 or name.endswith("positional_embedding")
    _write_numbers(out, values.ndim, len(name), F32 if is_small else F16)
    _write_numbers(out, *reversed(values.shape))
    out.write(name.encode())
    out.write(values.astype("<f4" if is_small else "<f2").tobytes())


# ------ read


def load(file: Path, *, flash_attention: bool) -> "Model":
    """The file, loaded by whisper.cpp.

    Args:
        flash_attention: whisper.cpp's default. It rounds the window up to a multiple of 256
            positions and attends to those that it adds: the shorter the window, the more.
    """
    from pywhispercpp.model import Model

    return Model(
        str(file),
        redirect_whispercpp_logs_to=None,
        context_params={"flash_attn": flash_attention},
        n_threads=torch.get_num_threads(),
        no_timestamps=True,
        single_segment=True,
        no_context=True,
        temperature_inc=0.0,  # no second attempts by sampling
        greedy={"best_of": 1},
        print_progress=False,
        print_timestamps=False,
    )


def transcribe(
    engine: "Model", samples: np.ndarray, *, window: int, language: str, task: str, cap: int
) -> str:
    """The text of a clip.

    Args:
        samples: int16 (N,).
        window: encoder positions (whisper.cpp's `audio_ctx`).
        language: code.
        cap: most tokens.
    """
    options: dict[str, Any] = {"language": language, "translate": task == "translate"}
    segments = engine.transcribe(
        samples.astype(np.float32) / 32_768, audio_ctx=window, max_tokens=cap, **options
    )
    return " ".join(segment.text for segment in segments).strip()
