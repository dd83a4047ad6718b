"""Labels: the prompt, the transcript's ids and the end token; and whether two tokenizers agree.

Labels are `<|startoftranscript|> <|lang|> <|task|> <|notimestamps|> text <|endoftext|>`. An
English-only model knows neither languages nor tasks: `<|startoftranscript|> <|notimestamps|> text
<|endoftext|>`. As in Whisper's own training data, a text begins with a space, but in languages
written without spaces, whose texts a base model begins without one (docs/results.md). Ids are
looked up by name, never by position, because the three published vocabularies (51,864, 51,865 and
51,866 tokens) place them differently.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from common.cli import UserError, first_line
from common.languages import ALIASES, NO_SPACES, language_code

T = TypeVar("T", str, int)  # a token's name or its id

VERSION = 2  # of labels; before 2 no text began with a space
MAX_LABELS = 448  # positions of the decoder
PROMPT_LENGTH = 4  # tokens of the prompt of a multilingual model
ENGLISH_ONLY_END = 50_256  # <|endoftext|> of the 51,864-token vocabulary, which is GPT-2's
START, END, NO_TIMESTAMPS = "<|startoftranscript|>", "<|endoftext|>", "<|notimestamps|>"
TASKS = ("transcribe", "translate")
SPECIAL = re.compile(r"<\|[^|]*\|>")


# ------ tokens


def _language_token(tokenizer: PreTrainedTokenizerBase, code: str) -> str:
    """`<|code|>` as this tokenizer spells it, or `""` if it lacks the language."""
    spellings = [code, *(old for old, new in ALIASES.items() if new == code)]
    return next((f"<|{word}|>" for word in spellings if _knows(tokenizer, f"<|{word}|>")), "")


def _knows(tokenizer: PreTrainedTokenizerBase, token: str) -> bool:
    """Whether `token` has an id of its own, without `get_vocab`, which copies 50,000 entries."""
    token_id = tokenizer.convert_tokens_to_ids(token)
    return token_id is not None and tokenizer.convert_ids_to_tokens(token_id) == token


def has_language(tokenizer: PreTrainedTokenizerBase, code: str) -> bool:
    """Whether labels can be made in a language; Cantonese, for one, came with large-v3."""
    if is_english_only(tokenizer):
        return code in ("", "en")
    return bool(code and _language_token(tokenizer, code))


# ------ tokenizer


def load_tokenizer(
    model: str,
    language: str = "",
    task: str = "transcribe",
    *,
    model_option: str = "--model",
    language_option: str = "--language",
    task_option: str = "--task",
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer from a local folder or the Hub.

    Args:
        model: folder or Hub id.
        language: code or name, which the tokenizer must know; `""`: not known yet.
        task: `transcribe` or `translate`.
        model_option, language_option, task_option: named in error messages.

    Raises:
        UserError: the model does not exist or is not a Whisper model, or it does not know the
            language or the task.
    """
    if task not in TASKS:
        raise UserError(f"{task_option} {task!r} is not a task: give transcribe or translate")
    code = language_code(language, language_option) if language else ""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(_cannot_load(model, model_option, error)) from error
    missing = [token for token in (START, END, NO_TIMESTAMPS) if not _knows(tokenizer, token)]
    if missing:
        raise UserError(
            f"{model_option} {model} is not a Whisper model (its tokenizer lacks {missing[0]}): "
            "give one such as openai/whisper-small"
        )
    is_other_language = code not in ("", "en")
    if is_english_only(tokenizer) and (is_other_language or task == "translate"):
        option = f"{language_option} {language}" if is_other_language else f"{task_option} {task}"
        raise UserError(
            f"{model_option} {model} is English-only and cannot take {option}: "
            "give a multilingual model (no .en at the end of its name)"
        )
    if code and not has_language(tokenizer, code):
        raise UserError(
            f"{language_option} {language} ({code}) is not among the languages of "
            f"{model_option} {model}: give a model that has it (yue needs openai/whisper-large-v3)"
        )
    return tokenizer


def _cannot_load(model: str, option: str, error: Exception) -> str:
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
    if Path(model).is_dir():
        return (
            f"{option} {model} holds no tokenizer that loads ({first_line(error)}): "
            "give a Whisper checkpoint"
        )
    if looks_local:
        return f"{option} {model} does not exist: give a checkpoint folder or a Hub id"
    return (
        f"{option} {model} is neither a local folder nor a model the Hub gives us: check the name, "
        "the network and HF_TOKEN, or give a local checkpoint folder"
    )


def is_english_only(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this is the tokenizer of a `.en` model, whose prompt has no language and no task."""
    end = tokenizer.convert_tokens_to_ids(END)
    return end == ENGLISH_ONLY_END or not _knows(tokenizer, "<|transcribe|>")


# ------ labels


def prompt(tokenizer: PreTrainedTokenizerBase, language: str, task: str) -> list[int]:
    """The ids before the text of labels; those that decoding starts with are laid out alike.

    Args:
        tokenizer: of a Whisper model.
        language: a code that `has_language` accepts.
        task: `transcribe` or `translate`; both are unused by an English-only tokenizer.

    Returns:
        Start of transcript, language, task and no-timestamps; English-only: start of transcript
        and no-timestamps.
    """
    asked = (
        () if is_english_only(tokenizer) else (_language_token(tokenizer, language), f"<|{task}|>")
    )
    return tokenizer.convert_tokens_to_ids(prompt_layout(START, NO_TIMESTAMPS, asked))


def prompt_layout(start: T, no_timestamps: T, language_and_task: Sequence[T] = ()) -> list[T]:
    """The order of a prompt's tokens, of their names or their ids.

    Args:
        language_and_task: empty for an English-only model, which has neither.
    """
    return [start, *language_and_task, no_timestamps]


def num_prompt_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Length of the prompt: 4, or 2 for an English-only tokenizer."""
    return len(prompt(tokenizer, "en", "transcribe"))


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, language: str, task: str) -> list[int]:
    """The ids of a text alone, with a space before it unless its language is written without."""
    is_spaced = text and (task == "translate" or language not in NO_SPACES)
    return tokenizer(f" {text}" if is_spaced else text, add_special_tokens=False).input_ids


def make_labels(
    tokenizer: PreTrainedTokenizerBase, text: str, language: str, task: str
) -> list[int]:
    """Label ids of a transcript.

    Args:
        tokenizer, language, task: as in `prompt`.
        text: the transcript.

    Returns:
        The prompt's ids, the text's as `text_ids` gives them, and the end id.

    Raises:
        ValueError: `text` spells a special token, which the model would take for the real one.
    """
    special = SPECIAL.search(text)
    if special and _knows(tokenizer, special[0]):
        raise ValueError(f"the text spells the special token {special[0]}")
    ids = text_ids(tokenizer, text, language, task)
    return [*prompt(tokenizer, language, task), *ids, tokenizer.convert_tokens_to_ids(END)]


# ------ whether two tokenizers agree


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Sixteen hex digits that are equal for two tokenizers that make the same labels.

    They cover the ids of the text vocabulary, the start, end, task and no-timestamps tokens and the
    languages. They do not cover timestamps, `<|nospeech|>` or the spelling of Hebrew's token, in
    which published copies of the same tokenizer differ.
    """
    vocabulary = tokenizer.get_vocab()
    text = {token: index for token, index in vocabulary.items() if not SPECIAL.fullmatch(token)}
    used = {START, END, NO_TIMESTAMPS, *(f"<|{task}|>" for task in TASKS)}
    special = {token: index for token, index in vocabulary.items() if token in used}
    for token, index in vocabulary.items():
        code = ALIASES.get(token[2:-2], token[2:-2])
        if SPECIAL.fullmatch(token) and code in LANGUAGES:
            special[f"<|{code}|>"] = index
    content = json.dumps([sorted(text.items()), sorted(special.items())], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
