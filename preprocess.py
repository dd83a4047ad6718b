"""Speech and transcripts in any common form become a prepared dataset on disk.

    python preprocess.py --source cv-corpus-23/mr --language mr --model openai/whisper-small \\
        --output_dir prepared --num_workers 8

First pass, in parallel: the rows of the source are cut into parts of 64 clips. Each clip is
decoded, resampled, checked and labelled, and each part becomes a file in OUTPUT_DIR.partial/parts,
whose name is a hash of its rows and of the options. A run that was killed finds its finished parts
there. Second pass, over 46 bytes per clip: duplicates, splits and overlaps are decided, and the
parts are streamed into the final files. Nothing else in memory grows with the corpus but the lists
of parts and of duplicates. OUTPUT_DIR appears by one rename; until then the disk holds the data
twice.
"""

import gc
import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

if __name__ == "__main__":
    gc.disable()  # until cli.run: collecting takes a quarter of the imports, which leave no garbage

from common import audio, cli, labels, prepared
from prepare import (
    clips,
    exclude,
    first_pass,
    output,
    parts,
    record,
    report,
    row_languages,
    second_pass,
    sources,
    splits,
    upload,
)

T = TypeVar("T")

# ------ options


@dataclass(frozen=True)
class Config:
    """Prepare speech and transcripts for training and evaluation."""

    source: str = os.environ.get("SM_CHANNEL_SOURCE", "")  # folder, manifest, or hub:NAME[:CONFIG]
    language: str = ""  # code or name for all rows; empty: each row's own language column
    task: str = "transcribe"  # transcribe, or translate if the texts are English translations
    model: str = "openai/whisper-small"  # Whisper model that the labels are for; folder or Hub id
    output_dir: str = "prepared"  # prepared dataset; must be new, empty, or hold this preparation
    num_workers: int = os.cpu_count() or 1  # worker processes; the output does not depend on them
    max_seconds: float = 30.0  # drop longer clips; Whisper's window is 30 seconds
    min_seconds: float = 0.1  # drop shorter clips
    max_chars_per_second: float = 40.0  # drop clips with more text per second; fast speech has 25
    exclude: str = ""  # CSV whose id column names clips to drop, such as eval_wer.py's audit.csv
    audio_bits: int = 13  # significant bits stored per sample; 16 is lossless
    forbid_text_overlap: bool = False  # drop held-out clips whose text is also in training
    test_fraction: float = 0.1  # share of clips to test on, if the source has no held-out split
    validation_fraction: float = 0.1  # share of clips to validate on, if the source has none
    seed: int = 0  # seed of the cut into splits
    hub_audio_column: str = "audio"  # Hub dataset's audio column
    hub_text_column: str = ""  # Hub dataset's text column; empty: text, sentence, transcript[ion]
    s3_uri: str = ""  # s3://BUCKET/PREFIX to copy the dataset to; empty: no copy


PLACE_OPTIONS = ("output_dir", "num_workers", "s3_uri")  # do not change what is written


def check(config: Config) -> None:
    """Refuse impossible options, all of them in one message."""
    held_out = config.test_fraction + config.validation_fraction
    cli.refuse(
        [
            (config.num_workers < 1, f"--num_workers {config.num_workers}: give 1 or more"),
            (
                not 0 < config.max_seconds <= audio.CHUNK_SECONDS,
                f"--max_seconds {config.max_seconds}: give more than 0 and at most 30, "
                "Whisper's window",
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
    )


def shaping_options(config: Config, excluded: frozenset[str]) -> dict[str, Any]:
    """The options that decide what is written; for --exclude its ids, wherever the file is."""
    options = {key: value for key, value in asdict(config).items() if key not in PLACE_OPTIONS}
    return options | {"exclude": exclude.describe(excluded)}


def select_options(config: Config, options_class: type[T]) -> T:
    """A smaller dataclass of options, each with its value in `config`."""
    return options_class(
        **{field.name: getattr(config, field.name) for field in fields(options_class)}
    )


# ------ both passes


def prepare(
    config: Config,
    source: sources.Source,
    source_sha256: str,
    num_rows: int | None,
    excluded: frozenset[str],
    work: Path,
) -> dict[str, Any]:
    """Prepare the source in `work/result`, and return its record.

    Args:
        config: the options.
        source: of --source.
        source_sha256: of its tables.
        num_rows: of the source, for the progress; `None` if it is not known.
        excluded: ids of --exclude.
        work: the working folder, locked; it may hold finished parts.
    """
    tokenizer = first_pass.cached_tokenizer(config.model)
    settings = record.describe_settings(shaping_options(config, excluded), tokenizer)
    split_options = select_options(config, splits.SplitOptions)

    # ------ first pass: each clip on its own
    rows = row_languages.settle_languages(
        sources.read(source),
        tokenizer,
        language=config.language,
        model=config.model,
        source_name=config.source,
    )
    paths = first_pass.prepare_clips(
        rows,
        num_rows,
        work / "parts",
        settings=record.serialize(settings),
        options=select_options(config, clips.ClipOptions),
        num_workers=config.num_workers,
    )

    # ------ second pass: duplicates and splits, then the final files
    facts = parts.read_all_facts(paths, labels.num_prompt_tokens(tokenizer))
    splits_by, originals = splits.decide(facts, split_options)
    second_pass.refuse_empty_result(facts, paths, config.source)
    counts = exclude.drop(paths, facts, excluded, config.exclude)
    result = output.empty_result(work)
    identity = record.identify(settings, facts)
    num_bytes = second_pass.write_splits(paths, facts, originals, result, identity)

    # ------ the record: a folder without it is not finished
    mel_bins = 128 if labels.has_language(tokenizer, "yue") else 80  # large-v3 brought both
    measured = report.describe(facts, splits_by, split_options, num_bytes, mel_bins)
    measured |= {"exclude": counts} if config.exclude else {}
    about_source = {"form": source.form, "sha256": source_sha256}
    languages = set().union(*map(parts.read_languages, paths))
    return record.write(result, settings, about_source, languages, measured)


# ------ main


def main(config: Config) -> None:
    """Prepare `config.source` unless the output holds it already; then copy it to S3 if asked."""
    # ------ options and source
    check(config)
    if config.s3_uri:
        upload.check(config.s3_uri)
    excluded = exclude.read_ids(config.exclude)
    labels.load_tokenizer(config.model, config.language, config.task)  # refuses what does not fit
    source = sources.find(
        config.source, audio_column=config.hub_audio_column, text_column=config.hub_text_column
    )
    source_sha256, num_rows = sources.fingerprint(source)

    # ------ the dataset, prepared now or before
    output_dir = Path(config.output_dir).expanduser().resolve()  # a link's target is replaced
    work = output_dir.with_name(output_dir.name + ".partial")
    finished = output.read_finished(
        config.output_dir, shaping_options(config, excluded), config.source, source_sha256
    )
    if finished:
        print(f"{config.output_dir} holds this preparation already: nothing to do")
    else:
        with output.locked(work, config.output_dir):
            finished = prepare(config, source, source_sha256, num_rows, excluded, work)
            (work / "result").rename(output_dir)

    # ------ report and copy
    report.show(finished, config.output_dir)
    shutil.rmtree(work, ignore_errors=True)
    if config.s3_uri:
        sent, present = upload.send_folder(output_dir, config.s3_uri, last=prepared.RECORD_NAME)
        print(f"{config.s3_uri}: {sent} files sent, {present} were there already")


if __name__ == "__main__":
    cli.run(main, Config)
