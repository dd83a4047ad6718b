"""Tokens in time, and words in any script."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from common import decoding, labels
from common.batching import DecodeBatch
from transcription import alignment, segments
from transcription.alignment import Text
from transcription.runtimes import TorchRuntime
from transcription.words import split_words


def plain_warp(cost):
    """Dynamic time warping as it is written in textbooks."""
    rows, columns = cost.shape
    total = np.full((rows + 1, columns + 1), np.inf)
    total[0, 0] = 0
    for row in range(1, rows + 1):
        for column in range(1, columns + 1):
            before = (total[row - 1, column - 1], total[row - 1, column], total[row, column - 1])
            total[row, column] = cost[row - 1, column - 1] + min(before)
    return total[-1, -1]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 9), (9, 1), (5, 40), (40, 40), (40, 5)])
def test_the_warped_path_is_the_cheapest(rows, columns):
    cost = np.random.default_rng(rows * 100 + columns).standard_normal((rows, columns))
    starts = alignment.warp(cost)
    assert starts[0] == 0 and (np.diff(starts) >= 0).all() and starts[-1] < columns
    # A row runs from its start to that of the next, which it may share or come down before.
    ends = [*starts[1:], columns - 1]
    paid = 0.0
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        stays = [cost[row, start:stop].sum() for stop in range(start + 1, end + 2)]
        last = row == rows - 1
        paid += cost[row, start : end + 1].sum() if last else min(stays[-1], *stays[-2:])
    assert paid == pytest.approx(plain_warp(cost), abs=1e-9)


def test_attention_that_follows_the_speech_gives_the_times_of_its_tokens():
    edges = [0, 12, 30, 41, 60]
    weights = np.full((2, 4, 60), 0.001)
    for token, (start, end) in enumerate(itertools.pairwise(edges)):
        weights[:, token, start:end] = 1.0
    assert np.abs(alignment.token_starts(weights) - edges[:-1]).max() <= 1


def test_probabilities_are_those_of_the_decoder_and_do_not_depend_on_the_batch(base, checkpoint):
    tokenizer = labels.load_tokenizer(str(checkpoint))
    waves = tiny.waves(2, 300)
    texts = [[5, 9, 200, 31, 7], [90, 4]]
    prompt = labels.prompt(tokenizer, "mr", "transcribe")
    [(_, states)] = decoding.encode_windows(base, waves, [300, 300])
    clips = [Text(prompt, text, 300 - 50 * row) for row, text in enumerate(texts)]
    heads = [(0, 1), (1, 0)]
    both = alignment.align(base, states, clips, heads)
    alone = alignment.align(base, states[1:], clips[1:], heads)
    assert np.allclose(both[1].probabilities, alone[0].probabilities, atol=1e-6)
    assert both[1].starts.tolist() == alone[0].starts.tolist()
    assert len(both[0].starts) == 6 and both[1].starts.max() <= 5.0
    with torch.inference_mode():
        tokens = torch.tensor([prompt + texts[0]])
        logits = base(decoder_input_ids=tokens, encoder_outputs=(states[:1],)).logits[0, 3:-1]
    expected = logits.softmax(-1).gather(1, torch.tensor(texts[0])[:, None])[:, 0]
    assert np.allclose(both[0].probabilities, expected.numpy(), atol=1e-6)


def test_words_begin_a_moment_after_attention_moves_but_inside_the_clip(base, checkpoint):
    tokenizer = labels.load_tokenizer(str(checkpoint))
    [(_, states)] = decoding.encode_windows(base, tiny.waves(1, 300), [300])
    prompt = labels.prompt(tokenizer, "mr", "transcribe")
    text, heads = Text(prompt, [5, 9, 200, 31, 7], 300), [(0, 1), (1, 0)]
    [aligned] = alignment.align(base, states, [text], heads)
    with torch.inference_mode():
        _, [attention] = alignment._attend(base, states, [text], heads)
    path = alignment.token_starts(attention) / 50
    late = [0.0] + [alignment.EARLY_SECONDS] * 5
    assert aligned.starts == pytest.approx(np.minimum(path + late, 6.0))


@pytest.mark.parametrize(
    ("text", "language", "words"),
    [
        ("नमस्कार, १२३ किंवा 1,500.50!", "mr", ["नमस्कार,", " १२३", " किंवा", " 1,500.50!"]),
        ("he said: (yes) “no”", "en", ["he", " said:", " (yes)", " “no”"]),
        ("今天 2024年", "zh", ["今", "天", " 2024", "年"]),
        ("", "mr", []),
    ],
)
def test_words_joined_are_the_text_and_their_tokens_follow_one_another(
    text, language, words, checkpoint
):
    tokenizer = labels.load_tokenizer(str(checkpoint))
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    made = split_words(tokenizer, tokens, language)
    assert [word.text for word in made] == words
    assert [word.start for word in made] == [0, *(word.end for word in made)][: len(made)]
    assert not made or made[-1].end == len(tokens)


def test_stretches_are_encoded_without_a_graph_that_holds_what_each_layer_computed(
    base, checkpoint
):
    stretch = SimpleNamespace(samples=np.zeros(16_000, np.int16))
    batch = DecodeBatch((0,), (128,))
    system = SimpleNamespace(model=base, tokenizer=labels.load_tokenizer(str(checkpoint)))
    [(rows, states)] = segments._encode(TorchRuntime(system, "fp32"), [stretch], batch).groups
    assert rows == [0] and states.shape[:2] == (1, 128)
    assert not states.requires_grad
