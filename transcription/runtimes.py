"""What decodes stretches of speech: PyTorch, or CTranslate2 with an exported model.

Both have one interface. A clip's tokens depend on the clip and its window alone.

Legend: B clips, N samples, C encoder positions (20 ms), L languages, T tokens.
"""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from common import ct2, decoding, labels, whisper
from common.cli import UserError
from common.ct2 import CT2Whisper
from common.decoding import Decoded
from common.provenance import read_record
from common.systems import System
from common.windows import (
    POSITIONS_PER_SECOND,
    DecodeMargin,
    DecodeWindowMode,
    decode_margin,
    trained_mode,
)
from transcription import alignment
from transcription.alignment import Aligned, Text

FRAMES_PER_POSITION = 2
PROBE = 16  # values of each tensor that identify weights
# Tokens that the engine aligns at once: for each it holds the scores of the whole vocabulary, 0.2
# MB, more than once.
ALIGNED_TOKENS = 512
# By which weights are known to say that nobody speaks: a tokenizer has one of them.
NO_SPEECH_TOKENS = ("<|nospeech|>", "<|nocaptions|>")
RuntimeKind = Literal["auto", "torch", "ct2"]
Heads = Sequence[tuple[int, int]]  # (layer, head) pairs of cross-attention


class Runtime(Protocol):
    """A model that is ready to decode, and what it is decoded with."""

    name: str  # the adapter or, without one, the model
    kind: RuntimeKind  # torch or ct2
    precision: str  # that it computes in
    weights: str  # hash
    tokenizer: PreTrainedTokenizerBase
    window_mode: DecodeWindowMode  # "natural" or "full"
    margin: DecodeMargin
    languages: Sequence[str]  # codes; none: an English-only model

    def encode(self, waves: torch.Tensor, windows: Sequence[int]) -> Any:
        """Encode int16 waves (B, N), each at its own window (B): what the others take."""

    def language_shares(self, encoded: Any) -> torch.Tensor:
        """The probability (B, L) of each language among all."""

    def decode(
        self, encoded: Any, *, languages: Sequence[str], task: str, caps: Sequence[int]
    ) -> list[Decoded]:
        """Texts (B) of at most `caps` (B) tokens each, with no-speech probabilities."""

    def align(self, encoded: Any, texts: Mapping[int, Text], heads: Heads) -> dict[int, Aligned]:
        """When the tokens of some clips were spoken, by clip."""

    def configured_heads(self) -> Heads:
        """The heads of alignment that the model's configuration names."""

    def choose_heads(self, clips: Sequence[tuple[Any, Text]]) -> Heads:
        """Heads of alignment by what they attend to on clips that are encoded alone."""


# ------ PyTorch


@dataclass(frozen=True)
class TorchEncoded:
    """Encoded clips, and what follows their start token."""

    groups: list[tuple[list[int], torch.Tensor]]  # clips of one window, and their states
    cross: decoding.Cross  # their keys and values, until they are decoded
    start: torch.Tensor  # (B, V) probabilities


@dataclass(frozen=True)
class TorchRuntime:
    """A base, a full fine-tune, or an adapter merged into its base."""

    system: System
    precision: str
    num_beams: int = 1
    kind: RuntimeKind = "torch"

    @property
    def name(self) -> str:
        return self.system.name

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.system.tokenizer

    @property
    def window_mode(self) -> DecodeWindowMode:
        return self.system.window_mode

    @property
    def margin(self) -> DecodeMargin:
        return self.system.margin

    @functools.cached_property
    def weights(self) -> str:
        """Sixteen hex digits of the first values of every tensor."""
        digest = hashlib.sha256()
        for name, weight in self.system.model.named_parameters():
            probe = weight.detach().flatten()[:PROBE].float().cpu()
            digest.update(name.encode() + probe.numpy().tobytes())
        return digest.hexdigest()[:16]

    @functools.cached_property
    def languages(self) -> Sequence[str]:
        return list(whisper.language_ids(self.tokenizer))

    def encode(self, waves: torch.Tensor, windows: Sequence[int]) -> TorchEncoded:
        with torch.inference_mode():
            groups = decoding.encode_windows(self.system.model, waves, windows)
            cross = decoding.cross_states(self.system.model, groups)
            start = decoding.start_probabilities(self.system.model, groups, cross).cpu()
        return TorchEncoded(groups, cross, start)

    def language_shares(self, encoded: TorchEncoded) -> torch.Tensor:
        shares = encoded.start[:, list(whisper.language_ids(self.tokenizer).values())]
        return shares / shares.sum(dim=1, keepdim=True)

    def decode(
        self, encoded: TorchEncoded, *, languages: Sequence[str], task: str, caps: Sequence[int]
    ) -> list[Decoded]:
        texts = decoding.decode_encoded(
            self.system.model,
            encoded.groups,
            languages=languages if self.languages else None,
            task=task,
            caps=caps,
            num_beams=self.num_beams,
            cross=encoded.cross,
        )
        silent = no_speech_probabilities(encoded.start, self.tokenizer)
        return [replace(text, no_speech=own) for text, own in zip(texts, silent, strict=True)]

    def align(
        self, encoded: TorchEncoded, texts: Mapping[int, Text], heads: Heads
    ) -> dict[int, Aligned]:
        aligned = {}
        for group, states in encoded.groups:
            rows = [row for row in group if row in texts]
            if rows:
                own = states[[group.index(row) for row in rows]]
                known = [texts[row] for row in rows]
                times = alignment.align(self.system.model, own, known, heads)
                aligned |= dict(zip(rows, times, strict=True))
        return aligned

    def configured_heads(self) -> Heads:
        return alignment.configured_heads(self.system.model)

    def choose_heads(self, clips: Sequence[tuple[TorchEncoded, Text]]) -> Heads:
        states = [(encoded.groups[0][1], text) for encoded, text in clips]
        return alignment.choose_heads(self.system.model, states)


def no_speech_probabilities(
    start: torch.Tensor, tokenizer: PreTrainedTokenizerBase
) -> list[float | None]:
    """The probability of each clip that nobody speaks; `None` if the tokenizer lacks the token.

    Args:
        start: (B, V) probabilities of what follows the start token.
    """
    known = tokenizer.get_added_vocab()
    token = next((known[name] for name in NO_SPEECH_TOKENS if name in known), None)
    if token is None or token >= start.shape[1]:
        return [None] * len(start)
    return start[:, token].tolist()


# ------ CTranslate2


@dataclass(frozen=True)
class CT2Runtime:
    """An export in CTranslate2's format, computed in the type in which it is stored."""

    model: CT2Whisper
    folder: str
    window_mode: DecodeWindowMode
    margin: DecodeMargin
    num_beams: int = 1
    kind: RuntimeKind = "ct2"

    @property
    def name(self) -> str:
        return self.folder

    @property
    def precision(self) -> str:
        return self.model.engine.compute_type

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.model.tokenizer

    @functools.cached_property
    def weights(self) -> str:
        """Sixteen hex digits of the file of weights."""
        with (Path(self.folder) / ct2.WEIGHTS).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]

    @functools.cached_property
    def languages(self) -> Sequence[str]:
        return list(whisper.language_ids(self.tokenizer))

    def encode(self, waves: torch.Tensor, windows: Sequence[int]) -> Any:
        return ct2.encode_windows(self.model, waves, windows)

    def language_shares(self, encoded: Any) -> torch.Tensor:
        ids = whisper.language_ids(self.tokenizer)
        names = self.tokenizer.convert_ids_to_tokens(list(ids.values()))
        rows = {}
        for group, states in encoded:
            pairs = map(dict, self.model.engine.detect_language(states))
            rows |= dict(zip(group, pairs, strict=True))
        shares = [[rows[row].get(name, 0.0) for name in names] for row in range(len(rows))]
        return torch.tensor(shares)

    def decode(
        self, encoded: Any, *, languages: Sequence[str], task: str, caps: Sequence[int]
    ) -> list[Decoded]:
        return ct2.decode_encoded(
            self.model,
            encoded,
            languages=languages if self.languages else None,
            task=task,
            caps=caps,
            num_beams=self.num_beams,
        )

    def align(self, encoded: Any, texts: Mapping[int, Text], heads: Heads) -> dict[int, Aligned]:
        """By the engine's own alignment, which is openai/whisper's, along the export's heads.

        Probabilities are those among the tokens of text. The engine takes one prompt a call.
        """
        aligned = {}
        for group, states in encoded:
            for prompt in {tuple(texts[row].prompt) for row in group if row in texts}:
                own = [row for row in group if row in texts and prompt == tuple(texts[row].prompt)]
                size = max(1, ALIGNED_TOKENS // max(len(texts[row].tokens) for row in own))
                for rows in (own[start : start + size] for start in range(0, len(own), size)):
                    some = _rows_of(states, [group.index(row) for row in rows])
                    times = self._align_at_once(some, prompt, [texts[row] for row in rows])
                    aligned |= dict(zip(rows, times, strict=True))
        return aligned

    def _align_at_once(
        self, states: Any, prompt: Sequence[int], texts: Sequence[Text]
    ) -> list[Aligned]:
        """Align clips (B) of one window and prompt with their texts (B)."""
        results = self.model.engine.align(
            states,
            list(prompt[:-1]),  # it adds the token of no timestamps
            [list(text.tokens) for text in texts],
            [FRAMES_PER_POSITION * text.positions for text in texts],
        )
        return [
            Aligned(
                _first_positions(result.alignments, len(text.tokens) + 1) / POSITIONS_PER_SECOND,
                np.array(result.text_token_probs),
            )
            for text, result in zip(texts, results, strict=True)
        ]

    def configured_heads(self) -> Heads:
        config = json.loads((Path(self.folder) / "config.json").read_text(encoding="utf-8"))
        return [(layer, head) for layer, head in config.get("alignment_heads") or []]

    def choose_heads(self, clips: Sequence[tuple[Any, Text]]) -> Heads:
        return []  # the engine shows no attention


def _rows_of(states: Any, rows: Sequence[int]) -> Any:
    """Some rows of an array of the engine, which is on the CPU."""
    import ctranslate2

    if len(rows) == states.shape[0]:
        return states
    return ctranslate2.StorageView.from_array(np.asarray(states)[list(rows)])


def _first_positions(path: Sequence[tuple[int, int]], tokens: int) -> np.ndarray:
    """The position (T,) at which each of so many tokens starts on a warped path.

    >>> _first_positions([(0, 0), (0, 1), (1, 1), (2, 2), (2, 3)], 3).tolist()
    [0, 1, 2]
    """
    starts = np.zeros(tokens, dtype=np.int64)
    for token, position in reversed(path):
        starts[token] = position
    return starts


def load_ct2(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    window_mode: DecodeWindowMode,
    device: torch.device,
    num_beams: int = 1,
) -> CT2Runtime:
    """Load an export, with the window that its model was trained for.

    Raises:
        UserError: CTranslate2 is not installed, or cannot decode the export.
    """
    loaded = ct2.load(model, tokenizer, device=device.type)
    if not labels.is_english_only(tokenizer) and not loaded.engine.is_multilingual:
        raise UserError(
            f"--model {model}: its vocabulary lacks the empty token of multilingual Whispers, and "
            "CTranslate2 detects no language without it: give the checkpoint that it was made from"
        )
    record = read_record(model, "--model")
    policy = record and record["window"]
    mode = trained_mode(policy) if window_mode == "auto" else window_mode
    return CT2Runtime(loaded, model, mode, decode_margin(policy), num_beams)
