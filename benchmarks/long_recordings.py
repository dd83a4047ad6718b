"""Long recordings of known clips: scored as a whole, and cut again by a transcript without times.

    python -m benchmarks.long_recordings --data_dir prepared --model MODEL --adapter ADAPTER \\
        --output_dir long

The clips of a split are shuffled and joined with pauses of 0.3 to 2 s. transcribe.py writes the
recordings down and scores them (`--reference`); eval_wer.py scores the same clips, cut perfectly.
Then transcribe.py cuts the recordings again (`--align`) by their joined transcripts, and by ones of
which `--changed` clips are missing and as many of other clips are there instead. Where clips begin
and end, and what was said in them, is known. Nothing is decoded twice.

Prints two tables and writes OUTPUT_DIR/long_recordings.json.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from benchmarks import process
from common import audio, cli, levels
from common.files import write_json
from common.prepared import load_prepared
from common.provenance import describe_run

PAUSES = (0.3, 2.0)  # seconds
PAUSE_LEVEL = -70.0  # dBFS of the noise in them
COVERED = 0.95  # share of a clip's speech, so measured, in rows
LOUD_BELOW = 35.0  # dB below a clip's loud frames that its speech begins and ends at


@dataclass
class Config:
    """Score long recordings of known clips, and cut them again by their transcripts."""

    data_dir: str  # folder that preprocess.py wrote
    model: str  # Whisper checkpoint
    adapter: str = ""  # folder of an adapter; empty: --model alone
    split: str = "test"  # whose clips are joined
    foreign_split: str = "train"  # whose transcripts stand for what was not said
    minutes: float = 6.0  # of a recording
    changed: int = 10  # clips whose transcripts are missing, and foreign ones beside them
    seed: int = 0  # of order, pauses and changes
    output_dir: str = "long"  # recordings, transcripts and figures; must be new


@dataclass(frozen=True)
class Clip:
    """A clip in a recording."""

    recording: str
    start: float  # seconds, of the speech in it
    end: float
    text: str


# ------ recordings


def join_clips(config: Config, folder: Path) -> list[Clip]:
    """Write the clips of a split as recordings, `00.flac` and so on."""
    splits, _ = load_prepared(config.data_dir)
    rng, clips = np.random.default_rng(config.seed), []
    parts: list[np.ndarray] = []
    length, recording = 0, 0
    order = rng.permutation(len(splits[config.split])).tolist()
    for index in order:
        row = splits[config.split][index]
        samples = audio.decode_flac(row["audio"]) / 32768
        if length and (length + len(samples)) / audio.SAMPLE_RATE > 60 * config.minutes:
            write_recording(folder, recording, parts)
            parts, length, recording = [], 0, recording + 1
        pause = levels.num_samples(rng.uniform(*PAUSES))
        noise = levels.at_level(rng.standard_normal(pause), PAUSE_LEVEL)
        start, end = speech_limits(samples)
        now = length / audio.SAMPLE_RATE
        clips.append(Clip(f"{recording:02}", now + start, now + end, row["text"]))
        parts += [samples, noise]
        length += len(samples) + pause
    write_recording(folder, recording, parts)
    return clips


def write_recording(folder: Path, number: int, parts: list[np.ndarray]) -> None:
    soundfile.write(folder / f"{number:02}.flac", np.concatenate(parts), audio.SAMPLE_RATE)


def speech_limits(samples: np.ndarray) -> tuple[float, float]:
    """Seconds at which a clip (N,) is first and last loud."""
    loud = levels.frame_levels(samples)
    frames = np.flatnonzero(loud > np.percentile(loud, 95) - LOUD_BELOW)
    seconds = levels.FRAME / audio.SAMPLE_RATE
    return float(frames[0]) * seconds, float(frames[-1] + 1) * seconds


def write_texts(clips: list[Clip], texts: list[list[str]], folder: Path) -> Path:
    """The transcript of each recording: a line for each text of each of its clips."""
    folder.mkdir()
    for name in sorted({clip.recording for clip in clips}):
        own = [lines for clip, lines in zip(clips, texts, strict=True) if clip.recording == name]
        content = "".join(f"{line}\n" for lines in own for line in lines)
        (folder / f"{name}.txt").write_text(content, encoding="utf-8")
    return folder


def change_texts(config: Config, clips: list[Clip]) -> tuple[list[Clip], list[list[str]]]:
    """Transcripts without those of some clips, and with foreign ones before others.

    Returns:
        the clips whose transcripts are left, and the lines (clips) of all.
    """
    rng = np.random.default_rng(config.seed + 1)
    foreign = load_prepared(config.data_dir)[0][config.foreign_split]["text"]
    chosen = rng.permutation(len(clips))[: 2 * config.changed].tolist()
    missing, before = set(chosen[: config.changed]), chosen[config.changed :]
    texts = [[] if index in missing else [clip.text] for index, clip in enumerate(clips)]
    for index, line in zip(before, rng.permutation(len(foreign)).tolist(), strict=False):
        texts[index].insert(0, foreign[line])
    return [clip for index, clip in enumerate(clips) if index not in missing], texts


# ------ scores


def judge(file: Path, clips: list[Clip], known: list[Clip]) -> dict[str, Any]:
    """What a manifest has of clips whose transcripts are known.

    A word is foreign if it is in a row and was not spoken in any clip that the row overlaps. It is
    lacking if it was spoken in a clip that rows cover, and none of them has it.
    """
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    owners: dict[Clip, list[dict[str, Any]]] = {clip: [] for clip in clips}
    foreign, words, errors = 0, 0, []
    for row in rows:
        own = [clip for clip in clips if clip.recording == row["speaker"] and shared(clip, row) > 0]
        given, spoken = (Counter(" ".join(texts).split()) for texts in
                         ([row["text"]], [clip.text for clip in own]))  # fmt: skip
        words += given.total()
        foreign += (given - spoken).total()
        for clip in own:
            owners[clip].append(row)
        if given == spoken:  # whole clips: their limits are known
            errors += [row["start"] - own[0].start, row["end"] - own[-1].end]
    recovered, lacking, seconds = 0, 0, 0.0
    for clip, own in owners.items():
        covered = sum(shared(clip, row) for row in own)
        seconds += covered
        if covered > COVERED * (clip.end - clip.start):
            spoken, given = (Counter(" ".join(texts).split()) for texts in
                             ([clip.text], [row["text"] for row in own]))  # fmt: skip
            lacking += (spoken - given).total()
            recovered += spoken <= given
    outside = [max(errors[index], -errors[index + 1]) for index in range(0, len(errors), 2)]
    known_seconds = sum(clip.end - clip.start for clip in known)
    return {
        "rows": len(rows),
        "clips": recovered,
        "known_clips": len(known),
        "seconds": seconds,
        "known_seconds": known_seconds,
        "words": words,
        "foreign_words": foreign,
        "lacking_words": lacking,
        "edges": len(errors),
        "mean_start_error": float(np.mean(np.abs(errors[::2]))) if errors else None,
        "mean_end_error": float(np.mean(np.abs(errors[1::2]))) if errors else None,
        "most_cut_off": float(max(outside)) if outside else None,  # of speech, seconds
        "lowest_match": min((row["match"] for row in rows), default=None),
    }


def shared(clip: Clip, row: dict[str, Any]) -> float:
    """Seconds of a clip's speech in a row."""
    return max(0.0, min(clip.end, row["end"]) - max(clip.start, row["start"]))


def table(figures: dict[str, Any]) -> str:
    """Both tables, in Markdown."""
    lines = ["| | WER raw | WER `keep_marks` | CER raw |", "|---|---|---|---|"]
    for name, rates in figures["wer"].items():
        raw, marks = rates["raw"], rates["keep_marks"]
        lines.append(f"| {name} | {raw['wer']:.1f} | {marks['wer']:.1f} | {raw['cer']:.1f} |")
    lines += [
        "",
        "| transcript | clips recovered | speech | rows | words not spoken | words lacking | start "
        "and end off, mean | most speech cut off |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, own in figures["align"].items():
        share = 100 * own["seconds"] / own["known_seconds"]
        starts, ends, most = (
            "" if own[key] is None else f"{own[key]:.2f} s"
            for key in ("mean_start_error", "mean_end_error", "most_cut_off")
        )
        lines.append(
            f"| {name} | {own['clips']} of {own['known_clips']} | {share:.1f} % | {own['rows']} | "
            f"{own['foreign_words']} of {own['words']} | {own['lacking_words']} | "
            f"{starts}, {ends} | {most} |"
        )
    return "\n".join(lines)


# ------ main


def main(config: Config) -> None:
    output = process.new_output(config.output_dir)
    recordings = output / "recordings"
    recordings.mkdir(parents=True)
    clips = join_clips(config, recordings)
    system = ["--model", config.model]
    system += ["--adapter", config.adapter] if config.adapter else []
    language = load_prepared(config.data_dir)[0][config.split][0]["language"]
    transcribe = [
        "transcribe.py", *system, "--audio", recordings, "--language", language, "--formats",
        "txt,json", "--output_dir", output / "transcripts",
    ]  # fmt: skip
    texts = write_texts(clips, [[clip.text] for clip in clips], output / "texts")
    known, lines = change_texts(config, clips)
    changed = write_texts(clips, lines, output / "changed_texts")
    figures: dict[str, Any] = {"recordings": len(list(recordings.iterdir())), "wer": {}}
    aligned = {}
    for name, folder in (("of all clips", texts), ("changed", changed)):
        file = recordings / f"{folder.name}.jsonl"
        words = [*transcribe, "--reference", texts, "--align", folder, "--manifest", file]
        process.run(words, output / f"{folder.name}.log")
        aligned[name] = judge(file, clips, known if name == "changed" else clips)
    figures["align"] = aligned
    rates = json.loads((output / "transcripts" / "wer.json").read_text(encoding="utf-8"))
    figures["wer"]["long recordings"] = rates["normalisers"]
    score = ["eval_wer.py", *system, "--data_dir", config.data_dir, "--split", config.split]
    score += ["--panels", "false", "--model_card", "false"]
    process.run([*score, "--output_dir", output / "wer"], output / "eval_wer.log")
    scores = json.loads((output / "wer" / "wer.json").read_text(encoding="utf-8"))
    name = "adapter" if config.adapter else "base"
    figures["wer"]["clips, cut perfectly"] = scores[name]["normalisers"]
    write_json(output / "long_recordings.json", figures | describe_run(config))
    write_json(output / "clips.json", [asdict(clip) for clip in clips])
    print(table(figures))


if __name__ == "__main__":
    cli.run(main, Config)
