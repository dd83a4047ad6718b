"""Transcript in, label ids out; and what makes two Whisper tokenizers the same.

A label row is `<|startoftranscript|> <|lang|> <|task|> <|notimestamps|> text <|endoftext|>`; an
English-only model knows neither languages nor tasks: `<|startoftranscript|> <|notimestamps|> text
<|endoftext|>`. The ids are looked up by name, never by position, because the three published
vocabularies (51,864, 51,865 and 51,866 tokens) place them differently.
"""

import difflib
import hashlib
import json
import re
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from common import languages
from common.cli import UserError
from common.languages import ALIASES

MAX_LABELS = 448  # the decoder's position table
ENGLISH_ONLY_END = 50_256  # <|endoftext|> of the 51,864-token vocabulary, which is GPT-2's
START, END, NO_TIMESTAMPS = "<|startoftranscript|>", "<|endoftext|>", "<|notimestamps|>"
TASKS = ("transcribe", "translate")
MISSPELT = 0.8  # likeness of names; Irish and yiddish have 0.67, marathy and marathi 0.86
LONGEST_CODE = 3  # letters: codes are all alike
SPECIAL = re.compile(r"<\|[^|]*\|>")


# ------ languages


def find_language(name: str) -> str:
    """Whisper's code for a code, a name or a locale; `""` where there is none."""
    return languages.find(name)


def language_code(name: str, option: str = "--language") -> str:
    """Whisper's code for `mr`, `Marathi` or `mr-IN`.

    Raises:
        UserError: no such language; advises a related one, or names that which was misspelt.
    """
    code = find_language(name)
    if code:
        return code
    raise UserError(f"{option} {name!r} is not a language Whisper knows: {advice(name)}")


def advice(name: str) -> str:
    """What to give for a language that Whisper lacks, or that nobody knows."""
    relative = languages.related(name)
    if relative:
        return f"it has no token; give that of a related language, such as {_spell(relative)}"
    known = [*LANGUAGES.values(), *TO_LANGUAGE_CODE]
    close = difflib.get_close_matches(languages.plain(name), known, n=1, cutoff=MISSPELT)
    if close and len(close[0]) > LONGEST_CODE:
        return f"did you mean {_spell(close[0])}?"
    return "give a code such as hi or a name such as hindi, for one that it lacks a related one's"


def _spell(known: str) -> str:
    code = TO_LANGUAGE_CODE.get(known, known)
    return f"{code} ({LANGUAGES[code]})"


def _language_token(tokenizer: PreTrainedTokenizerBase, code: str) -> str:
    """`<|code|>`, as this tokenizer spells it; `""` where it lacks the language."""
    spellings = [code, *(old for old, new in ALIASES.items() if new == code)]
    return next((f"<|{word}|>" for word in spellings if _knows(tokenizer, f"<|{word}|>")), "")


def _knows(tokenizer: PreTrainedTokenizerBase, token: str) -> bool:
    """Whether `token` has an id of its own; `get_vocab` would copy 50,000 entries to say so."""
    at = tokenizer.convert_tokens_to_ids(token)
    return at is not None and tokenizer.convert_ids_to_tokens(at) == token


def has_language(tokenizer: PreTrainedTokenizerBase, code: str) -> bool:
    """Whether labels can be made in this language (Cantonese, for one, came with large-v3)."""
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
        language: code or name; `""` where the rows say it.
        task: `transcribe` or `translate`.

    Raises:
        UserError: no such model, not a Whisper tokenizer, or a language or task it does not know.
    """
    if task not in TASKS:
        raise UserError(f"{task_option} {task!r} is not a task: give transcribe or translate")
    code = language_code(language, language_option) if language else ""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(_cannot_load(model, model_option, error)) from error
    missing = [name for name in (START, END, NO_TIMESTAMPS) if not _knows(tokenizer, name)]
    if missing:
        raise UserError(
            f"{model_option} {model} is not a Whisper model (its tokenizer lacks {missing[0]}): "
            "give one such as openai/whisper-small"
        )
    if is_english_only(tokenizer) and (code not in ("", "en") or task == "translate"):
        wrong = (
            f"{language_option} {language}" if code not in ("", "en") else f"{task_option} {task}"
        )
        raise UserError(
            f"{model_option} {model} is English-only and cannot take {wrong}: "
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
        reason = (str(error).splitlines() or [""])[0]
        return (
            f"{option} {model} holds no tokenizer that loads ({reason}): give a Whisper checkpoint"
        )
    if looks_local:
        return f"{option} {model} does not exist: give a checkpoint folder or a Hub id"
    return (
        f"{option} {model} is neither a folder here nor a model the Hub gives us: check the name, "
        "the network and HF_TOKEN, or give a local checkpoint folder"
    )


def is_english_only(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this is the tokenizer of a `.en` model, whose labels name no language and no task."""
    end = tokenizer.convert_tokens_to_ids(END)
    return end == ENGLISH_ONLY_END or not _knows(tokenizer, "<|transcribe|>")


def decoder_start_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id every label row begins with: `<|startoftranscript|>`, which is not `bos_token_id`."""
    return tokenizer.convert_tokens_to_ids(START)


def make_labels(
    tokenizer: PreTrainedTokenizerBase, text: str, language: str, task: str
) -> list[int]:
    """Label ids of a transcript.

    Args:
        text: the transcript.
        language: a code that `has_language` accepts.
        task: `transcribe` or `translate`; both are unused by an English-only tokenizer.

    Returns:
        start, language, task and no-timestamps ids, the text's, and the end id.

    Raises:
        ValueError: `text` spells a special token, which the model would take for the real one.
    """
    special = SPECIAL.search(text)
    if special and _knows(tokenizer, special[0]):
        raise ValueError(f"the text spells the special token {special[0]}")
    names = [START, _language_token(tokenizer, language), f"<|{task}|>", NO_TIMESTAMPS]
    if is_english_only(tokenizer):
        names = [START, NO_TIMESTAMPS]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return [*tokenizer.convert_tokens_to_ids(names), *ids, tokenizer.convert_tokens_to_ids(END)]


def num_prompt_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Labels before the text: 4, or 2 for an English-only tokenizer."""
    return 2 if is_english_only(tokenizer) else 4


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Sixteen hex digits that are equal where two tokenizers write the same labels.

    It covers the ids of the text vocabulary, the start, end, task and no-timestamps tokens and the
    languages; not the timestamps, `<|nospeech|>` or the spelling of Hebrew, in which published
    copies of one tokenizer differ.
    """
    vocabulary = tokenizer.get_vocab()
    text = {name: at for name, at in vocabulary.items() if not SPECIAL.fullmatch(name)}
    wanted = {START, END, NO_TIMESTAMPS, *(f"<|{task}|>" for task in TASKS)}
    special = {name: at for name, at in vocabulary.items() if name in wanted}
    for name, at in vocabulary.items():
        code = ALIASES.get(name[2:-2], name[2:-2])
        if SPECIAL.fullmatch(name) and code in LANGUAGES:
            special[f"<|{code}|>"] = at
    content = json.dumps([sorted(text.items()), sorted(special.items())], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
