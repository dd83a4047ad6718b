"""transcribe.py beside faster-whisper and whisper.cpp: same machine, weights and recordings.

    python -m benchmarks.transcription --data_dir PREPARED --exported EXPORTED --language hi \\
        --output_dir transcription

EXPORTED is what `export.py --formats hf,ct2,ggml` wrote. The clips of a split are transcribed as
files of their own, in one recording with pauses of 1 to 4 s, and in one with gaps of 0.2 s; so are
sentences by espeak-ng, which says where each word begins. Every run is a process of its own. After
each, OUTPUT_DIR/transcription.json and transcription.md hold what is known so far.
"""

import importlib.util
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from rapidfuzz.distance import Levenshtein

from benchmarks import process
from common import cli, metrics
from common.audio import SAMPLE_RATE, decode_flac
from common.error_rate import ErrorRate
from common.files import write_json, write_text
from common.prepared import load_prepared
from common.provenance import describe_run
from demo import espeak

PAUSES = (1.0, 4.0)  # seconds between the clips of a recording, drawn
GAP = 0.2  # seconds between the clips of dense speech
FLOOR = 0.001  # of full scale: noise in pauses, 60 dB below it
EDGE = 0.3  # seconds at both ends of a pause in which a word is not counted as invented
SENTENCES = 20  # that are spoken by espeak-ng
VARIANTS = ("m6", "f3", "m5", "f5")  # of its voice
GGML = "ggml_f16/ggml-model-f16.bin"


@dataclass(frozen=True)
class Engine:
    """What transcribes, with which export."""

    title: str
    package: str  # that must be installed
    export: str
    other: str = ""  # engine of benchmarks.transcribers; empty: transcribe.py
    num_beams: int = 0  # 0: its default, which is 5 for faster-whisper and 1 otherwise


BATCHED, SEQUENTIAL = "faster-whisper-batched", "faster-whisper"
BEAMS = 5
ENGINES = {
    "ours_torch": Engine("ours, PyTorch float32", "torch", "hf"),
    "ours_ct2": Engine("ours, CTranslate2 float32", "ctranslate2", "ct2_float32"),
    "ours_ct2_int8": Engine("ours, CTranslate2 int8", "ctranslate2", "ct2_int8"),
    "ours_ct2_beams": Engine(
        "ours, CTranslate2 float32, 5 beams", "ctranslate2", "ct2_float32", num_beams=BEAMS
    ),
    "ours_ct2_int8_beams": Engine(
        "ours, CTranslate2 int8, 5 beams", "ctranslate2", "ct2_int8", num_beams=BEAMS
    ),
    "fw_batched": Engine(
        "faster-whisper batched, float32", "faster_whisper", "ct2_float32", BATCHED
    ),
    "fw": Engine("faster-whisper, float32", "faster_whisper", "ct2_float32", SEQUENTIAL),
    "whisper_cpp": Engine("whisper.cpp, float16", "pywhispercpp", GGML, "whisper.cpp"),
    "fw_batched_int8": Engine(
        "faster-whisper batched, int8", "faster_whisper", "ct2_int8", BATCHED
    ),
    "fw_batched_greedy": Engine(
        "faster-whisper batched, float32, greedy", "faster_whisper", "ct2_float32", BATCHED, 1
    ),
    "fw_greedy": Engine(
        "faster-whisper, float32, greedy", "faster_whisper", "ct2_float32", SEQUENTIAL, 1
    ),
}


@dataclass
class Config:
    """Measure transcribe.py against faster-whisper and whisper.cpp."""

    data_dir: str  # output of preprocess.py
    exported: str  # output of export.py --formats hf,ct2,ggml
    language: str  # code
    output_dir: str = "transcription"  # recordings, transcripts and figures; must be new
    split: str = "test"  # train, validation or test
    max_clips: int = 0  # from the first on; 0: all
    seed: int = 42  # of the pauses
    engines: str = ""  # some of ENGINES, as ours_ct2,fw_batched; empty: all that are installed
    num_threads: int = 1  # of each engine


# ------ recordings


@dataclass(frozen=True)
class Part:
    """What is said in a stretch of a recording."""

    start: float  # seconds
    end: float
    text: str
    words: tuple[float, ...] = ()  # seconds at which its words begin, where they are known


@dataclass(frozen=True)
class Recording:
    """A file, and what is said in it when."""

    name: str
    seconds: float
    parts: tuple[Part, ...]


def join(
    folder: Path, name: str, clips: Sequence[tuple[np.ndarray, str]], pauses: Sequence[float]
) -> Recording:
    """Write clips with noise of so many seconds before each and after the last."""
    random, pieces, parts, now = np.random.default_rng(0), [], [], 0
    for index, pause in enumerate(pauses):
        noise = random.standard_normal(round(pause * SAMPLE_RATE)) * FLOOR
        pieces.append(noise)
        now += len(noise)
        if index < len(clips):
            samples, text = clips[index]
            pieces.append(samples)
            parts.append(Part(now / SAMPLE_RATE, (now + len(samples)) / SAMPLE_RATE, text))
            now += len(samples)
    folder.mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / f"{name}.wav", np.concatenate(pieces), SAMPLE_RATE, "PCM_16")
    return Recording(name, now / SAMPLE_RATE, tuple(parts))


def make_recordings(
    folder: Path, clips: Sequence[tuple[np.ndarray, str]], language: str, seed: int
) -> dict[str, list[Recording]]:
    """Recordings by condition, each condition a folder."""
    random, number = np.random.default_rng(seed), len(clips)
    shortest = min(clips, key=lambda clip: len(clip[0]))
    made = {
        "start": [join(folder / "start", "clip", [shortest], [0, 0])],
        "files": [
            join(folder / "files", f"{index:03}", [clip], [0, 0])
            for index, clip in enumerate(clips)
        ],
        "pauses": [
            join(folder / "pauses", "recording", clips, random.uniform(*PAUSES, number + 1))
        ],
        "dense": [join(folder / "dense", "recording", clips, [GAP] * (number + 1))],
        "spoken": [],
    }
    for index, (_, text) in enumerate(clips[:SENTENCES]):
        variant = VARIANTS[index % len(VARIANTS)]
        samples, starts = espeak.speak_words(text, variant=variant, language=language)
        if len(starts) != len(text.split()):  # a number, or signs that are spoken
            continue
        own = join(folder / "spoken", f"{index:03}", [(samples, text)], [0, 0])
        parts = (replace(own.parts[0], words=tuple(starts)),)
        made["spoken"].append(replace(own, parts=parts))
    return made


def read_clips(config: Config) -> list[tuple[np.ndarray, str]]:
    """Samples in full scale and transcripts of a split."""
    splits, _ = load_prepared(config.data_dir)
    if config.split not in splits:
        raise cli.UserError(f"--split {config.split}: not in --data_dir {config.data_dir}")
    rows = splits[config.split]
    rows = rows.select(range(min(config.max_clips or len(rows), len(rows))))
    return [(decode_flac(row["audio"]) / 32_768, str(row["text"])) for row in rows]


# ------ runs


@dataclass(frozen=True)
class Transcript:
    """What an engine wrote of a recording."""

    text: str
    words: tuple[tuple[float, float, str], ...]  # start and end in seconds, text


def transcribe(
    engine: Engine, folder: Path, output: Path, config: Config
) -> tuple[process.Measured, dict[str, Transcript]]:
    """Run an engine on a folder of recordings: its cost, and transcripts by name."""
    model = Path(config.exported) / engine.export
    common = ["--audio", folder, "--model", model, "--language", config.language]
    environment = {"OMP_NUM_THREADS": str(config.num_threads)}
    log = output.with_suffix(".log")
    if engine.other:
        command = ["-m", "benchmarks.transcribers", "--engine", engine.other, *common]
        command += ["--output", output, "--num_threads", config.num_threads]
        command += ["--beam_size", engine.num_beams]
        cost = process.run(command, log, environment)
        rows = map(json.loads, output.read_text(encoding="utf-8").splitlines())
        return cost, {
            row["file"]: Transcript(row["text"], tuple(map(tuple, row["words"]))) for row in rows
        }
    command = ["transcribe.py", *common, "--formats", "json", "--output_dir", output]
    command += ["--num_beams", engine.num_beams or 1]
    cost = process.run(command, log, environment)
    transcripts = {}
    for file in sorted(output.glob("*.json")):
        if file.name == "transcribe.json":
            continue
        segments = json.loads(file.read_text(encoding="utf-8"))["segments"]
        words = [word for segment in segments for word in segment["words"]]
        transcripts[file.stem] = Transcript(
            " ".join(segment["text"] for segment in segments),
            tuple((word["start"], word["end"], word["text"]) for word in words),
        )
    return cost, transcripts


# ------ scores


def score(recordings: Sequence[Recording], transcripts: dict[str, Transcript]) -> dict[str, Any]:
    """Error rate, words in pauses, clips without words and errors of word times."""
    references = [" ".join(part.text for part in own.parts) for own in recordings]
    texts = [transcripts[own.name].text for own in recordings]
    rates = ErrorRate("raw").compute(predictions=texts, references=references)
    pairs = [(own, transcripts[own.name].words) for own in recordings]
    errors = [error for own, words in pairs for error in start_errors(own, words)]
    return {
        "wer": rates["wer"],
        "words": sum(len(words) for _, words in pairs),
        "words_in_pauses": sum(words_in_pauses(own, words) for own, words in pairs),
        "clips_without_words": sum(clips_without_words(own, words) for own, words in pairs),
        "words_compared": len(errors),
        "start_error_seconds": statistics.fmean(errors) if errors else None,
        "starts_within_100_ms": sum(error < 0.1 for error in errors) / max(len(errors), 1),
    }


def middle(word: tuple[float, float, str]) -> float:
    return (word[0] + word[1]) / 2


def words_in_pauses(recording: Recording, words: Sequence[tuple[float, float, str]]) -> int:
    """Words whose middle lies in a pause between clips.

    >>> recording = Recording("", 9.0, (Part(0.0, 2.0, "a"), Part(5.0, 9.0, "b")))
    >>> words_in_pauses(recording, [(1.8, 2.2, "a"), (3.0, 4.0, "x"), (5.0, 5.5, "b")])
    1
    """
    edges = [0.0, *(edge for own in recording.parts for edge in (own.start, own.end))]
    pauses = list(zip(edges[::2], [*edges[1::2], recording.seconds], strict=True))
    return sum(
        any(start + EDGE < middle(word) < end - EDGE for start, end in pauses) for word in words
    )


def clips_without_words(recording: Recording, words: Sequence[tuple[float, float, str]]) -> int:
    """Clips of which nothing was written."""
    middles = [middle(word) for word in words]
    return sum(not any(own.start <= now <= own.end for now in middles) for own in recording.parts)


def start_errors(recording: Recording, words: Sequence[tuple[float, float, str]]) -> list[float]:
    """Seconds between where words that are right were timed and where they begin.

    >>> part = Part(0.0, 2.0, "one two", (0.5, 1.0))
    >>> start_errors(Recording("", 2.0, (part,)), [(0.4, 1.0, " won"), (1.25, 2.0, " two")])
    [0.25]
    """
    wanted = [metrics.raw(word) for own in recording.parts for word in own.text.split()]
    starts = [start for own in recording.parts for start in own.words]
    if not starts:
        return []
    said = [metrics.raw(text) for _, _, text in words]
    blocks = Levenshtein.opcodes(wanted, said)
    return [
        abs(words[block.dest_start + index][0] - starts[block.src_start + index])
        for block in blocks
        if block.tag == "equal"
        for index in range(block.src_end - block.src_start)
    ]


# ------ tables


CONDITIONS = {
    "files": "each clip a file",
    "pauses": "one recording, pauses of 1 to 4 s",
    "dense": "one recording, gaps of 0.2 s",
    "spoken": "sentences by espeak-ng, each a file",
}


def table(results: dict[str, Any]) -> str:
    """Markdown: a table for each condition, a row for each engine."""
    blocks = []
    for condition, title in CONDITIONS.items():
        seconds = results["seconds"][condition]
        if not seconds:
            continue
        lines = [
            f"{title}, {seconds:.0f} s of audio:",
            "",
            "| | CPU s per s | start-up, CPU s | peak memory, GiB | WER raw | words in pauses "
            "| clips without words | word starts: mean error, ms; within 100 ms, % |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name, runs in results["engines"].items():
            if condition in runs and "start" in runs:
                lines.append(row(ENGINES[name].title, runs[condition], runs["start"]))
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def row(title: str, run: dict[str, Any], start: dict[str, Any]) -> str:
    """A line of the table; start-up is what the shortest clip alone costs."""
    error = run["start_error_seconds"]
    times = "" if error is None else f"{1000 * error:.0f}; {100 * run['starts_within_100_ms']:.0f}"
    values = [
        title,
        f"{run['cpu_seconds_per_second']:.4f}",
        f"{start['cpu_seconds']:.1f}",
        f"{run['peak_memory_gib']:.2f}",
        f"{run['wer']:.1f}",
        run["words_in_pauses"],
        run["clips_without_words"],
        times,
    ]
    return f"| {' | '.join(map(str, values))} |"


# ------ main


def chosen_engines(config: Config) -> dict[str, Engine]:
    """The engines that were asked for; without --engines those that are installed."""
    wanted = config.engines.split(",") if config.engines else list(ENGINES)
    unknown = [name for name in wanted if name not in ENGINES]
    chosen = {name: own for name, own in ENGINES.items() if name in wanted}
    lacking = [
        name for name, own in chosen.items() if importlib.util.find_spec(own.package) is None
    ]
    if not config.engines:
        chosen = {name: own for name, own in chosen.items() if name not in lacking}
    exports = sorted({own.export for own in chosen.values()})
    absent = [name for name in exports if not (Path(config.exported) / name).exists()]
    cli.refuse(
        [
            (
                bool(unknown),
                f"--engines {config.engines}: unknown {', '.join(unknown)}: give some of "
                f"{','.join(ENGINES)}",
            ),
            (
                bool(config.engines and lacking),
                f"--engines {config.engines}: not installed: {', '.join(lacking)}: install "
                "faster-whisper and the packages of requirements-export.txt",
            ),
            (
                bool(absent),
                f"--exported {config.exported}: has no {', '.join(absent)}: give what export.py "
                "wrote with --formats hf,ct2,ggml",
            ),
        ]
    )
    return chosen


def main(config: Config) -> None:
    engines, output = chosen_engines(config), process.new_output(config.output_dir)
    recordings = make_recordings(output / "audio", read_clips(config), config.language, config.seed)
    seconds = {name: math.fsum(own.seconds for own in made) for name, made in recordings.items()}
    results: dict[str, Any] = {
        "run": describe_run(config), "seconds": seconds, "engines": {}
    }  # fmt: skip
    for name, engine in engines.items():
        runs = results["engines"].setdefault(name, {})
        for condition, made in recordings.items():
            if not made:
                continue
            folder = output / f"{name}_{condition}"
            cost, transcripts = transcribe(engine, output / "audio" / condition, folder, config)
            runs[condition] = asdict(cost) | score(made, transcripts)
            used = cost.cpu_seconds - runs["start"]["cpu_seconds"]
            runs[condition]["cpu_seconds_per_second"] = used / seconds[condition]
            write_json(output / "transcription.json", results)
            write_text(output / "transcription.md", table(results))
            print(f"{name}, {condition}: {cost.cpu_seconds:.1f} CPU seconds", flush=True)
    print(table(results))


if __name__ == "__main__":
    cli.run(main, Config)
