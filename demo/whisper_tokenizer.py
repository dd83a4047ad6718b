"""The tokenizer files of multilingual Whisper, rebuilt from a faster-whisper `tokenizer.json`."""

from pathlib import Path
from typing import Any

from common import cli, files
from conversion.hf import tokenizer_config

END_OF_TEXT = 50257  # the first id after the 50,257 byte-level BPE tokens
EMPTY_TOKEN = 50256  # GPT-2's own <|endoftext|>, unused and named "" in the multilingual vocabulary
NUM_MERGES = 50_000
NUM_TIMESTAMPS = 1501  # 0.00 to 30.00 s in steps of 0.02 s
NUM_FIXED_SPECIALS = 8  # <|endoftext|>, <|startoftranscript|> and the six of TASKS
SPACE_T = "\u0120 t"  # the first merge of GPT-2's list

LANGUAGES = (
    "en zh de es ru ko fr ja pt tr pl ca nl ar sv it id hi fi vi he uk el ms cs ro da hu ta no th "
    "ur hr bg lt la mi ml cy sk te fa lv bn sr az sl kn et mk br eu is hy ne mn bs kk sq sw gl mr "
    "pa si km sn yo so af oc ka be tg sd gu am yi lo uz fo ht ps tk nn mt sa lb my bo tl mg as tt "
    "haw ln ha ba jw su yue"
)  # in the order of their token ids; yue came with large-v3
TASKS = (
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
)
OTHER_SPELLINGS = {"<|he|>": "<|iw|>", "<|nospeech|>": "<|nocaptions|>"}  # of older uploads


def list_added_tokens(vocab_size: int, tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    """Every token after the BPE ones, in the order of their ids.

    Timestamps are ordinary added tokens, as in OpenAI's own upload, so `skip_special_tokens` leaves
    them to the decoder. Where `tokenizer` spells a token in another known way, its spelling stays.

    Raises:
        UserError: an English-only vocabulary, or tokens that are not Whisper's.
    """
    num_languages = vocab_size - END_OF_TEXT - NUM_FIXED_SPECIALS - NUM_TIMESTAMPS
    known_languages = LANGUAGES.split()
    if not 99 <= num_languages <= len(known_languages):
        raise cli.UserError(
            f"a vocabulary of {vocab_size} tokens is not multilingual Whisper's: "
            "give a multilingual model"
        )
    languages = [f"<|{language}|>" for language in known_languages[:num_languages]]
    specials = ["<|endoftext|>", "<|startoftranscript|>", *languages, *TASKS]
    timestamps = [f"<|{index * 0.02:.2f}|>" for index in range(NUM_TIMESTAMPS)]
    spelled = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    added_tokens = []
    for token_id, expected in enumerate(specials + timestamps, start=END_OF_TEXT):
        content = spelled.get(token_id, expected)
        if content not in (expected, OTHER_SPELLINGS.get(expected)):
            raise cli.UserError(
                f"tokenizer.json calls token {token_id} {content}, Whisper {expected}: "
                "give the model's own tokenizer.json"
            )
        added_tokens.append(
            {
                "id": token_id,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": token_id >= END_OF_TEXT + len(specials),
                "special": token_id < END_OF_TEXT + len(specials),
            }
        )
    return added_tokens


def read_bpe(tokenizer: dict[str, Any]) -> tuple[dict[str, int], list[str]]:
    """Vocabulary with `<|endoftext|>`, and merges as "left right".

    The widespread conversion lacks the first merge, without which " t..." words split wrongly.

    Raises:
        UserError: ids or merges are missing.
    """
    vocab = {**tokenizer["model"]["vocab"], "<|endoftext|>": END_OF_TEXT}
    vocab.setdefault("", EMPTY_TOKEN)
    merges = [
        merge if isinstance(merge, str) else " ".join(merge)
        for merge in tokenizer["model"]["merges"]
    ]
    if merges[0] != SPACE_T:
        merges.insert(0, SPACE_T)
    missing = set(range(END_OF_TEXT + 1)) - set(vocab.values())
    if missing or len(merges) != NUM_MERGES:
        raise cli.UserError(
            f"tokenizer.json lacks {len(missing)} ids and has {len(merges)} merges instead of "
            f"{NUM_MERGES}: give the model's own tokenizer.json"
        )
    return vocab, merges


def write_tokenizer(
    output_dir: Path, tokenizer: dict[str, Any], added_tokens: list[dict[str, Any]]
) -> None:
    """Write the fast tokenizer and the files of the slow one."""
    vocab, merges = read_bpe(tokenizer)
    special_tokens = {
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>"),
        "additional_special_tokens": [t["content"] for t in added_tokens if t["special"]],
    }
    added_ids = {token["content"]: token["id"] for token in added_tokens[1:]}
    fast = fast_tokenizer(vocab, merges, added_tokens)
    files.write_json(output_dir / "tokenizer.json", fast, indent=None)
    files.write_json(output_dir / "vocab.json", vocab, indent=None)
    (output_dir / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8"
    )
    files.write_json(output_dir / "added_tokens.json", added_ids, indent=0)
    files.write_json(output_dir / "special_tokens_map.json", special_tokens, indent=1)
    settings = tokenizer_config({token["id"]: token for token in added_tokens}) | special_tokens
    files.write_json(output_dir / "tokenizer_config.json", settings, indent=1)


def fast_tokenizer(
    vocab: dict[str, int], merges: list[str], added_tokens: list[dict[str, Any]]
) -> dict[str, Any]:
    """tokenizer.json: byte-level BPE between start and end tokens."""
    ids = {token["content"]: token["id"] for token in added_tokens}
    start, no_timestamps, end = "<|startoftranscript|>", "<|notimestamps|>", "<|endoftext|>"
    prefix = [{"SpecialToken": {"id": token, "type_id": 0}} for token in (start, no_timestamps)]
    suffix = [{"SpecialToken": {"id": end, "type_id": 0}}]
    first, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "add_prefix_space": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*prefix, first, *suffix],
            "pair": [*prefix, first, second, *suffix],
            "special_tokens": {
                token: {"id": token, "ids": [ids[token]], "tokens": [token]}
                for token in (start, no_timestamps, end)
            },
        },
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
