"""The memory planner: its formula against what a step really takes, and what it chooses."""

import json
import subprocess
import sys

import pytest
from transformers import WhisperConfig

from common import memory

LARGE = WhisperConfig(
    d_model=1280, encoder_layers=32, decoder_layers=32, encoder_ffn_dim=5120, decoder_ffn_dim=5120,
    vocab_size=51_865,
)  # fmt: skip
LARGE_BF16 = memory.Weights(base=3_087_000_000, trainable=15_700_000)

# Trains two steps of full windows in a process of its own and prints predicted and measured GiB.
STEP = """
import json, sys
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration
from common import memory, whisper
from common.collator import label_positions
clips, width, layers = map(int, sys.argv[1:])
config = WhisperConfig(
    d_model=width, encoder_layers=layers, decoder_layers=layers, encoder_ffn_dim=4 * width,
    decoder_ffn_dim=4 * width, encoder_attention_heads=8, decoder_attention_heads=8,
    vocab_size=51865, attn_implementation="sdpa",
)
base = WhisperForConditionalGeneration(config)
whisper.take_any_window(base)
whisper.return_loss_sum(base)
model = whisper.add_lora(base, rank=32, alpha=64, targets=["q_proj", "v_proj"], dropout=0.05)
sizes = [(one.numel(), one.requires_grad) for one in model.parameters()]
weights = memory.Weights(
    4 * sum(n for n, trained in sizes if not trained), sum(n for n, trained in sizes if trained)
)
model.train()
optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad])
for _ in range(2):
    labels = torch.randint(0, 50000, (clips, 30 * memory.TOKENS_PER_SECOND // 2))
    model(
        input_features=torch.randn(clips, 80, 3000), decoder_input_ids=labels, labels=labels,
        label_positions=label_positions(labels), clip_seeds=torch.arange(clips),
    ).backward()
    optimizer.step()
predicted = memory.predict_gib(
    config, weights, seconds=30.0 * clips, bytes_per_value=4, device="cpu",
    tokens_per_second=memory.TOKENS_PER_SECOND / 2,
)
print(json.dumps([predicted, memory.peak_memory_gib()]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("clips", "width", "layers"), [(1, 512, 6), (3, 512, 6), (8, 512, 6), (1, 768, 12), (2, 384, 4)]
)
def test_the_formula_is_within_fifteen_per_cent_of_the_measured_peak(clips, width, layers):
    words = [sys.executable, "-c", STEP, str(clips), str(width), str(layers)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    predicted, measured = json.loads(done.stdout.splitlines()[-1])
    assert 0.85 < predicted / measured < 1.15, f"{predicted:.2f} GiB by formula, {measured:.2f}"


def plan(gib, **options):
    return memory.plan_memory(
        LARGE, LARGE_BF16, **({"memory_gib": gib, "bytes_per_value": 2, "device": "cuda"} | options)
    )


def test_more_memory_gives_larger_pieces_and_none_is_larger_than_it_helps():
    seconds = [plan(gib).max_batch_seconds for gib in (10, 16, 40, 80)]
    assert seconds == sorted(seconds)
    assert seconds[0] < seconds[-1] == memory.GPU_SECONDS
    assert all(plan(gib).predicted_gib <= gib for gib in (10, 16, 40, 80))


def test_checkpointing_is_the_last_resort():
    one_clip = memory.predict_gib(LARGE, LARGE_BF16, seconds=30.0, bytes_per_value=2, device="cuda")
    assert not plan(one_clip + 0.01).checkpointing
    assert plan(one_clip - 0.01).checkpointing
    with pytest.raises(ValueError, match=r"one clip takes .* of the 2\.0 GiB given"):
        plan(2.0)


def test_decoding_takes_what_fits_and_beams_take_more():
    def seconds(gib, **more):
        return memory.plan_decoding(LARGE, memory_gib=gib, bytes_per_value=2, **more)

    assert seconds(80) == memory.DECODE_SECONDS
    assert seconds(4) == pytest.approx(2 * seconds(2))
    assert seconds(4, num_beams=5) == pytest.approx(seconds(4) / 5)
    keys_and_values = 2 * 32 * 1280 * 2 * 50 * seconds(4) / 2**30  # of the encoder's positions
    assert 1.0 < keys_and_values < 2.0, "half of the memory holds these and those of the tokens"


def test_a_cpu_takes_pieces_that_stay_in_its_caches():
    assert plan(500, device="cpu").max_batch_seconds == memory.CPU_SECONDS
    cached = plan(500, device="cpu", encoder_cached=True)
    assert cached.max_batch_seconds == memory.CPU_CACHED_SECONDS
