"""common/labels.py: the prompt, English-only tokenizers, and whether two tokenizers agree."""

import json
from types import SimpleNamespace

import pytest
from tiny import make_tokenizer

from common import labels


@pytest.mark.parametrize("task", labels.TASKS)
def test_the_prompt_is_start_language_task_and_no_timestamps(checkpoint, task):
    tokenizer = labels.load_tokenizer(str(checkpoint))
    ids = labels.prompt(tokenizer, "mr", task)
    tokens = ["<|startoftranscript|>", "<|mr|>", f"<|{task}|>", "<|notimestamps|>"]
    assert tokenizer.convert_ids_to_tokens(ids) == tokens
    assert labels.num_prompt_tokens(tokenizer) == len(ids)
    assert labels.make_labels(tokenizer, "x", "mr", task)[: len(ids)] == ids


@pytest.mark.parametrize(
    ("language", "task", "text", "spelled"),
    [
        ("mr", "transcribe", "एक दोन", " एक दोन"),
        ("zh", "transcribe", "今天", "今天"),
        ("zh", "translate", "today", " today"),
        ("mr", "transcribe", "", ""),
    ],
)
def test_a_text_begins_with_a_space_unless_its_language_is_written_without(
    checkpoint, language, task, text, spelled
):
    tokenizer = labels.load_tokenizer(str(checkpoint))
    ids = labels.make_labels(tokenizer, text, language, task)[labels.PROMPT_LENGTH : -1]
    assert tokenizer.decode(ids) == spelled


def test_the_prompt_of_an_english_only_model_is_start_and_no_timestamps(english_model):
    tokenizer = labels.load_tokenizer(english_model)
    ids = labels.prompt(tokenizer, "en", "transcribe")
    tokens = ["<|startoftranscript|>", "<|notimestamps|>"]
    assert tokenizer.convert_ids_to_tokens(ids) == tokens
    assert labels.num_prompt_tokens(tokenizer) == len(ids)


def test_a_tokenizer_that_ends_at_50256_is_english_only_though_it_has_language_tokens():
    ids = {labels.END: 50_256, "<|transcribe|>": 50_358, "<|hi|>": 50_275}
    names = {index: name for name, index in ids.items()}
    tokenizer = SimpleNamespace(
        convert_tokens_to_ids=lambda name: ids.get(name, 50_256),
        convert_ids_to_tokens=names.__getitem__,
    )
    assert labels.is_english_only(tokenizer)
    assert not labels.has_language(tokenizer, "hi")


def altered_tokenizer(folder, change):
    make_tokenizer(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return labels.load_tokenizer(str(folder))


def add_timestamps(content):
    first = max(token["id"] for token in content["added_tokens"]) + 1
    template = content["added_tokens"][-1]
    for index in range(20):
        token = {**template, "id": first + index, "content": f"<|{index / 50:.2f}|>"}
        content["added_tokens"].append(token)


def respell(content):
    names = {"<|he|>": "<|iw|>", "<|nospeech|>": "<|nocaptions|>"}
    for token in content["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])


def insert_language(content):
    template = content["added_tokens"][-1]
    content["added_tokens"] = [
        {**token, "id": token["id"] + (token["content"] == "<|notimestamps|>")}
        for token in content["added_tokens"]
    ]
    content["added_tokens"].insert(
        -1, {**template, "id": content["added_tokens"][-1]["id"] - 1, "content": "<|yue|>"}
    )


def test_the_fingerprint_is_equal_for_equal_labels_and_differs_otherwise(tmp_path, checkpoint):
    expected = labels.tokenizer_fingerprint(labels.load_tokenizer(str(checkpoint)))
    with_timestamps = altered_tokenizer(tmp_path / "timestamps", add_timestamps)
    respelt = altered_tokenizer(tmp_path / "respelt", respell)
    inserted = altered_tokenizer(tmp_path / "inserted", insert_language)
    assert len(expected) == 16
    assert labels.tokenizer_fingerprint(with_timestamps) == expected
    assert labels.tokenizer_fingerprint(respelt) == expected
    assert labels.tokenizer_fingerprint(inserted) != expected
    assert labels.make_labels(respelt, "x", "he", "transcribe") == labels.make_labels(
        labels.load_tokenizer(str(checkpoint)), "x", "he", "transcribe"
    )
