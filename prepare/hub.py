"""Rows of Hub datasets, which are streamed, and of datasets in local folders."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from common.cli import UserError, first_line
from prepare import columns
from prepare.reading import encode_wav
from prepare.reasons import MALFORMED_ROW, NO_TEXT, OUTSIDE_SOURCE
from prepare.rows import Row, is_inside, split_of

RATES = ("sampling_rate", "sample_rate")  # beside an array of samples


@dataclass(frozen=True)
class HubSource:
    """A dataset and the options that choose its columns."""

    option: str  # --source as it was given
    name: str  # the dataset's id, or its folder
    config: str
    audio_column: str
    text_column: str  # empty: the first usual name


def parse(option: str, audio_column: str, text_column: str) -> HubSource:
    """Take `hub:NAME[:CONFIG]`, or a folder, apart."""
    name, _, config = option.removeprefix("hub:").partition(":")
    if not option.startswith("hub:"):
        name, config = option, ""
    return HubSource(option, name, config, audio_column, text_column)


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of the datasets library."""
    names = ("dataset_dict.json",), ("dataset_info.json", "state.json")
    return any(all((folder / name).is_file() for name in group) for group in names)


def read(source: HubSource) -> Iterator[Row]:
    """Yield the rows of a dataset. Run again, it is streamed again, but only new parts are decoded.

    Raises:
        UserError: the dataset cannot be loaded or read, lacks a column, or the stream broke off.
    """
    if not source.name:
        raise UserError(
            f"--source {source.option} names no dataset: give hub:NAME or hub:NAME:CONFIG"
        )
    try:
        yield from _read_splits(source)
    except UserError:
        raise
    except (TypeError, KeyError, ImportError) as error:
        raise UserError(
            f"--source {source.option} holds data that cannot be read ({first_line(error)}): give "
            "a manifest of its files"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--source {source.option} broke off ({first_line(error)}): run again, finished clips "
            "are kept"
        ) from error


def _read_splits(source: HubSource) -> Iterator[Row]:
    from datasets import Audio, ClassLabel

    splits = _load(source)
    for split_name, split in _used_splits(source, list(splits)).items():
        dataset = splits[split_name]
        text_column = _check_columns(source, dataset)
        features = dataset.features or {}
        if not _is_array(features.get(source.audio_column)):
            dataset = dataset.cast_column(source.audio_column, Audio(decode=False))
        _report_unused(source, features)
        class_labels = {
            name: feature for name, feature in features.items() if isinstance(feature, ClassLabel)
        }
        for number, record in enumerate(dataset, start=1):
            record |= _spell_class_labels(record, class_labels)
            unnamed = f"{split_name}-{number:08d}"
            yield _row(source, record, text_column, split=split, unnamed=unnamed)


# ------ splits and columns


def _load(source: HubSource) -> dict[str, Any]:
    """The splits of a dataset by name, streamed from the Hub or mapped from a folder."""
    from datasets import load_dataset, load_from_disk

    folder = Path(source.name).expanduser()
    try:
        if is_saved(folder):
            saved = load_from_disk(folder)
            return dict(saved) if isinstance(saved, dict) else {"train": saved}
        return dict(load_dataset(source.name, source.config or None, streaming=True))
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, ImportError) as error:
        raise UserError(
            f"--source {source.option} cannot be loaded ({first_line(error)}): check its name and "
            "CONFIG, the network, and HF_TOKEN if it is gated"
        ) from error


def _used_splits(source: HubSource, names: list[str]) -> dict[str, str]:
    """The dataset's splits that are read -> train, validation, test, or `""` for a single one."""
    used = {name: split_of(name) for name in names if split_of(name)}
    if not used and len(names) == 1:
        used = dict.fromkeys(names, "")
    if not used:
        raise UserError(
            f"--source {source.option} has the splits {', '.join(names)}, none of them train, "
            "validation or test: make a manifest of the ones you want"
        )
    for name in sorted(set(names) - set(used)):
        print(f"split {name} of {source.option} is not read: not train, validation or test")
    return used


def _check_columns(source: HubSource, dataset: Any) -> str:
    """The name of the text column; raises UserError if it or the audio column is missing."""
    names = list(dataset.features or next(iter(dataset.take(1)), {}))
    usual = next((name for name in columns.TEXT_COLUMNS if name in names), "")
    text_column = source.text_column or usual
    for option, column in (
        ("--hub_audio_column", source.audio_column),
        ("--hub_text_column", text_column),
    ):
        if column not in names:
            raise UserError(
                f"{option} {column or '(empty)'} is not a column of --source {source.option}: "
                f"give one of {', '.join(names)}"
            )
    return text_column


def _is_array(feature: Any) -> bool:
    """Whether a column holds samples, not files."""
    names = feature if isinstance(feature, dict) else ()
    return "array" in names or type(feature).__name__ in ("List", "LargeList", "Sequence")


def _report_unused(source: HubSource, features: dict[str, Any]) -> None:
    """Print that times and channels are not used: a Hub dataset's audio is cut already."""
    names = {name: columns.column_name(name) for name in features}
    unused = [
        name
        for name, plain in names.items()
        if columns.is_time(plain) or plain in columns.CHANNEL_COLUMNS
    ]
    if unused:
        print(f"the audio of {source.option} is used whole: {', '.join(unused)} are ignored")


def _spell_class_labels(
    record: dict[str, Any], class_labels: dict[str, Any]
) -> dict[str, str | None]:
    """The names of a record's class labels; `None` for -1, which stands for unknown."""
    names = {}
    for column, feature in class_labels.items():
        label = record[column]
        is_known = isinstance(label, int) and label >= 0
        names[column] = feature.int2str(label) if is_known else None
    return names


# ------ one row


def _row(
    source: HubSource, record: dict[str, Any], text_column: str, *, split: str, unnamed: str
) -> Row:
    """Make a row of a dataset's record, with a problem if it cannot be used.

    Args:
        source: it names the audio column.
        record: of the dataset, class labels spelled out.
        text_column: of the record.
        split: of the row.
        unnamed: the id of a row without an audio path.
    """
    audio = record[source.audio_column]
    if isinstance(audio, list):
        audio = {name: record.get(name) for name in RATES} | {"array": audio}
    audio = {"bytes": audio} if isinstance(audio, bytes) else audio or {}
    cells = {columns.column_name(key): cell for key, cell in record.items()}
    path = audio.get("path") or ""
    text, no_text = columns.text(record, (text_column,))
    row = Row(
        id=PurePosixPath(path).stem if path else unnamed,
        audio=audio.get("bytes") or b"",
        text=text,
        split=split,
        speaker=columns.speaker(cells),
        language=columns.cell(cells, columns.LANGUAGE_COLUMNS, columns.MISSING_ID),
        problem=NO_TEXT if no_text else "",
        detail=no_text,
    )
    if row.audio or row.problem:
        return row
    if audio.get("array") is not None:
        return _with_array(source, row, audio)
    return _with_file(source, row, path)


def _with_array(source: HubSource, row: Row, audio: dict[str, Any]) -> Row:
    """The row with samples as a wav file.

    Raises:
        UserError: an array without a sampling rate, which all rows will lack.
    """
    rate = next((audio[name] for name in RATES if audio.get(name)), 0)
    if not isinstance(rate, int | float) or not 0 < rate == int(rate):
        raise UserError(
            f"--hub_audio_column {source.audio_column}: holds samples without a sampling_rate in "
            f"--source {source.option}: store audio files, or a column sampling_rate"
        )
    try:
        return replace(row, audio=encode_wav(audio["array"], int(rate)))
    except ValueError as error:
        return replace(row, problem=MALFORMED_ROW, detail=str(error))


def _with_file(source: HubSource, row: Row, path: str) -> Row:
    """The row with its audio file: in the Hub's repository, or in the dataset's folder."""
    if not path:
        return replace(row, problem=MALFORMED_ROW, detail="no audio")
    if path.startswith("hf://") or "::hf://" in path:
        return _with_download(row, path)
    folder = Path(source.name).expanduser()
    if folder.is_dir():  # parquet files are often in `data`, beside or above the audio
        candidates = [folder / path, folder / "data" / path]
        file = next((str(file) for file in candidates if file.is_file()), str(candidates[0]))
        if is_inside(file, os.path.realpath(folder)):
            return replace(row, path=file)
    return replace(row, problem=OUTSIDE_SOURCE, detail=path)


def _with_download(row: Row, path: str) -> Row:
    """The row with an audio file of a Hub repository that keeps files, not tables."""
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:
            return replace(row, audio=file.read())
    except FileNotFoundError:
        return replace(row, problem=MALFORMED_ROW, detail=f"no audio at {path}")
