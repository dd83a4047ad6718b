"""faster-whisper and whisper.cpp on a folder of recordings, with their own defaults.

    python -m benchmarks.transcribers --engine faster-whisper --model EXPORTED/ct2_float32 ...

Each writes words with times, as ours does. Changed from the defaults: the language is given, times
of words are asked for, and the number of threads is given. Writes JSON lines, a recording each.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common import cli
from common.files import write_text

Engine = Literal["faster-whisper", "faster-whisper-batched", "whisper.cpp"]
Words = list[tuple[float, float, str]]  # start and end in seconds, text
CENTISECONDS = 100  # whisper.cpp counts time in them


@dataclass
class Config:
    """One engine on a folder of recordings."""

    engine: Engine  # what transcribes
    model: str  # folder of a CTranslate2 export, or file in ggml's format
    audio: str  # folder of wav files
    language: str  # code
    output: str  # JSON lines: file, text, words
    beam_size: int = 0  # of faster-whisper; 0: its default
    num_threads: int = 1  # of the computation


def faster_whisper(config: Config) -> Callable[[str], tuple[str, Words]]:
    """Its sequential mode: windows of 30 seconds one after the other, without VAD."""
    from faster_whisper import BatchedInferencePipeline, WhisperModel

    model = WhisperModel(config.model, device="cpu", cpu_threads=config.num_threads)
    is_batched = config.engine == "faster-whisper-batched"
    transcribe = BatchedInferencePipeline(model).transcribe if is_batched else model.transcribe
    options: dict[str, Any] = {"language": config.language, "word_timestamps": True}
    if config.beam_size:
        options["beam_size"] = config.beam_size

    def run(file: str) -> tuple[str, Words]:
        segments = list(transcribe(file, **options)[0])
        words = [word for segment in segments for word in segment.words or ()]
        text = " ".join(segment.text.strip() for segment in segments)
        return text, [(word.start, word.end, word.word) for word in words]

    return run


def whisper_cpp(config: Config) -> Callable[[str], tuple[str, Words]]:
    """A segment for each word is how whisper.cpp gives the times of words."""
    from pywhispercpp.model import Model

    model = Model(
        config.model,
        redirect_whispercpp_logs_to=None,
        n_threads=config.num_threads,
        language=config.language,
        print_progress=False,
        token_timestamps=True,
        max_len=1,
        split_on_word=True,
    )

    def run(file: str) -> tuple[str, Words]:
        parts = model.transcribe(file)
        words = [(own.t0 / CENTISECONDS, own.t1 / CENTISECONDS, own.text) for own in parts]
        return " ".join(own.text.strip() for own in parts), words

    return run


ENGINES: dict[str, Callable[[Config], Callable[[str], tuple[str, Words]]]] = {
    "faster-whisper": faster_whisper,
    "faster-whisper-batched": faster_whisper,
    "whisper.cpp": whisper_cpp,
}


def rows(config: Config) -> Iterator[dict[str, Any]]:
    run = ENGINES[config.engine](config)
    for file in sorted(Path(config.audio).glob("*.wav")):
        text, words = run(str(file))
        yield {"file": file.stem, "text": text, "words": words}


def main(config: Config) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows(config))
    write_text(Path(config.output), "".join(lines))


if __name__ == "__main__":
    cli.run(main, Config)
