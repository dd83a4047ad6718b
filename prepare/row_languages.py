"""The language of every row: --language, or the row's own column where that is empty."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from common import labels, languages
from common.cli import UserError
from prepare.reasons import NO_LANGUAGE, UNKNOWN_LANGUAGE
from prepare.rows import Row


def settle_languages(
    rows: Iterator[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    language: str,
    model: str,
    source_name: str,
) -> Iterator[Row]:
    """Yield the rows with their language as Whisper's code, or with a problem.

    Args:
        rows: rows of a source, with languages as it spells them.
        tokenizer: of `model`; it knows the languages that labels can have.
        language, model, source_name: options of preprocess.py, the latter --source.

    Raises:
        UserError: no rows; or the first row shows that no row will have a language.
    """
    first = next(rows, None)
    if first is None:
        raise UserError(f"--source {source_name} has no rows: give one with clips")
    _check_first(first, tokenizer, language, model, source_name)
    for row in itertools.chain([first], rows):
        yield _settle(row, tokenizer, language)


def _settle(row: Row, tokenizer: PreTrainedTokenizerBase, language: str) -> Row:
    default = "en" if labels.is_english_only(tokenizer) else ""
    name = language or row.language or default
    code = languages.find_code(name)
    if row.problem:
        return replace(row, language=code)
    if not name:
        detail = "neither the row nor --language says it"
        return replace(row, language=code, problem=NO_LANGUAGE, detail=detail)
    if not labels.has_language(tokenizer, code):
        return replace(row, language=code, problem=UNKNOWN_LANGUAGE, detail=name)
    return replace(row, language=code)


def _check_first(
    first: Row, tokenizer: PreTrainedTokenizerBase, language: str, model: str, source_name: str
) -> None:
    """Refuse a source whose first row has no language; print what else it shows."""
    settled = _settle(first, tokenizer, language)
    if settled.problem == NO_LANGUAGE:
        raise UserError(
            f"--language is empty and row 1 of --source {source_name} names none: "
            "give --language, such as --language hi"
        )
    is_unknown = settled.problem == UNKNOWN_LANGUAGE
    if is_unknown and labels.is_english_only(tokenizer):
        raise UserError(
            f"--model {model} is English-only, and row 1 of --source {source_name} is "
            f"in {settled.detail}: give a multilingual model (no .en at the end of its name)"
        )
    if is_unknown:
        print(
            f"warning: clips in {settled.detail}, such as row 1, are dropped, because --model "
            f"{model} does not know the language: "
            f"{languages.advice(settled.language or settled.detail)}"
        )
    own = languages.find_code(first.language)
    if language and first.language and own != languages.find_code(language):
        print(f"--language {language} is used for all rows, although row 1 says {first.language}")
