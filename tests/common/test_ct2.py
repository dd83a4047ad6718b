"""CTranslate2 decodes what PyTorch decodes, at any window."""

import numpy as np
import pytest
import tiny
import torch
from transformers import WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from common import ct2, decoding, labels, whisper
from common.cli import UserError

converters = pytest.importorskip("ctranslate2.converters", reason="requirements-export.txt")
WINDOWS = [96, 288, 80, 288, 1500]  # 80 is the number of mel bins


@pytest.fixture(scope="module")
def ending(checkpoint, tmp_path_factory):
    """A random Whisper whose texts end at different steps: in PyTorch, and its export."""
    folder = tmp_path_factory.mktemp("ending") / "hf"
    model = whisper.load_base(str(checkpoint), dtype=torch.float32).eval()
    tiny.end_texts(model, tiny.END, 0.3)
    model.generation_config.suppress_tokens = [5, 17]
    model.generation_config.begin_suppress_tokens = [tiny.END, 30]
    model.save_pretrained(folder)
    tokenizer = labels.load_tokenizer(str(checkpoint))
    tokenizer.save_pretrained(folder)
    converters.TransformersConverter(str(folder)).convert(
        str(folder.with_name("ct2")), quantization="float32"
    )
    model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    whisper.complete_generation_config(model, tokenizer)
    return model, ct2.load(str(folder.with_name("ct2")), tokenizer)


@torch.inference_mode()
def test_the_tokens_and_their_probabilities_are_those_of_pytorch(ending):
    model, exported = ending
    waves = tiny.waves(10, 1500)
    given = {
        "windows": 2 * WINDOWS, "languages": 5 * ["mr", "hi"], "task": "transcribe",
        "caps": [5, 40, 300, 3, 90, 100, 60, 100, 440, 2],
    }  # fmt: skip
    wanted = decoding.decode(model, waves, **given)
    decoded = ct2.decode(exported, waves, **given)
    assert [own.tokens for own in decoded] == [own.tokens for own in wanted]
    cut = [len(own.tokens) == cap for own, cap in zip(decoded, given["caps"], strict=True)]
    assert 2 < sum(cut) < 8, "some texts end by themselves, some at their cap"
    for own, other, is_cut in zip(decoded, wanted, cut, strict=True):
        assert own.logprob == pytest.approx(other.logprob, abs=1e-4) or (is_cut and not own.logprob)


@torch.inference_mode()
def test_the_log_probability_of_a_text_found_with_beams_is_the_mean_of_its_tokens(ending):
    model, exported = ending
    waves, config = tiny.waves(4, 288), model.generation_config
    [(rows, states)] = decoding.encode_windows(model, waves, [288] * 4)
    given = {"languages": ["mr"] * 4, "task": "transcribe", "caps": [440] * 4}
    encoded = ct2.encode_windows(exported, waves, [288] * 4)
    greedy = ct2.decode_encoded(exported, encoded, **given)
    decoded = ct2.decode_encoded(exported, encoded, **given, num_beams=4)
    assert [own.tokens for own in decoded] != [own.tokens for own in greedy]
    prompt = labels.prompt(exported.tokenizer, "mr", "transcribe")
    for row, own in zip(rows, decoded, strict=True):
        tokens = torch.tensor([[*prompt, *own.tokens, tiny.END]])
        output = model(
            encoder_outputs=BaseModelOutput(states[[row]]), decoder_input_ids=tokens[:, :-1]
        )
        logits = output.logits[0, len(prompt) - 1 :]
        logits[:, config.suppress_tokens] = -torch.inf
        logits[0, config.begin_suppress_tokens] = -torch.inf
        chosen = logits.log_softmax(dim=1).gather(1, tokens[0, len(prompt) :, None])
        assert own.logprob == pytest.approx(chosen.mean().item(), abs=1e-4)


@torch.inference_mode()
def test_states_are_not_encoded_twice_where_a_window_has_as_many_positions_as_mel_bins(ending):
    model, exported = ending
    waves = tiny.waves(2, 96)
    for window in (80, 96):
        [(_, states)] = decoding.encode_windows(model, waves, [window] * 2)
        [(_, own)] = ct2.encode_windows(exported, waves, [window] * 2)
        if window == 96:
            assert np.allclose(np.array(own), states.numpy(), atol=1e-3)
        else:
            assert list(own.shape) == [2, 80, 160]


def test_a_folder_without_a_model_and_a_missing_engine_are_refused(ending, tmp_path, monkeypatch):
    _, exported = ending
    with pytest.raises(UserError, match=r"--model .*: holds no CTranslate2 Whisper that loads"):
        ct2.load(str(tmp_path), exported.tokenizer)
    monkeypatch.setattr(ct2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -r requirements-export\.txt"):
        ct2.load(str(tmp_path), exported.tokenizer)
