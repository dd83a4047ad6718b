"""Decoding: generate's tokens from a batch that shrinks, whatever clips and windows meet in it."""

import json
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
from tiny import waves
from transformers import WhisperForConditionalGeneration

from common import adapter as adapter_files
from common import decoding, labels, whisper


def decode(model, inputs, *, windows=None, languages=None, **options):
    """Tokens, with every clip's window the whole of the waves, in Marathi."""
    texts = decoding.decode(
        model,
        inputs,
        windows=windows or [inputs.shape[1] // 320] * len(inputs),
        languages=languages or ["mr"] * len(inputs),
        task="transcribe",
        **options,
    )
    return [text.tokens for text in texts]


@pytest.fixture
def ending(base):
    """A base that ends its clips at different steps, and wants suppressed tokens."""
    torch.manual_seed(3)
    torch.nn.init.normal_(base.proj_out.weight, std=0.05)
    base.generation_config.suppress_tokens = [5, 17]
    base.generation_config.begin_suppress_tokens = [base.generation_config.eos_token_id, 30]
    return base


def test_merged_and_unmerged_adapters_decode_the_same_tokens(adapted):
    unmerged = decode(adapted.get_base_model(), waves(), caps=[12, 20, 30])
    with adapter_files.merged(adapted) as plain:
        assert decode(plain, waves(), caps=[12, 20, 30]) == unmerged


@pytest.mark.parametrize("num_beams", [1, 3])
def test_each_clip_ends_at_its_own_cap_whatever_its_neighbours_may_take(base, num_beams):
    inputs, caps = waves(), [3, 7, 25]
    together = decode(base, inputs, caps=caps, num_beams=num_beams)
    alone = [
        decode(base, inputs[i : i + 1], caps=[cap], num_beams=num_beams)[0]
        for i, cap in enumerate(caps)
    ]
    assert together == alone
    assert [len(tokens) for tokens in together] == caps, "a random model never ends early"


def test_stock_generate_on_padded_features_gives_the_same_tokens(base, checkpoint):
    stock = WhisperForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    inputs = waves(2, 1500)
    features = whisper.features(base, inputs)
    expected = stock.generate(features, language="mr", task="transcribe", max_new_tokens=15)
    assert decode(base, inputs, caps=[15, 15]) == expected.tolist()


def test_with_timestamps_the_model_writes_what_it_would_but_never_that_there_are_none(base):
    inputs, config = waves(2, 100), base.generation_config
    states = whisper.encode(base, inputs)
    base.proj_out.weight.data[config.no_timestamps_token_id] *= 20  # the model wants to
    prompt = [tiny.START, config.lang_to_id["<|mr|>"], config.task_to_id["transcribe"]]
    tokens, wanted = torch.tensor([prompt, prompt]), 0
    for _ in range(6):
        with torch.no_grad():
            scores = base(encoder_outputs=(states,), decoder_input_ids=tokens).logits[:, -1]
        wanted += int((scores.argmax(-1) == config.no_timestamps_token_id).sum())
        scores[:, config.no_timestamps_token_id] = -torch.inf
        tokens = torch.cat([tokens, scores.argmax(-1, keepdim=True)], dim=1)
    assert wanted > 0
    written = decode(base, inputs, caps=[6, 6], timestamps=True)
    assert written == tokens[:, len(prompt) :].tolist()
    assert decode(base, inputs, caps=[6, 6]) != written


def test_a_batch_that_shrinks_gives_the_tokens_that_generate_gives(ending, monkeypatch):
    inputs, caps = waves(12), [40 - i for i in range(12)]
    shrunk = decode(ending, inputs, caps=caps, languages=["mr", "hi"] * 6)
    monkeypatch.setattr(decoding, "_is_plain_greedy", lambda _config: False)
    assert decode(ending, inputs, caps=caps, languages=["mr", "hi"] * 6) == shrunk
    assert len({len(tokens) for tokens in shrunk}) > 3, "the clips end together"


@pytest.mark.parametrize("num_beams", [1, 2])
def test_clips_of_different_windows_give_the_tokens_that_each_gives_alone(ending, num_beams):
    inputs, caps = waves(9), [30 - i for i in range(9)]
    windows = [300, 128, 200, 128, 300, 64, 200, 128, 64]
    together = decode(ending, inputs, windows=windows, caps=caps, num_beams=num_beams)
    alone = [
        decode(ending, inputs[i : i + 1, : 320 * window], caps=caps[i : i + 1], num_beams=num_beams)
        for i, window in enumerate(windows)
    ]
    assert together == [one[0] for one in alone]
    assert len({len(tokens) for tokens in together}) > 3, "the clips end together"
    whole = decode(ending, inputs, caps=caps, num_beams=num_beams)
    assert whole != together, "the windows change nothing"


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_batch_that_does_not_fit_is_decoded_in_halves_with_the_same_tokens(
    ending, monkeypatch, num_beams
):
    inputs, caps = waves(5), [30 - i for i in range(5)]
    options = {"caps": caps, "languages": ["mr", "hi", "mr", "hi", "mr"], "num_beams": num_beams}
    options["windows"] = [300, 128, 200, 128, 300]
    whole = decode(ending, inputs, **options)
    stock, sizes = decoding.encode_windows, []

    def only_two_fit(model, part, windows):
        sizes.append(len(part))
        if len(part) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return stock(model, part, windows)

    monkeypatch.setattr(decoding, "encode_windows", only_two_fit)
    assert decode(ending, inputs, **options) == whole
    assert sizes == [5, 2, 3, 1, 2]


def test_keys_and_values_are_held_in_the_precision_that_autocast_computes_in(base):
    states = torch.randn(2, 50, base.config.d_model)
    for precision in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            [cross, _] = decoding.cross_states(base, [([0, 1], states)])
            cache = decoding._new_cache(cross, 8)
        assert {cache.keys.dtype, cache.values.dtype, cache.cross[0][0].dtype} == {precision}


def test_keys_and_values_that_are_known_change_neither_texts_nor_start(ending):
    inputs, windows = waves(), [300, 96, 300]
    options = {"languages": ["mr"] * 3, "task": "transcribe", "caps": [40] * 3}
    with torch.inference_mode():
        encoded = decoding.encode_windows(ending, inputs, windows)
        cross = decoding.cross_states(ending, encoded)
    start = decoding.start_probabilities(ending, encoded)
    assert decoding.start_probabilities(ending, encoded, cross).equal(start)
    expected = decoding.decode_encoded(ending, encoded, **options)
    assert decoding.decode_encoded(ending, encoded, **options, cross=cross) == expected
    assert cross == [], "they are freed while clips end"


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("is_known", [True, False])
def test_hebrew_spelt_iw_is_decoded_as_hebrew_is(base, checkpoint, num_beams, is_known):
    tokenizer = labels.load_tokenizer(str(checkpoint))
    options = {"languages": ["he"] * 3, "caps": [9, 9, 9], "num_beams": num_beams}
    expected = decode(base, waves(), **options)
    config, ids = base.generation_config, tokenizer.get_added_vocab()
    config.lang_to_id["<|iw|>"] = config.lang_to_id.pop("<|he|>")
    if not is_known:  # an old fine-tune's, completed from a tokenizer that spells it so
        config.lang_to_id = None
        ids["<|iw|>"] = ids.pop("<|he|>")
    tokenizer = SimpleNamespace(
        get_added_vocab=lambda: ids,
        convert_tokens_to_ids=ids.get,
        convert_ids_to_tokens={number: name for name, number in ids.items()}.get,
    )
    whisper.complete_generation_config(base, tokenizer)
    assert decode(base, waves(), **options) == expected


@pytest.mark.parametrize("period", [1, 2, 3, 5, 40])
def test_a_text_loops_where_its_tokens_repeat_whatever_stands_around_them(period):
    unit, other = list(range(period)), list(range(100, 160))
    repeats = max(4, -(-12 // period))
    assert decoding.loops(unit * repeats)
    assert decoding.loops(other + unit * repeats + other)
    assert not decoding.loops(other + (unit * repeats)[:-1] + other)
    assert not decoding.loops(other)
    assert not decoding.loops([])


@pytest.fixture(scope="module")
def whole(checkpoint):
    """What a checkpoint with a complete generation configuration says, by number of beams."""
    return {num_beams: decode_two_clips(checkpoint, num_beams) for num_beams in (1, 2)}


def decode_two_clips(folder, num_beams):
    model = whisper.load_base(str(folder), dtype=torch.float32).eval()
    whisper.complete_generation_config(model, labels.load_tokenizer(str(folder)))
    return decode(model, waves(2), caps=[9, 9], languages=["mr", "hi"], num_beams=num_beams)


LACKING = [
    "lang_to_id", "task_to_id", "no_timestamps_token_id", "is_multilingual", "eos_token_id",
    "pad_token_id", "bos_token_id", "decoder_start_token_id", "suppress_tokens",
    "begin_suppress_tokens", "max_length", "forced_decoder_ids",
]  # fmt: skip
CHANGED = {
    "no file": None,
    "no entry": dict.fromkeys(LACKING),
    "forced prompt": {"forced_decoder_ids": [[1, tiny.START + 1], [2, tiny.START + 101]]},
    "all languages but one lack": {"lang_to_id": {"<|hi|>": tiny.START + 1 + 17}},
    "codes without brackets": {"lang_to_id": {"hi": tiny.START + 1}},
    "one task lacks": {"task_to_id": {"translate": tiny.START + 100}},
    "several ends": {"eos_token_id": [tiny.END]},
    "English-only by mistake": {"is_multilingual": False},
    "a token it does not have": {"suppress_tokens": [-1, 99_999]},
    "several texts": {"num_beams": 2, "num_return_sequences": 2},
    "more than texts": {"return_dict_in_generate": True, "output_scores": True},
    "second attempts": {"logprob_threshold": -1.0, "no_speech_threshold": 0.6},
    "a short text": {"max_length": 7},
    "made of config.json": {"_from_model_config": True},
} | {name: {name: None} for name in LACKING}


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_a_partial_generation_config_changes_no_token(
    checkpoint, whole, tmp_path, change, num_beams
):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    file = copy / "generation_config.json"
    content = json.loads(file.read_text()) | (change or {})
    file.write_text(json.dumps({name: one for name, one in content.items() if one is not None}))
    if change is None:
        file.unlink()
    assert decode_two_clips(copy, num_beams) == whole[num_beams]
    if change and None not in change.values():
        return
    nulls = json.loads((checkpoint / "generation_config.json").read_text()) | (change or {})
    file.write_text(json.dumps(nulls))
    assert decode_two_clips(copy, num_beams) == whole[num_beams], "null is not as if it lacked"


def test_an_english_only_model_stays_one_whatever_its_configuration_says(checkpoint, monkeypatch):
    model = whisper.load_base(str(checkpoint), dtype=torch.float32).eval()
    monkeypatch.setattr(labels, "is_english_only", lambda _tokenizer: True)
    model.generation_config.update(language="hi", task="translate")
    whisper.complete_generation_config(model, labels.load_tokenizer(str(checkpoint)))
    assert not model.generation_config.is_multilingual
    options = {"windows": [300, 300], "languages": None, "task": "transcribe", "caps": [9, 9]}
    greedy = [text.tokens for text in decoding.decode(model, waves(2), **options)]
    monkeypatch.setattr(decoding, "_is_plain_greedy", lambda _config: False)
    assert [text.tokens for text in decoding.decode(model, waves(2), **options)] == greedy


def test_a_shortest_text_that_a_checkpoint_asks_for_is_left_to_generate(base):
    for name, value in (("min_length", 8), ("bad_words_ids", [[5]]), ("no_repeat_ngram_size", 3)):
        assert decoding._is_plain_greedy(base.generation_config)
        setattr(base.generation_config, name, value)
        assert not decoding._is_plain_greedy(base.generation_config)
        setattr(base.generation_config, name, None)


def test_the_log_probability_is_the_mean_over_the_tokens_and_the_end_token(ending):
    clips, cap = 12, 60
    inputs, config = waves(clips), ending.generation_config
    options = {"languages": ["mr"] * clips, "task": "transcribe"}
    windows = [inputs.shape[1] // 320] * clips
    options |= {"windows": windows, "caps": [cap] * clips}
    config.eos_token_id = decoding.decode(ending, inputs, **options)[0].tokens[5]  # so it ends
    texts = decoding.decode(ending, inputs, **options)
    prompts = decoding._prompts(ending, options["languages"], "transcribe", clips)
    with torch.inference_mode():
        ((_, states),) = decoding.encode_windows(ending, inputs, windows)
        for clip, text in enumerate(texts):
            tokens = text.tokens + [config.eos_token_id] * (len(text.tokens) < cap)
            decoder = torch.cat([prompts[clip], torch.tensor(tokens)])[None, :-1]
            outputs = ending(encoder_outputs=(states[clip][None],), decoder_input_ids=decoder)
            scores = outputs.logits[0, prompts.shape[1] - 1 :]
            scores[:, config.suppress_tokens] = -torch.inf
            scores[0, config.begin_suppress_tokens] = -torch.inf
            logprobs = scores.log_softmax(dim=-1)[torch.arange(len(tokens)), tokens]
            assert text.logprob == pytest.approx(logprobs.mean().item(), abs=1e-4)
    assert len(texts[0].tokens) <= 5, "the first clip ends with the end token"


def test_beams_have_no_log_probability(base):
    texts = decoding.decode(
        base, waves(1), windows=[150], languages=["mr"], task="transcribe", caps=[5], num_beams=2
    )
    assert [text.logprob for text in texts] == [None]
