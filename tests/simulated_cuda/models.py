"""Dimensions of published Whispers, from their config.json."""

LARGE = {
    "d_model": 1280, "encoder_layers": 32, "decoder_layers": 32, "encoder_attention_heads": 20,
    "decoder_attention_heads": 20, "encoder_ffn_dim": 5120, "decoder_ffn_dim": 5120,
    "vocab_size": 51_866, "num_mel_bins": 128,
}  # fmt: skip
MODELS = {
    "large-v3": LARGE,
    "large-v2": LARGE | {"vocab_size": 51_865, "num_mel_bins": 80},
    "turbo": LARGE | {"decoder_layers": 4},
    "small": LARGE | {
        "d_model": 768, "encoder_layers": 12, "decoder_layers": 12, "encoder_attention_heads": 12,
        "decoder_attention_heads": 12, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072,
        "vocab_size": 51_865, "num_mel_bins": 80,
    },
    "tiny": LARGE | {
        "d_model": 384, "encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 6,
        "decoder_attention_heads": 6, "encoder_ffn_dim": 1536, "decoder_ffn_dim": 1536,
        "vocab_size": 51_865, "num_mel_bins": 80,
    },
}  # fmt: skip
# Real widths and fewer layers, for tests.
MODELS |= {
    "turbo of few layers": MODELS["turbo"] | {"encoder_layers": 6, "decoder_layers": 2},
    "small of few layers": MODELS["small"] | {"encoder_layers": 4, "decoder_layers": 4},
    "tiny of few layers": MODELS["tiny"] | {"encoder_layers": 2, "decoder_layers": 2},
}
