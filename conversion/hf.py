"""A folder as transformers writes it, and with the files that older versions and other tools read.

Transformers 5 writes a tokenizer as tokenizer.json and tokenizer_config.json alone, in a form that
transformers 4 does not read. The bytes depend on the model alone.
"""

import json
from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedTokenizerBase,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from common import labels, whisper
from common.files import write_json, write_text

TOKEN_FIELDS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


def write(
    folder: Path, model: WhisperForConditionalGeneration, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write model.safetensors and all that is read beside it.

    Args:
        model: with a complete generation config.
    """
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        if getattr(model.generation_config, name) is None:  # CTranslate2 wants a list
            setattr(model.generation_config, name, [])
    whisper.drop_unused_flags(model)
    model.save_pretrained(folder)  # in one file: shards begin at 50 GB
    extractor = WhisperFeatureExtractor(
        feature_size=model.config.num_mel_bins, processor_class="WhisperProcessor"
    )
    extractor.save_pretrained(folder)
    write_tokenizer(folder, tokenizer)


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a tokenizer for old and new readers."""
    tokenizer.save_pretrained(folder)
    fast = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary, merges = fast["model"]["vocab"], fast["model"]["merges"]
    # Pairs as lists are read by tokenizers 0.20 and newer only.
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    fast["model"]["merges"] = merges
    write_json(folder / "tokenizer.json", fast, indent=None)
    added = {token["id"]: token for token in fast["added_tokens"]}
    end = tokenizer.convert_tokens_to_ids(labels.END)
    if end == len(vocabulary):
        vocabulary = vocabulary | {labels.END: end}
    write_json(folder / "vocab.json", vocabulary, indent=None)
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
    beside = {own["content"]: token for token, own in added.items() if token != end}
    write_json(folder / "added_tokens.json", beside)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), labels.END)
    special |= {
        "additional_special_tokens": [own["content"] for own in added.values() if own["special"]]
    }
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", tokenizer_config(added) | special)
    spelling = getattr(tokenizer, "english_spelling_normalizer", None)
    if spelling:
        write_json(folder / "normalizer.json", spelling)


def tokenizer_config(added: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """tokenizer_config.json without the special tokens.

    Args:
        added: tokens of tokenizer.json by id.
    """
    return {
        "tokenizer_class": "WhisperTokenizer",
        "processor_class": "WhisperProcessor",
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 1024,
        "return_attention_mask": False,
        "added_tokens_decoder": {
            str(token): {field: own[field] for field in TOKEN_FIELDS}
            for token, own in added.items()
        },
    }
