"""Speech and transcripts, in any usual form -> a prepared dataset on disk.

    python preprocess.py --source cv-corpus-23/mr --language mr --model openai/whisper-small \\
        --output_dir prepared --num_workers 8

First pass, in parallel: the rows of the source are cut into parts of PART_CLIPS clips; each clip is
decoded, resampled, checked and labelled, and each part becomes a file in OUTPUT_DIR.partial/parts,
named after its rows and options. A run that was killed finds its finished parts there. Second pass,
over 46 bytes a clip (nothing else grows with the corpus but the list of parts and of duplicates):
duplicates, splits and overlaps are decided, and the parts are streamed into the final files.
OUTPUT_DIR appears by one rename; until then the disk holds the data twice.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import os
import platform
import shutil
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from soundfile import __libsndfile_version__ as libsndfile_version
from transformers import PreTrainedTokenizerBase

from common import audio, cli, files, labels, prepared, progress
from common.provenance import git_commit
from prepare import clips, parts, s3, sources, splits

# ------ options


@dataclass(frozen=True)
class Config:
    """Prepare speech and transcripts for training and evaluation."""

    source: str = os.environ.get("SM_CHANNEL_SOURCE", "")  # folder, manifest, or hub:NAME[:CONFIG]
    language: str = ""  # code or name; empty: each row's own language column
    task: str = "transcribe"  # transcribe, or translate: the texts are English
    model: str = "openai/whisper-small"  # whose tokenizer writes the labels; folder or Hub id
    output_dir: str = "prepared"  # must be new, empty, or hold the same preparation
    num_workers: int = os.cpu_count() or 1  # processes; the output does not depend on it
    max_seconds: float = 30.0  # longer clips are dropped; Whisper's window is 30 s
    min_seconds: float = 0.1  # shorter clips are dropped
    max_chars_per_second: float = 40.0  # more text is dropped as impossible; fast speech has 25
    audio_bits: int = 13  # significant bits stored of a sample; 16 stores audio without loss
    forbid_text_overlap: bool = False  # drop held-out clips whose text is also in training
    test_fraction: float = 0.1  # of the clips, if the source has no test or validation split
    validation_fraction: float = 0.1  # likewise; of training, if the source lacks only this split
    seed: int = 0  # of the cut into splits
    hub_audio_column: str = "audio"  # of a Hub dataset
    hub_text_column: str = ""  # of a Hub dataset; empty: text, sentence, transcript, transcription
    s3_uri: str = ""  # s3://BUCKET/PREFIX to copy the result to; empty: nowhere


PLACE_OPTIONS = ("output_dir", "num_workers", "s3_uri")  # do not change what is written
HISTOGRAM_SECONDS = (0, 1, 2, 3, 5, 7, 10, 15, 20, 25)  # lower edges
LIBRARIES = ("datasets", "numpy", "pyarrow", "soundfile", "soxr", "tokenizers", "transformers")


def check(config: Config) -> None:
    """Refuse impossible options, all of them in one message."""
    held_out = config.test_fraction + config.validation_fraction
    problems = [
        (config.num_workers < 1, f"--num_workers {config.num_workers}: give 1 or more"),
        (
            not 0 < config.max_seconds <= audio.CHUNK_SECONDS,
            f"--max_seconds {config.max_seconds}: give more than 0, at most 30 (Whisper's window)",
        ),
        (
            not 0 <= config.min_seconds < config.max_seconds,
            f"--min_seconds {config.min_seconds}: give 0 or more, less than --max_seconds",
        ),
        (
            not config.max_chars_per_second > 0,
            f"--max_chars_per_second {config.max_chars_per_second}: give more than 0",
        ),
        (
            not (min(config.test_fraction, config.validation_fraction) >= 0 and held_out < 1),
            f"--test_fraction {config.test_fraction} and --validation_fraction "
            f"{config.validation_fraction}: give 0 or more each, less than 1 together",
        ),
        (
            not 8 <= config.audio_bits <= 16,
            f"--audio_bits {config.audio_bits}: give 8 to 16",
        ),
        (not config.output_dir, "--output_dir is empty: give a folder"),
    ]
    found = [message for is_wrong, message in problems if is_wrong]
    if found:
        raise cli.UserError("; ".join(found))


def shaping_options(config: Config) -> dict[str, Any]:
    """The options that decide what is written."""
    return {key: value for key, value in asdict(config).items() if key not in PLACE_OPTIONS}


def differing_options(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Shaping options that are not the same, with both values."""
    return [
        f"--{key} ({there.get(key)!r} there, {value!r} here)"
        for key, value in here.items()
        if there.get(key) != value
    ]


# ------ first pass: parts


@functools.cache
def cached_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """One tokenizer a process."""
    return labels.load_tokenizer(model)


def prepare_part(rows: list[sources.Row], config: Config, path: Path) -> None:
    """Prepare clips and write them to `path`, which is whole or absent."""
    tokenizer = cached_tokenizer(config.model)
    checks = clips.Checks(
        **{field.name: getattr(config, field.name) for field in fields(clips.Checks)}
    )
    records = [clips.prepare_clip(row, checks, tokenizer) for row in rows]
    parts.write(path, records)


def start_worker() -> None:
    """End with the parent, even where that was killed; leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def prepare_parts(
    rows: Iterator[sources.Row], config: Config, recipe: dict[str, Any], folder: Path
) -> Iterator[tuple[Path, int]]:
    """Yield the file and number of clips of every part, in the source's order."""
    options = json.dumps(recipe, sort_keys=True).encode()
    pool: Any = contextlib.nullcontext()
    if config.num_workers > 1:
        pool = ProcessPoolExecutor(config.num_workers, initializer=start_worker)
        pool.submit(cached_tokenizer, config.model)  # starts all, before reading starts threads
    waiting: deque[tuple[Path, int, Future[None] | None]] = deque()
    with pool as executor:
        while part := list(itertools.islice(rows, parts.PART_CLIPS)):
            digest = hashlib.sha256(options)
            for row in part:
                digest.update(row.key())
            path, job = folder / f"{digest.hexdigest()[:32]}.arrow", None
            if not path.exists() and executor:
                job = executor.submit(prepare_part, part, config, path)
            elif not path.exists():
                prepare_part(part, config, path)
            waiting.append((path, len(part), job))
            if (
                len(waiting) > config.num_workers + 2
            ):  # bounds the memory: a Hub row holds its audio
                yield finished(waiting.popleft(), config)
        while waiting:
            yield finished(waiting.popleft(), config)


def finished(part: tuple[Path, int, Future[None] | None], config: Config) -> tuple[Path, int]:
    """Wait for a part."""
    path, num_clips, job = part
    try:
        if job:
            job.result()
    except BrokenProcessPool as error:
        raise cli.UserError(
            f"--num_workers {config.num_workers}: a worker was killed, perhaps for want of memory: "
            "give fewer and start again; finished clips are kept"
        ) from error
    return path, num_clips


def with_languages(rows: Iterable[sources.Row], config: Config) -> Iterator[sources.Row]:
    """Settle each row's language: --language, or its own where that is empty."""
    tokenizer = cached_tokenizer(config.model)
    default = "en" if labels.is_english_only(tokenizer) else ""
    for row in rows:
        word = config.language or row.language or default
        code = labels.find_language(word)
        problem, detail = row.problem, row.detail
        if not problem and not word:
            problem, detail = clips.NO_LANGUAGE, "neither the row nor --language says it"
        elif not problem and not labels.has_language(tokenizer, code):
            problem, detail = clips.UNKNOWN_LANGUAGE, word
        yield replace(row, language=code, problem=problem, detail=detail)


# ------ second pass: duplicates and splits


def decide(facts: np.ndarray, config: Config) -> tuple[str, dict[int, int]]:
    """Fill in, in place, the split of every kept clip and the reason of every one left out.

    Returns:
        How the splits came about (found; speaker or clip; found, validation by speaker or by
        clip), and for every clip that is left out for
        its audio the row of the one that is kept.
    """
    kept = np.flatnonzero(facts["reason"] == 0)
    has_splits = bool((facts["split"][kept] > splits.TRAIN).any())
    if not has_splits:
        facts["split"] = splits.TRAIN
    facts["split"][facts["split"] == splits.NONE] = splits.TRAIN
    same, other, first = splits.duplicates(facts[kept])
    originals = {int(kept[at]): int(kept[first[at]]) for at in np.flatnonzero(same | other)}
    facts["reason"][kept[same]] = clips.REASONS.index(clips.DUPLICATE)
    facts["reason"][kept[other]] = clips.REASONS.index(clips.AUDIO_OVERLAP)
    kept = kept[~same & ~other]
    by = "found"
    fractions = (config.test_fraction, config.validation_fraction)
    if not has_splits and any(fractions):
        facts["split"][kept], by = splits.cut(facts[kept], fractions, config.seed)
    elif has_splits and not (facts["split"][kept] == splits.VALIDATION).any():
        kept_train = kept[facts["split"][kept] == splits.TRAIN]  # training chooses by validation
        if len(kept_train) > 1 and config.validation_fraction:
            fractions = (0.0, config.validation_fraction)
            facts["split"][kept_train], unit = splits.cut(facts[kept_train], fractions, config.seed)
            by = f"found, validation by {unit}"
    if config.forbid_text_overlap:
        facts["reason"][kept[splits.text_overlaps(facts[kept])]] = clips.REASONS.index(
            clips.TEXT_OVERLAP
        )
    return by, originals


# ------ report


def describe_split(facts: np.ndarray) -> dict[str, Any]:
    """Counts, hours and lengths of kept clips."""
    seconds = float(facts["seconds"].sum())
    edges = [*HISTOGRAM_SECONDS, math.inf]
    counts = np.histogram(facts["seconds"], edges)[0]
    speakers = facts["speaker_hash"][facts["speaker_hash"] > 0]
    return {
        "clips": len(facts),
        "seconds": round(seconds, 3),
        "hours": round(seconds / 3600, 3),
        "speakers": len(np.unique(speakers)),
        "tokens": int(facts["tokens"].sum()),
        "clips_from_seconds": dict(zip(map(str, HISTOGRAM_SECONDS), counts.tolist(), strict=True)),
    }


def token_rates(facts: np.ndarray) -> dict[str, float]:
    """Tokens a second of the text and its end: all tokens over all seconds, and over clips."""
    rates = facts["tokens"] / facts["seconds"]
    p50, p999 = np.percentile(rates, [50, 99.9])
    mean = facts["tokens"].sum() / facts["seconds"].sum()
    return {"mean": round(float(mean), 3), "p50": round(p50, 3), "p999": round(p999, 3)}


def versions() -> dict[str, str]:
    """Of what decodes, resamples and tokenizes; `av` may be absent."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["av"] = importlib.metadata.version("av")
    return {"python": platform.python_version(), "libsndfile": libsndfile_version, **found}


def fractions_missed(kept: np.ndarray, by: str, config: Config) -> dict[str, list[float]]:
    """Splits that were cut far from their fraction: what was asked for, and what came of it."""
    if by == "found":
        return {}
    cut = kept
    fractions = {"test": config.test_fraction, "validation": config.validation_fraction}
    if by.startswith("found"):  # validation, from what was training
        cut, fractions = kept[kept["split"] != splits.TEST], {"validation": fractions["validation"]}
    found = {}
    for name, fraction in fractions.items():
        num_clips = int((cut["split"] == prepared.SPLITS.index(name) + 1).sum())
        if splits.far_off(num_clips, fraction, len(cut)):
            found[name] = [fraction, round(num_clips / len(cut), 3)]
    return found


def describe(
    facts: np.ndarray,
    by: str,
    num_bytes: int,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
) -> dict[str, Any]:
    """The measured half of `preprocess.json`."""
    kept = facts[facts["reason"] == 0]
    dropped = Counter(clips.REASONS[code] for code in facts["reason"] if code)
    used = [
        (name, kept[kept["split"] == code]) for code, name in enumerate(prepared.SPLITS, start=1)
    ]
    mel_bins = 128 if labels.has_language(tokenizer, "yue") else 80  # large-v3 brought both
    padded = len(kept) * mel_bins * audio.N_FRAMES * 4
    return {
        "clips": {"read": len(facts), "kept": len(kept), "dropped": len(facts) - len(kept)},
        "dropped": dict(dropped.most_common()),
        "splits_by": by,
        "fractions_missed": fractions_missed(kept, by, config),
        "splits": {name: describe_split(part) for name, part in used if len(part)},
        "all": describe_split(kept),
        "held_out_texts_in_training": int(splits.text_overlaps(kept).sum()),
        "tokens_per_second": token_rates(kept),
        "disk": {
            "bytes": num_bytes,
            "padded_float32_bytes": padded,
            "padded_float32_mel_bins": mel_bins,
            "times_smaller": round(padded / num_bytes, 2),
        },
    }


def say(report: dict[str, Any], output_dir: str) -> None:
    """Print a report for people."""
    print(f"{'split':<12}{'clips':>9}{'hours':>9}{'speakers':>10}")
    for name, split in [*report["splits"].items(), ("all", report["all"])]:
        print(f"{name:<12}{split['clips']:>9,}{split['hours']:>9.2f}{split['speakers']:>10,}")
    if report["splits_by"].startswith("found, "):
        print(
            f"the source holds no validation split: cut from training, {report['splits_by'][7:]} "
            "(--validation_fraction 0 leaves it)"
        )
    elif report["splits_by"] != "found":
        print(f"the source holds no test or validation split: cut by {report['splits_by']}")
    for name, (asked, got) in report.get("fractions_missed", {}).items():
        print(
            f"warning: {name} has {got:.1%} of the clips, --{name}_fraction asked for {asked:.1%}: "
            "whole speakers do not come nearer; a column split in the source decides otherwise"
        )
    counts = report["all"]["clips_from_seconds"].items()
    print("clips from seconds: " + "  ".join(f"{edge}: {count:,}" for edge, count in counts))
    rates = report["tokens_per_second"]
    print(
        f"tokens a second: mean {rates['mean']:.1f}, half of the clips below {rates['p50']:.1f}, "
        f"99.9 % below {rates['p999']:.1f}"
    )
    total = report["clips"]
    print(f"kept {total['kept']:,} of {total['read']:,} clips, dropped {total['dropped']:,}")
    for reason, count in report["dropped"].items():
        print(f"{count:>9,}  {reason}")
    if total["dropped"]:
        print(f"each one is named in {output_dir.rstrip('/')}/dropped.jsonl")
    overlaps = report["held_out_texts_in_training"]
    if overlaps:
        print(
            f"{overlaps:,} held-out clips have a text that is also in training, read again: "
            "--forbid_text_overlap true drops them"
        )
    disk = report["disk"]
    print(
        f"disk: {disk['bytes'] / 1e6:,.1f} MB; as float32 log-mel padded to 30 s "
        f"({disk['padded_float32_mel_bins']} bins) {disk['padded_float32_bytes'] / 1e6:,.1f} MB, "
        f"{disk['times_smaller']:.1f} times as much"
    )


# ------ preparing


def finished_before(config: Config, source_sha256: str) -> dict[str, Any] | None:
    """`preprocess.json` of output that is there already; refuses a place of anything else."""
    folder, place = Path(config.output_dir).expanduser(), f"--output_dir {config.output_dir}"
    if folder.is_file():
        raise cli.UserError(f"{place} is a file: give a folder")
    if folder.is_mount():
        raise cli.UserError(
            f"{place} is a mount point, which no rename replaces: give a folder in it"
        )
    if not folder.exists() or not any(folder.iterdir()):
        return None
    recipe = prepared.read_recipe(folder)
    refuse_other(recipe, place, config, source_sha256)
    return recipe


def refuse_other(
    recipe: dict[str, Any] | None, place: str, config: Config, source_sha256: str
) -> None:
    """An error where a place holds something else than this preparation."""
    if recipe is None:
        raise cli.UserError(
            f"{place} holds files that preprocess.py did not write: give a new folder"
        )
    differing = differing_options(recipe["config"], shaping_options(config))
    if differing:
        raise cli.UserError(
            f"{place} holds another preparation: {', '.join(differing)} differ: "
            "give another folder or remove it"
        )
    if recipe["source"]["sha256"] != source_sha256:
        raise cli.UserError(
            f"{place} was prepared from --source {config.source} as it was before its tables "
            "changed: give another folder or remove it"
        )


@contextlib.contextmanager
def locked(folder: Path, output_dir: str) -> Iterator[None]:
    """Hold the working folder; the lock goes with the process, however that ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise cli.UserError(
            f"--output_dir {output_dir} cannot be written ({error}): give another"
        ) from error
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise cli.UserError(
                f"--output_dir {output_dir} is being written by another preprocess.py: wait for it"
            ) from error
        try:
            yield
        except cli.UserError:
            if not any(folder.glob("parts/*.arrow")):
                shutil.rmtree(folder)  # nothing worth keeping for a restart
            raise


def checked_rows(source: sources.Source, config: Config) -> Iterator[sources.Row]:
    """The source's rows, once the first one has shown that there are any and in which language."""
    rows = sources.read(source)
    first = next(rows, None)
    if first is None:
        raise cli.UserError(f"--source {config.source} has no rows: give one with clips")
    settled = next(with_languages([first], config))
    if settled.problem == clips.NO_LANGUAGE:
        raise cli.UserError(
            f"--language is empty and row 1 of --source {config.source} names none: "
            "give --language, such as --language hi"
        )
    if settled.problem == clips.UNKNOWN_LANGUAGE and labels.is_english_only(
        cached_tokenizer(config.model)
    ):
        raise cli.UserError(
            f"--model {config.model} is English-only, and row 1 of --source {config.source} is "
            f"in {settled.detail}: give a multilingual model (no .en at the end of its name)"
        )
    if settled.problem == clips.UNKNOWN_LANGUAGE:
        print(
            f"warning: clips in {settled.detail}, such as row 1, are left out, for --model "
            f"{config.model} does not know it: {labels.advice(settled.language or settled.detail)}"
        )
    own = labels.find_language(first.language)
    if config.language and first.language and own != labels.find_language(config.language):
        print(f"--language {config.language} is taken for all rows; row 1 says {first.language}")
    yield from with_languages(itertools.chain([first], rows), config)


def refuse_nothing(facts: np.ndarray, paths: list[Path], config: Config) -> None:
    """An error where no clip is left, with the commonest reasons and an example."""
    if (facts["reason"] == 0).any():
        return
    counts = Counter(facts["reason"].tolist()).most_common()
    reasons = ", ".join(f"{count} {clips.REASONS[code]}" for code, count in counts)
    remedy = "mend it"
    for part in map(parts.read, paths[:1]):
        first = part.select(["id", "detail", "reason"]).slice(0, 1).to_pylist()[0]
        why = first["detail"] or clips.REASONS[first["reason"]]
        reasons += f"; the first, {first['id']}: {why}"
        if clips.REASONS[first["reason"]] == clips.UNKNOWN_LANGUAGE:
            remedy = f"--language: {labels.advice(labels.find_language(why) or why)}"
    for path in paths:
        path.unlink(missing_ok=True)
    raise cli.UserError(
        f"--source {config.source} leaves none of its {len(facts)} clips ({reasons}): {remedy}"
    )


def make_recipe(config: Config) -> dict[str, Any]:
    """What decides, beside the source, what is written."""
    return {
        "config": shaping_options(config),
        "tokenizer_fingerprint": labels.tokenizer_fingerprint(cached_tokenizer(config.model)),
        "versions": versions(),
    }


def first_pass(
    rows: Iterator[sources.Row],
    num_rows: int | None,
    config: Config,
    recipe: dict[str, Any],
    work: Path,
) -> tuple[list[Path], np.ndarray]:
    """Every clip on its own: the parts, and FACTS (clips,) of them."""
    (work / "parts").mkdir(exist_ok=True)
    num_there = len(list((work / "parts").glob("*.arrow")))
    if num_there:
        print(
            f"continuing: {num_there} parts of {parts.PART_CLIPS} clips were finished before",
            flush=True,
        )
    found = prepare_parts(rows, config, recipe, work / "parts")
    paths: list[Path] = []

    def clips_done() -> Iterator[int]:
        for path, num_clips in found:
            paths.append(path)
            yield from range(num_clips)

    for _ in progress.track(clips_done(), total=num_rows, what="clips prepared"):
        pass
    num_prompt_tokens = labels.num_prompt_tokens(cached_tokenizer(config.model))
    facts = (parts.read_facts(path, num_prompt_tokens) for path in paths)
    return paths, np.concatenate([np.zeros(0, splits.FACTS), *facts])


def identify(recipe: dict[str, Any], facts: np.ndarray) -> str:
    """A name for the content that recipe and facts make."""
    identity = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
    identity.update(facts.view(np.uint8))
    return identity.hexdigest()


def languages_of(paths: list[Path]) -> set[str]:
    return {code for path in paths for code in parts.kept_languages(path)}


def write_recipe(
    folder: Path,
    recipe: dict[str, Any],
    source: sources.Source,
    sha256: str,
    languages: set[str],
    report: dict[str, Any],
) -> None:
    """Write `preprocess.json`, after everything else."""
    about = {
        "commit": git_commit(),
        "source": {"form": source.form, "sha256": sha256},
        "languages": sorted(languages),
    }
    files.write_json(folder / prepared.RECIPE_NAME, {**recipe, **about, **report})


def prepare(
    config: Config, source: sources.Source, sha256: str, num_rows: int | None, work: Path
) -> dict[str, Any]:
    """Both passes, from the source to `work/result`; the measured half of its recipe."""
    recipe = make_recipe(config)
    paths, facts = first_pass(checked_rows(source, config), num_rows, config, recipe, work)
    by, originals = decide(facts, config)
    refuse_nothing(facts, paths, config)
    result = work / "result"
    shutil.rmtree(result, ignore_errors=True)  # of a run that was killed while it wrote
    result.mkdir()
    num_bytes = parts.write_splits(paths, facts, originals, result, identify(recipe, facts))
    report = describe(facts, by, num_bytes, cached_tokenizer(config.model), config)
    write_recipe(result, recipe, source, sha256, languages_of(paths), report)
    return report


# ------ main


def main(config: Config) -> None:
    """Prepare `config.source`, or find it prepared; then copy it to S3 if asked."""
    check(config)
    if config.s3_uri:
        s3.check(config.s3_uri)
    labels.load_tokenizer(config.model, config.language, config.task)  # refuses what does not fit
    source = sources.find(
        config.source, audio_column=config.hub_audio_column, text_column=config.hub_text_column
    )
    sha256, num_rows = sources.fingerprint(source)
    output_dir = Path(config.output_dir).expanduser().resolve()  # a link's target is replaced
    work = output_dir.with_name(output_dir.name + ".partial")
    report = finished_before(config, sha256)
    if report:
        print(f"{config.output_dir} holds this preparation already: nothing to do")
    else:
        with locked(work, config.output_dir):
            report = prepare(config, source, sha256, num_rows, work)
            (work / "result").rename(output_dir)
    say(report, config.output_dir)
    shutil.rmtree(work, ignore_errors=True)
    if config.s3_uri:
        sent, there = s3.upload(output_dir, config.s3_uri, last=prepared.RECIPE_NAME)
        print(f"{config.s3_uri}: {sent} files sent, {there} were there already")


if __name__ == "__main__":
    cli.run(main, Config)
