"""Features: equal to the stock extractor's at any window, silence included."""

import numpy as np
import pytest
import tiny
import torch
from transformers import WhisperFeatureExtractor

from common import audio


def log_mel(wave, mel_bins=80, samples=None):
    """Features (M, F) of one clip, padded to so many samples."""
    filters = WhisperFeatureExtractor(feature_size=mel_bins).mel_filters
    wave = torch.as_tensor(wave[: audio.N_SAMPLES], dtype=torch.float32)
    samples = samples or -(-len(wave) // audio.HOP_LENGTH) * audio.HOP_LENGTH
    padded = torch.nn.functional.pad(wave, (0, samples - len(wave)))
    return audio.log_mel(padded[None], torch.tensor(filters.T, dtype=torch.float32))[0]


@pytest.mark.parametrize("mel_bins", [80, 128])
@pytest.mark.parametrize("samples", [1, 399, 16_000, 16_001, 79_999, 479_700, 480_000, 500_000])
def test_features_of_a_short_window_are_the_first_of_those_that_stock_pads(mel_bins, samples):
    extractor = WhisperFeatureExtractor(feature_size=mel_bins)
    wave = tiny.tone(samples / 16_000, pitch=220)
    expected = torch.from_numpy(extractor(wave, sampling_rate=16_000).input_features[0])
    for seconds in (0, 2, 30):
        window = min(-(-len(wave) // 320) * 320 + seconds * 16_000, audio.N_SAMPLES)
        found = log_mel(wave, mel_bins, window)
        assert found.shape == (mel_bins, window // audio.HOP_LENGTH)
        difference = (found - expected[:, : found.shape[1]]).abs().max().item()
        assert difference < 1e-4, f"features differ by {difference} with {seconds} s of silence"


def test_a_clip_has_the_same_features_beside_a_louder_one():
    quiet = torch.from_numpy(0.1 * tiny.tone(1.0, pitch=220))[None]
    loud = torch.from_numpy(tiny.tone(1.0, pitch=500))[None]
    filters = torch.tensor(WhisperFeatureExtractor().mel_filters.T, dtype=torch.float32)
    together = audio.log_mel(torch.cat([quiet, loud]).float(), filters)
    assert torch.allclose(together[0], audio.log_mel(quiet.float(), filters)[0], atol=1e-6)


def test_silence_is_not_zero_for_loud_and_quiet_clips():
    loud = log_mel(tiny.tone(1.0, pitch=300), samples=32_000)
    quiet = log_mel(np.zeros(16_000, np.float32), samples=32_000)
    assert (loud[:, 110:] == loud.max() - 2.0).all()
    assert (quiet[:, 110:] == -1.5).all()


def test_flac_keeps_sixteen_bits():
    wave = np.round(tiny.tone(0.5, pitch=200) * 32_767) / 32_768
    again = audio.decode_flac(audio.encode_flac(wave.astype(np.float32))) / 32_768
    assert np.abs(again - wave).max() < 1e-6


@pytest.mark.parametrize("bits", [8, 13, 16])
@pytest.mark.parametrize("peak", [100, 4_000, 32_767])
def test_a_clip_keeps_the_bits_that_its_loudest_sample_needs(bits, peak):
    pcm = np.random.default_rng(0).integers(-peak, peak + 1, size=5_000).astype(np.int16)
    pcm[0] = peak
    kept = audio.keep_bits(pcm, bits)
    step = max(1, 2 ** (peak.bit_length() + 1 - bits))
    assert (kept % step == 0).all()
    error = np.abs(kept.astype(int) - pcm).max()
    assert error <= (step / 2 if peak + step / 2 < 32_767 else step), f"off by {error}"
    assert (error == 0) == (step == 1)


def test_thirteen_bits_leave_the_features_as_they_are():
    pcm = audio.to_pcm(tiny.tone(2.0, pitch=200))
    full = log_mel(pcm / 32_768)
    kept = log_mel(audio.keep_bits(pcm, 13) / 32_768)
    difference = (full - kept).abs().mean().item()
    assert 0 < difference < 2e-3, f"{difference}: 0.002 are 0.08 dB"
    assert len(audio.encode_flac(audio.keep_bits(pcm, 13))) < 0.9 * len(audio.encode_flac(pcm))
