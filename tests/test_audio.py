"""Features: equal to the stock extractor's at natural length, silence included."""

import numpy as np
import pytest
import tiny
import torch
from transformers import WhisperFeatureExtractor

from common import audio


@pytest.mark.parametrize("mel_bins", [80, 128])
@pytest.mark.parametrize("samples", [1, 399, 16_000, 16_001, 79_999, 479_700, 480_000, 500_000])
def test_natural_features_then_silence_equal_those_of_padded_audio(mel_bins, samples):
    extractor = WhisperFeatureExtractor(feature_size=mel_bins)
    wave = tiny.tone(samples / 16_000, pitch=220)
    expected = torch.from_numpy(extractor(wave, sampling_rate=16_000).input_features[0])

    natural = audio.log_mel(wave, extractor.mel_filters)
    padded = torch.full((mel_bins, audio.N_FRAMES), audio.silence_value(natural))
    padded[:, : natural.shape[1]] = natural

    assert natural.shape == (mel_bins, audio.num_frames(samples))
    difference = (padded - expected).abs().max().item()
    assert difference < 1e-4, f"features differ by {difference}"


def test_silence_is_not_zero_for_loud_and_quiet_clips():
    filters = WhisperFeatureExtractor(feature_size=80).mel_filters
    loud = audio.log_mel(tiny.tone(1.0, pitch=300), filters)
    quiet = audio.log_mel(np.zeros(16_000, np.float32), filters)

    assert audio.silence_value(loud) == pytest.approx(loud.max().item() - 2.0)
    assert audio.silence_value(quiet) == -1.5


def test_flac_keeps_sixteen_bits():
    wave = np.round(tiny.tone(0.5, pitch=200) * 32_767) / 32_768
    again = audio.decode_flac(audio.encode_flac(wave.astype(np.float32)))
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
    filters = WhisperFeatureExtractor(feature_size=80).mel_filters
    pcm = audio.to_pcm(tiny.tone(2.0, pitch=200))
    full = audio.log_mel(audio.decode_flac(audio.encode_flac(pcm)), filters)
    kept = audio.log_mel(audio.decode_flac(audio.encode_flac(audio.keep_bits(pcm, 13))), filters)
    difference = (full - kept).abs().mean().item()
    assert 0 < difference < 2e-3, f"{difference}: 0.002 are 0.08 dB"
    assert len(audio.encode_flac(audio.keep_bits(pcm, 13))) < 0.9 * len(audio.encode_flac(pcm))
