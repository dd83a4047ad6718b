"""Word times of a real whisper-base against espeak-ng's own word events, where `make demo` ran."""

from dataclasses import replace

import launch
import pytest
import torch

from benchmarks import word_times
from common import labels
from common.accelerator import open_accelerator
from common.systems import load_system
from demo import espeak
from transcription.stretches import find_stretches
from transcription.vad import load_vad

DEMO = launch.ROOT / "demo_run"
BASE, ADAPTER = DEMO / "whisper-base", DEMO / "run" / "adapter"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ADAPTER.is_dir(), reason="needs the weights of make demo"),
]
pytest.importorskip("silero_vad", reason="requirements-export.txt")


def test_words_start_where_espeak_began_them():
    """Mean 20 ms, 95 % below 100 ms; the natural window no worse than 30 seconds."""
    sentences = (launch.ROOT / "demo" / "sentences_mr.txt").read_text(encoding="utf-8").splitlines()
    vad, spoken = load_vad(), []
    for index, sentence in enumerate(sentences[-20:]):
        samples, starts = espeak.speak_words(sentence, variant=("m6", "f3", "m5", "f5")[index % 4])
        stretches = list(find_stretches([samples], vad))
        if len(starts) == len(sentence.split()) and len(stretches) == 1:
            spoken.append(word_times.Spoken(sentence, stretches[0], starts))
    assert len(spoken) >= 15
    system = load_system(
        str(BASE), str(ADAPTER), labels.load_tokenizer(str(BASE)),
        open_accelerator(precision="fp32", timeout_minutes=10.0), window_mode="natural",
        dtype=torch.float32,
    )  # fmt: skip
    natural = word_times.start_errors(system, spoken, "mr")
    full = word_times.start_errors(replace(system, window_mode="full"), spoken, "mr")
    figures = f"natural {natural.mean():.4f} s, full {full.mean():.4f} s, {len(natural)} words"
    print(figures, (natural < 0.1).mean())
    assert natural.mean() <= 0.020, figures
    assert (natural < 0.1).mean() >= 0.95, figures
    assert natural.mean() <= full.mean() + 0.002, figures
