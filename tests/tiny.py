"""Small stand-ins made on the spot: a random Whisper with a tokenizer of its own, and a corpus."""

import itertools
import json
from pathlib import Path

import numpy as np
import soundfile
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES, WhisperTokenizer

import preprocess

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())  # 256 signs, one a byte
SPECIALS = [
    "<|endoftext|>",
    "<|startoftranscript|>",
    *(f"<|{code}|>" for code in list(LANGUAGES)[:99]),
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
]
END = len(BYTES)
START = END + 1
WORDS = ["एक", "दोन", "तीन", "चार", "पाच", "सहा", "सात", "आठ", "घर", "पाणी", "शाळा", "नदी"]


def make_tokenizer(folder: Path) -> WhisperTokenizer:
    """A byte-level Whisper tokenizer: 256 bytes, then the special tokens in the real order."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {sign: at for at, sign in enumerate(BYTES)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIALS])
    file = folder / "tokenizer.json"
    tokenizer.save(str(file))
    end = "<|endoftext|>"
    config = {
        "tokenizer_class": "WhisperTokenizer",
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "unk_token": end,
        "model_max_length": 1024,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return WhisperTokenizer.from_pretrained(folder)


def make_checkpoint(folder: Path, *, seed: int = 0, width: int = 64, layers: int = 2) -> Path:
    """A random multilingual Whisper with the full 30-second window; the same for the same seed."""
    tokenizer = make_tokenizer(folder)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIALS}
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=END + len(SPECIALS),
            num_mel_bins=80,
            d_model=width,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=2 * width,
            decoder_ffn_dim=2 * width,
            bos_token_id=END,
            eos_token_id=END,
            pad_token_id=END,
            decoder_start_token_id=START,
            init_std=0.3,
        )
    )
    model.generation_config = GenerationConfig(
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
        decoder_start_token_id=START,
        max_length=448,
        is_multilingual=True,
        no_timestamps_token_id=ids["<|notimestamps|>"],
        lang_to_id={name: at for name, at in ids.items() if name[2:-2] in LANGUAGES},
        task_to_id={task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
        suppress_tokens=[],
        begin_suppress_tokens=[],
        return_timestamps=False,
    )
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    return folder


def end_texts(
    model: WhisperForConditionalGeneration, end: int, slope: float, *, middle: int = 16
) -> None:
    """Let texts end: the later, the more probable the end token, by `slope` a token.

    With a slope of 2 they have some 20 tokens, of 0.3 some 50 to 90. Before the token `middle` the
    end is improbable.
    """
    width = model.config.d_model
    direction = torch.randn(width, generator=torch.Generator().manual_seed(0))
    direction = torch.nn.functional.normalize(direction, dim=0)
    with torch.no_grad():
        positions = model.model.decoder.embed_positions.weight
        positions *= 6
        positions += slope * (torch.arange(len(positions))[:, None] - middle) * direction
        model.proj_out.weight[end] += 3 * direction


def make_full_vocabulary(folder: Path, *, seed: int = 0) -> Path:
    """A random Whisper as `make_checkpoint` makes, with a vocabulary of Whisper's 51,865 tokens.

    After the 256 bytes come triples of letters, digits and spaces, and an empty token, as in
    OpenAI's. No merge makes the triples: only a model writes them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    signs = "abcdefghijklmnopqrstuvwxyz0123456789\u0120"
    triples = ["".join(three) for three in itertools.product(signs, repeat=3)][: 50_256 - 256]
    vocabulary = {token: index for index, token in enumerate([*BYTES, *triples, ""])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIALS])
    times = [AddedToken(f"<|{index * 0.02:.2f}|>") for index in range(1501)]
    tokenizer.add_tokens(times)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    config = {"tokenizer_class": "WhisperTokenizer"} | dict.fromkeys(names, SPECIALS[0])
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ids = {name: tokenizer.token_to_id(name) for name in SPECIALS}
    end, start = ids[SPECIALS[0]], ids[SPECIALS[1]]
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=51_865, d_model=64, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=256,
            decoder_ffn_dim=256, bos_token_id=end, eos_token_id=end, pad_token_id=end,
            decoder_start_token_id=start, init_std=0.3,
        )
    )  # fmt: skip
    with torch.no_grad():  # few tokens compete, so that rounding seldom changes which one wins
        few = torch.zeros(51_865, 1)
        few[[*range(1000, 1040), end]] = 1.0
        model.proj_out.weight *= few.clamp(min=0.05)
    end_texts(model, end, 8.0, middle=6)
    model.generation_config = GenerationConfig(
        bos_token_id=end, eos_token_id=end, pad_token_id=end, decoder_start_token_id=start,
        max_length=448, alignment_heads=[[1, 0], [1, 1]], return_timestamps=False,
        suppress_tokens=[*range(end + 1, 51_865)],
        begin_suppress_tokens=[tokenizer.token_to_id("\u0120"), end],
    )  # fmt: skip
    model.save_pretrained(folder)
    return folder


def tone(seconds: float, *, pitch: float, seed: int = 0) -> np.ndarray:
    """A decaying tone in a little noise, float32 (N,) at 16 kHz."""
    random = np.random.default_rng(seed)
    t = np.arange(round(seconds * 16_000)) / 16_000
    wave = 0.4 * np.sin(2 * np.pi * pitch * t) * np.exp(-t) + 0.01 * random.standard_normal(len(t))
    return wave.astype(np.float32)


def make_corpus(
    folder: Path, *, clips: dict[str, int], speakers: int = 3, longest: float = 3.0, seed: int = 0
) -> Path:
    """A manifest of tones with random Marathi words: `folder/clips.csv`, split as `clips` says.

    At most one word a second: a model may write as many tokens as the fastest speaker's rate.
    """
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["path,text,split,speaker"]
    for split, number in clips.items():
        for i in range(number):
            name = f"{split}_{i:03d}.wav"
            seconds = random.uniform(1.0, longest)
            wave = tone(seconds, pitch=random.uniform(100, 400), seed=int(random.integers(2**31)))
            soundfile.write(folder / name, wave, 16_000)
            words = random.choice(WORDS, size=random.integers(1, 4))
            text = " ".join(words[: int(seconds)])
            lines.append(f"{name},{text},{split},{split}{i % speakers}")
    (folder / "clips.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "clips.csv"


def prepare(source: Path, checkpoint: Path, output: Path, **given: float) -> Path:
    """Run preprocess.py on a Marathi source with a checkpoint's tokenizer."""
    options = {"source": source, "model": checkpoint, "output_dir": output}
    words = {name: str(path) for name, path in options.items()}
    preprocess.main(preprocess.Config(**words, language="mr", num_workers=1, **given))
    return output


def features(clips: int = 3, frames: int = 600) -> torch.Tensor:
    """Random input features (B, 80, F)."""
    return torch.randn(clips, 80, frames, generator=torch.Generator().manual_seed(0))


def waves(clips: int = 3, positions: int = 300) -> torch.Tensor:
    """Noise, a clip louder than the next: int16 (B, N)."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(clips, 320 * positions, generator=generator)
    return (noise * 3_000 / (1 + torch.arange(clips))[:, None]).to(torch.int16)
