"""Label invariants, each of which is a bug in most public Whisper scripts."""

import pytest
import tiny

from common import audio, labels
from common.collator import IGNORED, SpeechCollator


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return labels.load_tokenizer(str(checkpoint), "mr")


def rows_of(tokenizer, texts):
    return [
        {
            "id": f"clip{i}",
            "audio": audio.encode_flac(tiny.tone(1.0 + i, pitch=200)),
            "labels": labels.make_labels(tokenizer, text, "mr", "transcribe"),
        }
        for i, text in enumerate(texts)
    ]


def collate(tokenizer, texts, **shape):
    collator = SpeechCollator(tiny.START, tiny.END)
    return collator(rows_of(tokenizer, texts), **({"window": 250, "label_length": 60} | shape))


def test_decoder_inputs_have_one_start_token_and_are_the_labels_shifted(tokenizer):
    batch = collate(tokenizer, ["एक", "दोन घर"])
    inputs, targets = batch["decoder_input_ids"], batch["labels"]

    assert (inputs[:, 0] == tiny.START).all()
    assert ((inputs == tiny.START).sum(dim=1) == 1).all()
    assert (targets != tiny.START).all()
    in_loss = targets[:, :-1] != IGNORED
    assert (inputs[:, 1:][in_loss] == targets[:, :-1][in_loss]).all()


def test_the_end_token_is_in_the_loss_once_and_padding_is_not(tokenizer):
    rows = rows_of(tokenizer, ["एक", "दोन घर"])
    targets = collate(tokenizer, ["एक", "दोन घर"])["labels"]
    for row, target in zip(rows, targets, strict=True):
        kept = target[target != IGNORED]
        assert kept.tolist() == row["labels"][1:]
        assert kept[-1] == tiny.END, "the model would never learn to stop"
        assert (kept == tiny.END).sum() == 1
        assert (target[len(kept) :] == IGNORED).all()


def test_the_first_labels_are_language_task_and_no_timestamps(tokenizer):
    first = collate(tokenizer, ["एक"])["labels"][0, :3]
    names = ["<|mr|>", "<|transcribe|>", "<|notimestamps|>"]
    assert tokenizer.convert_ids_to_tokens(first.tolist()) == names


def test_a_label_row_without_start_token_is_an_error_naming_the_clip(tokenizer):
    rows = rows_of(tokenizer, ["एक"])
    rows[0]["labels"] = rows[0]["labels"][1:]
    with pytest.raises(ValueError, match="clip0"):
        SpeechCollator(tiny.START, tiny.END)(rows, window=250, label_length=60)


def test_after_a_clip_comes_silence_up_to_the_window(tokenizer):
    waves = collate(tokenizer, ["एक", "दोन"])["waves"]
    stored = audio.decode_flac(audio.encode_flac(tiny.tone(1.0, pitch=200)))
    assert waves.shape == (2, 250 * 320)
    assert (waves[0, :16_000].numpy() == stored).all()
    assert (waves[0, 16_000:] == 0).all()


def test_filler_rows_add_nothing_to_the_loss(tokenizer):
    collator = SpeechCollator(tiny.START, tiny.END)
    batch = collator([*rows_of(tokenizer, ["एक"]), None], window=250, label_length=60)
    assert (batch["labels"][1] == IGNORED).all()
    assert (batch["waves"][1] == 0).all()
