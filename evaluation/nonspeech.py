"""What a system makes up: its texts of clips without speech, cut off, or padded to 30 seconds.

The clips are a function of a seed and of the scored clips, from which pauses and speech are cut.
Every system decodes them at its natural window and at 30 seconds, each once: what the window itself
does is not hidden by a second attempt.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset

from common import metrics
from common.accelerator import say
from common.audio import CHUNK_SECONDS, SAMPLE_RATE, decode_flac, encode_flac
from common.levels import MIN_PAUSE_SECONDS, lengthen, longest_pause, num_samples
from common.predictions import Prediction, written_languages
from common.prepared import column
from common.systems import System
from evaluation import sounds
from evaluation.scores import Panel, Scores, transcribe

FILE_NAME = "nonspeech.jsonl"
SEED = 0
CLIPS = 2  # of each kind
SECONDS = 5.0  # of a clip without speech
WINDOWS = ("natural", "full")
NOISE_LEVELS = (-20, -40, -60)  # dBFS: loud as speech, a noisy room, a quiet one
SEARCHED = 200  # clips at most that pauses are looked for in: reading a whole corpus takes minutes
CUT_SECONDS = 1.0  # of speech, then it ends
BEYOND_SPEECH = 1.5  # times as many words as were spoken are no errors of spacing any more
SPEECH_SECONDS = (2.0, 20.0)  # clips to be cut off or padded

SOUNDS: dict[str, Callable[[np.random.Generator, float], np.ndarray]] = {
    "silence": sounds.silence,
    **{f"white noise {dbfs} dBFS": partial(sounds.white_noise, dbfs=dbfs) for dbfs in NOISE_LEVELS},
    **{f"pink noise {dbfs} dBFS": partial(sounds.pink_noise, dbfs=dbfs) for dbfs in NOISE_LEVELS},
    "mains hum": sounds.hum,
    "clicks": sounds.clicks,
    "music": sounds.music,
}
PAUSES = "pauses of the corpus"
CUT = "speech cut off after 1 s"
PADDED = "speech padded to 30 s"
WITH_SPEECH = (CUT, PADDED)
KINDS = dict.fromkeys((*SOUNDS, PAUSES, CUT, PADDED), CLIPS) | {"silence": 1}  # all are equal


# ------ the clips


def draw_panel(dataset: Dataset, seed: int = SEED) -> Panel:
    """The clips of the panel, cut from and in the language of the clips of `dataset`."""
    languages = column(dataset, "language").tolist()
    language = Counter(languages).most_common(1)[0][0]
    rows = [
        _row(kind, number, make(_generator(seed, kind, number), SECONDS), language)
        for kind, make in SOUNDS.items()
        for number in range(KINDS[kind])
    ]
    order = np.random.default_rng(seed).permutation(len(dataset)).tolist()
    rows += _cut_pauses(dataset, order, language)
    rows += _cut_speech(dataset, order)
    clips = Dataset.from_list(rows)
    drawn = Counter(row["kind"] for row in rows)
    return Panel(clips, {kind: number - drawn[kind] for kind, number in KINDS.items()})


def _generator(seed: int, kind: str, number: int) -> np.random.Generator:
    """Of one clip, so that another kind does not change it."""
    return np.random.default_rng([seed, zlib.crc32(kind.encode()), number])


def _row(
    kind: str, number: int, samples: np.ndarray, language: str, text: str = "", share: float = 1.0
) -> dict[str, Any]:
    """A clip as prepared datasets hold it, with its kind and what was said in it.

    Args:
        text: reference of the whole clip that it was cut from.
        share: of that clip that is left.
    """
    return {
        "id": f"{kind} ({number + 1})",
        "kind": kind,
        "audio": encode_flac(samples),
        "seconds": len(samples) / SAMPLE_RATE,
        "text": text,
        "share": share,
        "language": language,
    }


def _samples(dataset: Dataset, index: int) -> np.ndarray:
    """A stored clip, float32 (N,)."""
    return decode_flac(dataset[index]["audio"]).astype(np.float32) / 32768


def _cut_pauses(dataset: Dataset, order: Sequence[int], language: str) -> list[dict[str, Any]]:
    """The longest pauses of the first clips that have any, each lengthened to a clip."""
    rows: list[dict[str, Any]] = []
    for index in order[:SEARCHED]:
        if len(rows) == KINDS[PAUSES]:
            break
        pause = longest_pause(_samples(dataset, index))
        if len(pause) >= num_samples(MIN_PAUSE_SECONDS):
            rows.append(_row(PAUSES, len(rows), lengthen(pause, SECONDS), language))
    return rows


def _cut_speech(dataset: Dataset, order: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Clips of the corpus cut off a second after their speech begins, and padded to 30 seconds."""
    seconds = column(dataset, "seconds")
    low, high = SPEECH_SECONDS
    fitting = [index for index in order if low <= seconds[index] <= high]
    for kind in WITH_SPEECH:
        for number, index in enumerate(fitting[: KINDS[kind]]):
            clip, samples = dataset[index], _samples(dataset, index)
            end = sounds.speech_start(samples) + num_samples(CUT_SECONDS)
            missing = CHUNK_SECONDS * SAMPLE_RATE - len(samples)
            part = samples[:end] if kind == CUT else np.pad(samples, (0, missing))
            share = min(len(part) / len(samples), 1.0)
            yield _row(kind, number, part, clip["language"], clip["text"], share)


# ------ the texts


def decode_panel(
    scores: Scores,
    name: str,
    system: System,
) -> None:
    """Decode the panel with a system that has been scored as `name`, and add what it wrote.

    All processes must call. The panel is drawn once the clips have been scored: they can be read.
    """
    scores.panel = scores.panel or draw_panel(scores.dataset)
    clips, options = scores.panel.clips, replace(scores.options, decode_again=False)
    say(
        system.accelerator,
        f"panel: {len(clips)} clips without speech, cut off or padded, two windows",
    )
    languages = written_languages(clips, options.task)
    texts, rates = {}, {}
    for window in WINDOWS:
        windowed = replace(system, window_mode=window)
        texts[window], _ = transcribe(windowed, clips, options)
        rates[window] = describe(scores.panel, texts[window], languages)
    scores.panel.texts[name] = texts
    scores.systems[name]["nonspeech"] = rates


def describe(
    panel: Panel, texts: dict[str, Prediction], languages: Sequence[str]
) -> dict[str, Any]:
    """What was written on the clips without speech together, and on each kind of clip.

    Args:
        texts: by clip id.
        languages: of the text of each clip.
    """
    clips = [
        {
            "kind": row["kind"],
            "minutes": row["seconds"] / 60,
            "words": count_words(texts[row["id"]].text, language),
            "reference_words": count_words(row["text"], language) * row["share"],
            "text": texts[row["id"]].text,
            "loops": texts[row["id"]].loops,
        }
        for row, language in zip(panel.clips.remove_columns("audio"), languages, strict=True)
    ]
    kinds = []
    for kind, left_out in panel.left_out.items():
        own = [clip for clip in clips if clip["kind"] == kind]
        row = {"kind": kind, "speech": kind in WITH_SPEECH} | _rates(own) | {"left_out": left_out}
        if kind in WITH_SPEECH:
            row["reference_words_per_minute"] = _per_minute(own, "reference_words")
        kinds.append(row)
    return _rates([clip for clip in clips if clip["kind"] not in WITH_SPEECH]) | {"kinds": kinds}


def _rates(clips: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts of some clips; a rate of no clips is `None`."""
    ratios = [compression_ratio(clip["text"]) for clip in clips if clip["text"]]
    return {
        "clips": len(clips),
        "clips_with_words": sum(clip["words"] > 0 for clip in clips),
        "words": sum(clip["words"] for clip in clips),
        "words_per_minute": _per_minute(clips, "words"),
        "repeated_ngrams": sum(clip["loops"] for clip in clips),
        "compression_ratio": sum(ratios) / len(ratios) if ratios else None,
    }


def _per_minute(clips: Sequence[dict[str, Any]], key: str) -> float | None:
    if not clips:
        return None
    return sum(clip[key] for clip in clips) / sum(clip["minutes"] for clip in clips)


def count_words(text: str, language: str) -> int:
    """Words without punctuation and symbols; letters where a language has no spaces.

    >>> count_words("... ♪ la la!", "en"), count_words("今天", "zh")
    (2, 2)
    """
    return len(metrics.keep_marks(text, language).split())


def compression_ratio(text: str) -> float:
    """Bytes of a text over bytes of it compressed by zlib: `whisper.utils.compression_ratio`."""
    content = text.encode()
    return len(content) / len(zlib.compress(content))


def rows(panel: Panel) -> list[dict[str, Any]]:
    """A row of nonspeech.jsonl for each clip: what it is, and what each system wrote.

    A text is invented if it repeats itself or has far more words than were spoken: any word on a
    clip without speech.
    """
    made = []
    for clip in panel.clips.remove_columns("audio"):
        spoken = count_words(clip["text"], clip["language"]) * clip.pop("share")
        for name, windows in panel.texts.items():
            for window, texts in windows.items():
                prediction = texts[clip["id"]]
                clip[f"{name}_{window}"] = prediction.text
                clip[f"{name}_{window}_loops"] = prediction.loops
                written = count_words(prediction.text, clip["language"])
                is_invented = prediction.loops or written > BEYOND_SPEECH * spoken
                clip[f"{name}_{window}_invented"] = is_invented
        made.append(clip)
    return made


# ------ printed


def table(systems: dict[str, dict[str, Any]]) -> str:
    """What all systems wrote at both windows, a line a kind."""
    columns = {
        f"{name} {window}": system["nonspeech"][window]
        for name, system in systems.items()
        for window in WINDOWS
    }
    width = max(20, *(len(name) + 3 for name in columns))

    def line(title: str, cells: Sequence[str]) -> str:
        return f"{title:<26}" + "".join(f"{cell:>{width}}" for cell in cells)

    first = next(iter(columns.values()))
    lines = [
        "what it makes up: clips with words of all, words a minute (and those of the reference)"
    ]
    lines.append(line("", list(columns)))
    by_kind = [
        line(kind["kind"], [_cell(own["kinds"][index]) for own in columns.values()])
        for index, kind in enumerate(first["kinds"])
    ]
    lines += by_kind[: -len(WITH_SPEECH)]
    lines.append(line("all without speech", [_cell(own) for own in columns.values()]))
    lines.append(
        line("repeated n-grams", [str(own["repeated_ngrams"]) for own in columns.values()])
    )
    ratios = [own["compression_ratio"] for own in columns.values()]
    lines.append(
        line("compression ratio", ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios])
    )
    lines += by_kind[-len(WITH_SPEECH) :]
    lines += [
        f"left out: {kind['left_out']} clips of {kind['kind']}, which the scored clips do not hold"
        for kind in first["kinds"]
        if kind["left_out"]
    ]
    return "\n".join(lines)


def _cell(own: dict[str, Any]) -> str:
    """`2 of 2, 312`, with speech `2 of 2, 96 (120)`; nothing where there is no clip."""
    if not own["clips"]:
        return "-"
    reference = own.get("reference_words_per_minute")
    beside = "" if reference is None else f" ({reference:.0f})"
    return f"{own['clips_with_words']} of {own['clips']}, {own['words_per_minute']:.0f}{beside}"
