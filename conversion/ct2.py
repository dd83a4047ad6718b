"""A CTranslate2 folder, for faster-whisper, WhisperX and transcribe.py."""

import shutil
from pathlib import Path

TYPES = ("float32", "int8")  # of weights
READ_BESIDE = (  # by programs that load the folder
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "normalizer.json", "preprocessor_config.json",
    "generation_config.json",
)  # fmt: skip


def write(folder: Path, hf_folder: Path, weight_type: str) -> None:
    """Convert a Hugging Face folder.

    Args:
        weight_type: one of TYPES.
    """
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(hf_folder)).convert(str(folder), quantization=weight_type)
    for name in READ_BESIDE:
        if (hf_folder / name).is_file():
            shutil.copyfile(hf_folder / name, folder / name)
