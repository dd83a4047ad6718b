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
