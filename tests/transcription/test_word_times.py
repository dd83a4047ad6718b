"""Word times of a real whisper-base against espeak-ng's own word events, where `make demo` ran."""

import launch
import numpy as np
import pytest
import torch

from common import decoding, labels, predictions, whisper, windows
from common.audio import SAMPLES_PER_POSITION
from demo import espeak
from transcription import alignment
from transcription.stretches import find_stretches
from transcription.vad import load_vad
from transcription.words import split_words

DEMO = launch.ROOT / "demo_run"
BASE, ADAPTER = DEMO / "whisper-base", DEMO / "run" / "adapter"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ADAPTER.is_dir(), reason="needs the weights of make demo"),
]
pytest.importorskip("silero_vad", reason="requirements-export.txt")


def start_errors(model, tokenizer, spoken, margin, mode):
    """Seconds between where a word is aligned and where espeak-ng began it."""
    errors, prompt = [], labels.prompt(tokenizer, "mr", "transcribe")
    heads = alignment.configured_heads(model)
    for sentence, stretch, starts in spoken:
        window = windows.decode_window(stretch.seconds, mode, margin)
        waves = torch.zeros(1, window * SAMPLES_PER_POSITION, dtype=torch.int16)
        waves[0, : len(stretch.samples)] = torch.from_numpy(stretch.samples)
        tokens = tokenizer(sentence, add_special_tokens=False).input_ids
        [(_, states)] = decoding.encode_windows(model, waves, [window])
        text = alignment.Text(prompt, tokens, windows.positions(stretch.seconds))
        [aligned] = alignment.align(model, states, [text], heads)
        words = split_words(tokenizer, tokens, "mr")
        times = [
            max(stretch.start + aligned.starts[word.start], stretch.speech_start) for word in words
        ]
        errors += [time - start for time, start in zip(times, starts, strict=True)]
    return np.abs(errors)


def test_words_start_where_espeak_began_them():
    """Mean 20 ms, 95 % below 100 ms; the natural window no worse than 30 seconds."""
    sentences = (launch.ROOT / "demo" / "sentences_mr.txt").read_text(encoding="utf-8").splitlines()
    vad, spoken = load_vad(), []
    for index, sentence in enumerate(sentences[-20:]):
        samples, starts = espeak.speak_words(sentence, variant=("m6", "f3", "m5", "f5")[index % 4])
        stretches = list(find_stretches([samples], vad))
        if len(starts) == len(sentence.split()) and len(stretches) == 1:
            spoken.append((sentence, stretches[0], starts))
    assert len(spoken) >= 15
    tokenizer = labels.load_tokenizer(str(BASE))
    model = predictions.load_for_decoding(
        str(BASE), str(ADAPTER), dtype=torch.float32, device=torch.device("cpu")
    )
    whisper.complete_generation_config(model, tokenizer)
    natural = start_errors(model, tokenizer, spoken, windows.TRAINED, "natural")
    full = start_errors(model, tokenizer, spoken, windows.TRAINED, "full")
    figures = f"natural {natural.mean():.4f} s, full {full.mean():.4f} s, {len(natural)} words"
    print(figures, (natural < 0.1).mean())
    assert natural.mean() <= 0.020, figures
    assert (natural < 0.1).mean() >= 0.95, figures
    assert natural.mean() <= full.mean() + 0.002, figures
