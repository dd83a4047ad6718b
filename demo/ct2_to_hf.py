"""A CTranslate2 (faster-whisper) model of multilingual Whisper -> a Hugging Face checkpoint.

`model.bin`, all integers little-endian:

    u32 binary version, text spec, u32 revision,
    u32 count, count x {text name, u8 rank, rank x u32 dimension, u8 dtype, u32 num_bytes, bytes},
    u32 count, count x {text alias, text name}

where text is a u16 length that counts the closing NUL, the bytes, the NUL.

Legend: D model width, V vocabulary.
"""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from common import cli, files
from demo import whisper_tokenizer

MIN_BINARY_VERSION = 6  # the first that the layout above describes
SPEC = "WhisperSpec"
DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}

MAX_LENGTH = 448  # decoder positions of every Whisper
MAX_INITIAL_TIMESTAMP = 50  # 1.00 s

PREPROCESSOR = {
    "chunk_length": 30,
    "feature_extractor_type": "WhisperFeatureExtractor",
    "hop_length": 160,
    "n_fft": 400,
    "n_samples": 480_000,
    "nb_max_frames": 3000,
    "padding_side": "right",
    "padding_value": 0.0,
    "processor_class": "WhisperProcessor",
    "return_attention_mask": False,
    "sampling_rate": 16_000,
}


def convert(ct2_dir: Path, output_dir: Path) -> int:
    """Write the checkpoint of `ct2_dir` (model.bin, config.json, tokenizer.json) to `output_dir`.

    Returns:
        the number of parameters.

    Raises:
        UserError: a file is damaged, or not a float16 or float32 multilingual Whisper.
    """
    variables = read_ct2(ct2_dir / "model.bin")
    tensors = rename(variables)
    ct2_config = json.loads((ct2_dir / "config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((ct2_dir / "tokenizer.json").read_text(encoding="utf-8"))
    config = model_config(tensors, num_heads=int(variables["encoder/num_heads"]))
    added_tokens = whisper_tokenizer.list_added_tokens(config["vocab_size"], tokenizer)
    generation = generation_config(ct2_config, added_tokens)
    preprocessor = {**PREPROCESSOR, "feature_size": config["num_mel_bins"]}

    (output_dir / "model.safetensors").write_bytes(
        safetensors.numpy.save(tensors, metadata={"format": "pt"})
    )
    files.write_json(output_dir / "config.json", config)
    files.write_json(output_dir / "generation_config.json", generation)
    files.write_json(output_dir / "preprocessor_config.json", preprocessor)
    whisper_tokenizer.write_tokenizer(output_dir, tokenizer, added_tokens)
    return sum(tensor.size for tensor in tensors.values())


# ------ tensors


class Reader:
    """Takes little-endian values off a file's bytes, one after the other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path.read_bytes()
        self.position = 0

    def take_bytes(self, num_bytes: int) -> bytes:
        taken = self.data[self.position : self.position + num_bytes]
        if len(taken) != num_bytes:
            raise cli.UserError(
                f"{self.path} ends at byte {len(self.data)}, in the middle of its content: "
                "get the file again"
            )
        self.position += num_bytes
        return taken

    def take(self, code: str) -> int:
        """Take one integer, `code` being its struct letter."""
        return struct.unpack("<" + code, self.take_bytes(struct.calcsize(code)))[0]

    def take_text(self) -> str:
        return self.take_bytes(self.take("H"))[:-1].decode()


def read_ct2(path: Path) -> dict[str, np.ndarray]:
    """Read every variable and alias of a CTranslate2 `model.bin`.

    Raises:
        UserError: not a Whisper of a known binary version, quantised, cut short, or too long.
    """
    reader = Reader(path)
    version, spec = reader.take("I"), reader.take_text()
    reader.take("I")  # revision of the spec: all of them name the weights alike
    if version < MIN_BINARY_VERSION or spec != SPEC:
        raise cli.UserError(
            f"{path} is a {spec} of binary version {version}: give a {SPEC} of version "
            f"{MIN_BINARY_VERSION} or later"
        )
    variables = {}
    for _ in range(reader.take("I")):
        name, shape = reader.take_text(), [reader.take("I") for _ in range(reader.take("B"))]
        code = reader.take("B")
        raw = reader.take_bytes(reader.take("I"))
        if code not in DTYPES or name.endswith("_scale"):
            raise cli.UserError(
                f"{path}: {name} is neither float16 nor float32: give a model that is"
            )
        variables[name] = np.frombuffer(raw, DTYPES[code]).reshape(shape)
    for _ in range(reader.take("I")):
        alias, name = reader.take_text(), reader.take_text()
        variables[alias] = variables[name]
    if reader.position != len(reader.data):
        raise cli.UserError(f"{path} goes on after its last alias: get the file again")
    return variables


def rename(variables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Give CTranslate2's variables transformers' names, as float16; fused projections are split."""
    tensors = {
        "model.decoder.embed_tokens.weight": variables["decoder/embeddings/weight"],  # (V, D)
        **linear(variables, "encoder/conv1", "model.encoder.conv1"),
        **linear(variables, "encoder/conv2", "model.encoder.conv2"),
    }
    for side in ("encoder", "decoder"):
        positions = variables[f"{side}/position_encodings/encodings"]
        tensors[f"model.{side}.embed_positions.weight"] = positions
        tensors |= norm(variables, f"{side}/layer_norm", f"model.{side}.layer_norm")
        index = 0
        while f"{side}/layer_{index}/ffn/linear_0/weight" in variables:
            source, target = f"{side}/layer_{index}", f"model.{side}.layers.{index}"
            tensors |= rename_layer(variables, source, target)
            if side == "decoder":
                tensors |= rename_cross_attention(variables, source, target)
            index += 1
    return {name: tensor.astype(np.float16, order="C") for name, tensor in tensors.items()}


def rename_layer(
    variables: dict[str, np.ndarray], source: str, target: str
) -> dict[str, np.ndarray]:
    """Self-attention and feed-forward network of one layer, either side."""
    attention, network = f"{source}/self_attention", f"{source}/ffn"
    return {
        **norm(variables, f"{attention}/layer_norm", f"{target}.self_attn_layer_norm"),
        **split(variables, f"{attention}/linear_0", f"{target}.self_attn", "q_proj k_proj v_proj"),
        **linear(variables, f"{attention}/linear_1", f"{target}.self_attn.out_proj"),
        **norm(variables, f"{network}/layer_norm", f"{target}.final_layer_norm"),
        **linear(variables, f"{network}/linear_0", f"{target}.fc1"),
        **linear(variables, f"{network}/linear_1", f"{target}.fc2"),
    }


def rename_cross_attention(
    variables: dict[str, np.ndarray], source: str, target: str
) -> dict[str, np.ndarray]:
    """Attention of one decoder layer to the encoder."""
    attention = f"{source}/attention"
    return {
        **norm(variables, f"{attention}/layer_norm", f"{target}.encoder_attn_layer_norm"),
        **linear(variables, f"{attention}/linear_0", f"{target}.encoder_attn.q_proj"),
        **split(variables, f"{attention}/linear_1", f"{target}.encoder_attn", "k_proj v_proj"),
        **linear(variables, f"{attention}/linear_2", f"{target}.encoder_attn.out_proj"),
    }


def norm(variables: dict[str, np.ndarray], source: str, target: str) -> dict[str, np.ndarray]:
    return {
        f"{target}.weight": variables[f"{source}/gamma"],
        f"{target}.bias": variables[f"{source}/beta"],
    }


def linear(variables: dict[str, np.ndarray], source: str, target: str) -> dict[str, np.ndarray]:
    return {
        f"{target}.weight": variables[f"{source}/weight"],
        f"{target}.bias": variables[f"{source}/bias"],
    }


def split(
    variables: dict[str, np.ndarray], source: str, target: str, parts: str
) -> dict[str, np.ndarray]:
    """Split projections that CTranslate2 stacks: weight (parts x D, D), bias (parts x D)."""
    names = parts.split()
    weights = np.split(variables[f"{source}/weight"], len(names))
    biases = np.split(variables[f"{source}/bias"], len(names))
    tensors = {}
    for name, weight, bias in zip(names, weights, biases, strict=True):
        tensors[f"{target}.{name}.weight"] = weight
        if name != "k_proj":
            tensors[f"{target}.{name}.bias"] = bias
        elif bias.any():  # Whisper's key projection has none, so there is nowhere to put it
            raise cli.UserError(f"{source} has a key bias: give a model converted from Whisper")
    return tensors


# ------ configs


def model_config(tensors: dict[str, np.ndarray], *, num_heads: int) -> dict[str, Any]:
    """config.json, its sizes read off the tensors."""
    vocab_size, width = tensors["model.decoder.embed_tokens.weight"].shape
    layers = {
        side: sum(name.startswith(f"model.{side}.") and ".fc1.weight" in name for name in tensors)
        for side in ("encoder", "decoder")
    }
    return {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "is_encoder_decoder": True,
        "vocab_size": vocab_size,
        "d_model": width,
        "num_hidden_layers": layers["encoder"],
        "encoder_layers": layers["encoder"],
        "encoder_attention_heads": num_heads,
        "encoder_ffn_dim": tensors["model.encoder.layers.0.fc1.weight"].shape[0],
        "decoder_layers": layers["decoder"],
        "decoder_attention_heads": num_heads,
        "decoder_ffn_dim": tensors["model.decoder.layers.0.fc1.weight"].shape[0],
        "num_mel_bins": tensors["model.encoder.conv1.weight"].shape[1],
        "max_source_positions": tensors["model.encoder.embed_positions.weight"].shape[0],
        "max_target_positions": tensors["model.decoder.embed_positions.weight"].shape[0],
        "activation_function": "gelu",
        "activation_dropout": 0.0,
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "init_std": 0.02,
        "scale_embedding": False,
        "use_cache": True,
        "tie_word_embeddings": True,
        "bos_token_id": whisper_tokenizer.END_OF_TEXT,
        "eos_token_id": whisper_tokenizer.END_OF_TEXT,
        "pad_token_id": whisper_tokenizer.END_OF_TEXT,
        "decoder_start_token_id": whisper_tokenizer.END_OF_TEXT + 1,
        "torch_dtype": "float16",
    }


def generation_config(
    ct2_config: dict[str, Any], added_tokens: list[dict[str, Any]]
) -> dict[str, Any]:
    """generation_config.json: the ids that decoding needs to know."""
    specials = [token for token in added_tokens if token["special"]]
    num_languages = len(specials) - whisper_tokenizer.NUM_FIXED_SPECIALS
    languages = specials[2 : 2 + num_languages]
    task_ids = {
        task: token["id"]
        for task, token in zip(whisper_tokenizer.TASKS, specials[2 + num_languages :], strict=True)
    }
    return {
        "alignment_heads": ct2_config["alignment_heads"],
        "begin_suppress_tokens": ct2_config["suppress_ids_begin"],
        "bos_token_id": whisper_tokenizer.END_OF_TEXT,
        "eos_token_id": whisper_tokenizer.END_OF_TEXT,
        "decoder_start_token_id": whisper_tokenizer.END_OF_TEXT + 1,
        "is_multilingual": True,
        "max_initial_timestamp_index": MAX_INITIAL_TIMESTAMP,
        "max_length": MAX_LENGTH,
        "no_timestamps_token_id": task_ids["<|notimestamps|>"],
        "pad_token_id": whisper_tokenizer.END_OF_TEXT,
        "prev_sot_token_id": task_ids["<|startofprev|>"],
        "return_timestamps": False,
        "suppress_tokens": ct2_config["suppress_ids"],
        "lang_to_id": {token["content"]: token["id"] for token in languages},
        "task_to_id": {
            "transcribe": task_ids["<|transcribe|>"],
            "translate": task_ids["<|translate|>"],
        },
    }
