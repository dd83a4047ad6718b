"""Silero's voice activity detector: the probability of speech in every 32 ms of a recording.

The wheel of silero-vad brings the weights as safetensors. The network here is that of its
`tinygrad_model.py`; it needs neither onnxruntime nor torchaudio, and computes many frames at once.
The wheel's own code is not imported: it sets the number of threads of the whole process.
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from common.cli import UserError

FRAME = 512  # samples of a frame, 32 ms
CONTEXT = 64  # samples before a frame that are part of its input
N_FFT, STRIDE = 256, 128
BINS = N_FFT // 2 + 1
WIDTH = 128
WEIGHTS = "data/silero_vad_16k.safetensors"
REQUIREMENTS = "requirements-export.txt"


def weights_file() -> Path:
    """The weights in the installed wheel.

    Raises:
        UserError: silero-vad is not installed, or does not have them.
    """
    spec = importlib.util.find_spec("silero_vad")
    for folder in (spec and spec.submodule_search_locations) or []:
        if (Path(folder) / WEIGHTS).is_file():
            return Path(folder) / WEIGHTS
    raise UserError(
        f"speech is found with silero-vad 6.2, which is not installed: "
        f"pip install -r {REQUIREMENTS}"
    )


class SileroVAD(nn.Module):
    """Silero VAD 6 at 16 kHz: spectrum, four convolutions, an LSTM over the frames."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 2 * BINS, N_FFT, stride=STRIDE, bias=False)
        self.conv1 = nn.Conv1d(BINS, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, WIDTH, 3, padding=1)
        self.lstm = nn.LSTM(WIDTH, WIDTH)
        self.final_conv = nn.Conv1d(WIDTH, 1, 1)

    def forward(
        self, frames: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Probabilities (T) of frames (T, CONTEXT + FRAME), and the state after them."""
        x = F.pad(frames[:, None], (0, CONTEXT), mode="reflect")
        x = self.stft_conv(x)  # (T, 2 * BINS, 4)
        x = (x[:, :BINS] ** 2 + x[:, BINS:] ** 2).sqrt()
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = conv(x).relu()  # at last (T, WIDTH, 1)
        hidden, state = self.lstm(x.squeeze(-1), state)  # unbatched: (T, WIDTH)
        return self.final_conv(hidden.relu()[..., None]).sigmoid().flatten(), state


def load_vad() -> SileroVAD:
    """The detector with the weights of the installed wheel, on the CPU."""
    weights = load_file(weights_file())
    renamed = {
        f"lstm.{name.removeprefix('lstm_cell.')}_l0" if name.startswith("lstm_cell.") else name: own
        for name, own in weights.items()
    }
    vad = SileroVAD()
    vad.load_state_dict(renamed)
    return vad.eval()


class SpeechProbabilities:
    """Probabilities of speech in consecutive blocks of one recording.

    The blocks must be the same for the same recording: the last bits depend on their size.
    """

    def __init__(self, vad: SileroVAD) -> None:
        self.vad = vad
        self.state: tuple[torch.Tensor, torch.Tensor] | None = None
        self.context = torch.zeros(CONTEXT)

    @torch.inference_mode()
    def __call__(self, block: np.ndarray) -> np.ndarray:
        """Probabilities (T) of the next samples, float32 (T * FRAME)."""
        samples = torch.cat([self.context, torch.from_numpy(block)])
        frames = samples.unfold(0, CONTEXT + FRAME, FRAME)  # (T, CONTEXT + FRAME)
        self.context = samples[-CONTEXT:]
        probabilities, self.state = self.vad(frames, self.state)
        return probabilities.numpy()
