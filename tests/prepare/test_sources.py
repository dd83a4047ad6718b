"""prepare/sources.py: forms are detected; every row is read, with its problem if it has one."""

import csv
import io
import json

import numpy as np
import pytest
import soundfile

from common.cli import UserError
from prepare import hub, reasons, sources
from prepare.rows import Row


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def table(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def rows(source, **options):
    return list(sources.read(sources.find(str(source), **options)))


COMMON_VOICE_HEADER = "client_id\tpath\tsentence\tlocale"


def test_a_common_voice_folder_keeps_its_splits(tmp_path):
    touch(tmp_path / "clips" / "a.mp3")
    for name in ("train", "dev", "test", "validated", "invalidated"):
        table(tmp_path / f"{name}.tsv", COMMON_VOICE_HEADER, f"s-{name}\t{name}.mp3\tनमस्ते\thi")
    result = rows(tmp_path)
    assert [(row.id, row.split, row.speaker) for row in result] == [
        ("train", "train", "s-train"),
        ("dev", "validation", "s-dev"),
        ("test", "test", "s-test"),
    ]
    assert result[0].path == str(tmp_path / "clips" / "train.mp3")
    assert (result[0].text, result[0].language) == ("नमस्ते", "hi")


def test_a_common_voice_folder_without_train_gives_all_validated_clips_unsplit(tmp_path):
    touch(tmp_path / "clips" / "a.mp3")
    for name in ("test", "validated"):
        table(tmp_path / f"{name}.tsv", COMMON_VOICE_HEADER, f"s\t{name}.mp3\ttext\tmr")
    assert [(row.id, row.split) for row in rows(tmp_path)] == [("validated", "")]


def test_a_common_voice_train_table_of_a_header_alone_gives_way_to_validated_clips(
    tmp_path, capsys
):
    touch(tmp_path / "clips" / "a.mp3")
    for name in ("train", "dev"):
        table(tmp_path / f"{name}.tsv", COMMON_VOICE_HEADER, "")
    table(tmp_path / "test.tsv", COMMON_VOICE_HEADER, "s\ttest.mp3\ttext\tmr")
    assert [(row.id, row.split) for row in rows(tmp_path)] == [("test", "test")]
    table(tmp_path / "validated.tsv", COMMON_VOICE_HEADER, "s\ta.mp3\ttext\tmr")
    assert [(row.id, row.split) for row in rows(tmp_path)] == [("a", "")]
    assert "train.tsv has no rows: all clips of validated.tsv are used" in capsys.readouterr().out
    table(tmp_path / "validated.tsv", COMMON_VOICE_HEADER)
    assert [(row.id, row.split) for row in rows(tmp_path)] == [("test", "test")]


def test_quotes_in_a_tsv_are_text_and_do_not_swallow_rows(tmp_path):
    path = table(tmp_path / "m.tsv", "path\tsentence", 'a.wav\t"He said', 'b.wav\tso" he did')
    assert [row.text for row in rows(path)] == ['"He said', 'so" he did']


def test_rows_are_counted_as_they_are_read_whatever_the_lines(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text('path,text\na.wav,"two\nlines"\n\nb.wav,one,more\nc.wav,last')
    assert [row.id for row in rows(path)] == ["m.csv:1", "m.csv:2", "c"]


def test_a_csv_manifest_gives_all_its_columns(tmp_path):
    path = table(
        tmp_path / "m.csv",
        "audio,Transcript,split,speaker,language,start,end",
        'x/a.wav,"one, two",dev,s1,mr,1.5,3',
    )
    (row,) = rows(path)
    assert row == Row(
        id="x/a-1.50-3.00",
        path=str(tmp_path / "x" / "a.wav"),
        text="one, two",
        split="validation",
        speaker="s1",
        language="mr",
        start_seconds=1.5,
        end_seconds=3.0,
    )


@pytest.mark.parametrize("column", ["text", "sentence", "transcript"])
def test_text_is_found_in_any_of_its_columns(tmp_path, column):
    path = table(tmp_path / "m.csv", f"path,{column}", "a.wav, word ")
    assert rows(path)[0].text == "word"


def test_json_lines_give_rows_and_name_the_bad_ones(tmp_path):
    good = json.dumps({"audio": "a.wav", "text": "ठीक", "speaker": 7}, ensure_ascii=False)
    path = table(tmp_path / "m.jsonl", good, "{broken", '["list"]', '{"text": "no path"}', "")
    result = rows(path)
    assert [row.problem for row in result] == ["", *["malformed row"] * 3]
    assert (result[0].text, result[0].speaker) == ("ठीक", "7")
    assert [row.id for row in result[1:]] == ["m.jsonl:2", "m.jsonl:3", "m.jsonl:4"]


def test_rows_with_missing_cells_and_unbalanced_quotes_are_malformed_not_lost(tmp_path):
    path = table(tmp_path / "m.csv", "path,text,split", "a.wav,x", 'b.wav,"x', 'c.wav,y,"')
    result = rows(path)
    assert [row.problem for row in result] == ["malformed row", "malformed row"]
    assert "2 cells under 3 columns" in result[0].detail
    assert "over several lines" in result[1].detail or "cells" in result[1].detail


def test_bytes_that_are_not_utf8_spoil_only_their_row(tmp_path):
    (tmp_path / "m.csv").write_bytes(b"\xef\xbb\xbfpath,text\na.wav,caf\xe9\nb.wav,fine\n")
    assert [row.problem for row in rows(tmp_path / "m.csv")] == ["malformed row", ""]


def test_bad_times_and_unknown_splits_are_problems_of_their_row(tmp_path):
    path = table(
        tmp_path / "m.csv",
        "path,text,start,end,split",
        "a.wav,x,soon,,",
        "b.wav,x,-1,2,",
        "c.wav,x,0,inf,",
        "d.wav,x,nan,,",
        "e.wav,x,,,holdout",
        "f.wav,x,,,",
    )
    problems = [row.problem for row in rows(path)]
    assert problems == [*["malformed row"] * 4, "unknown split", ""]


def test_paths_that_leave_the_source_folder_are_a_problem(tmp_path):
    outside = touch(tmp_path / "outside" / "a.wav")
    inside = touch(tmp_path / "data" / "in.wav")
    (tmp_path / "data" / "link.wav").symlink_to(outside)
    path = table(
        tmp_path / "data" / "m.csv",
        "path,text",
        "../outside/a.wav,x",
        f"{outside},x",
        "link.wav,x",
        f"{inside},x",
        "in.wav,x",
        "sub/../in.wav,x",
    )
    leaves = reasons.OUTSIDE_SOURCE
    assert [row.problem for row in rows(path)] == [leaves, leaves, leaves, "", "", ""]


def test_an_audiofolder_takes_splits_from_its_paths(tmp_path):
    table(
        tmp_path / "metadata.csv",
        "file_name,transcription",
        "train/a.wav,x",
        "test/b.wav,y",
        "c.wav,z",
    )
    assert [(row.id, row.split) for row in rows(tmp_path)] == [
        ("train/a", "train"),
        ("test/b", "test"),
        ("c", ""),
    ]


def test_an_audiofolder_may_have_metadata_in_each_split(tmp_path):
    for split in ("train", "test", "validation"):
        table(tmp_path / split / "metadata.csv", "file_name,text", f"{split}.wav,x")
    result = rows(tmp_path)
    assert {row.id: row.split for row in result} == {
        "test": "test",
        "train": "train",
        "validation": "validation",
    }
    assert result[0].path == str(tmp_path / "test" / "test.wav")


def test_folders_below_the_first_level_tell_their_split_too(tmp_path):
    root = tmp_path / "test"  # what lies above the source tells nothing
    names = ["data/train/a.wav", "audio/Dev/s1/b.wav", "x/c.wav", f"{root}/data/test/d.wav"]
    names += ["train-clean-100/e.wav", "x/test_other/f.wav", "Evaluation/g.wav", "testimony/h.wav"]
    table(root / "metadata.csv", "file_name,text", *(f"{name},x" for name in names))
    splits = ["train", "validation", "", "test", "train", "test", "validation", ""]
    assert [row.split for row in rows(root)] == splits


def test_metadata_may_lie_at_any_depth_and_be_spelt_in_capitals(tmp_path, capsys):
    table(tmp_path / "data" / "train" / "Metadata.CSV", "file_name,text", "a.wav,x")
    table(
        tmp_path / "data" / "test" / "s1" / "metadata.jsonl", '{"file_name": "b.wav", "text": "y"}'
    )
    table(tmp_path / "other" / "metadata.csv", "file_name,text", "c.wav,z")
    assert [(row.id, row.split) for row in rows(tmp_path)] == [
        ("b", "test"),
        ("a", "train"),
        ("c", ""),
    ]
    table(tmp_path / "metadata.csv", "file_name,text", "data/train/a.wav,x")
    assert [row.split for row in rows(tmp_path)] == ["train"]
    assert "metadata files in its subfolders are not" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda folder: folder / "nowhere",
            "--source .*nowhere does not exist: give a Common Voice",
        ),
        (
            lambda folder: touch(folder / "a.xlsx"),
            "--source .*a.xlsx has no known form: give a Common Voice",
        ),
        (lambda folder: folder, "--source .* has no known form: give a Common Voice"),
        (
            lambda folder: table(folder / "x" / "m.csv", "path,text").parent,
            r"--source .*: give the manifest itself \(--source .*m.csv\)",
        ),
    ],
)
def test_what_is_no_source_is_refused_with_the_forms_that_are(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        sources.find(str(make(tmp_path)))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("path,words", "lacks a text column .*; its columns are path, words: rename one"),
        ("id,text", "lacks an audio path column"),
        ("", "its columns are none"),
    ],
)
def test_a_table_without_the_needed_columns_is_refused(tmp_path, header, message):
    with pytest.raises(UserError, match=message):
        rows(table(tmp_path / "m.csv", header, "a,b"))


def test_the_key_of_a_row_changes_with_its_text_and_with_its_file(tmp_path):
    path = touch(tmp_path / "a.wav")
    row = Row("a", path=str(path), text="x")
    keys = {row.key(), Row("a", path=str(path), text="y").key()}
    path.write_bytes(b"longer")
    keys.add(row.key())
    path.unlink()
    keys.add(row.key())
    assert len(keys) == 4


def test_reading_is_lazy(tmp_path):
    with (tmp_path / "m.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "text"])
        writer.writerows([[f"{number}.wav", "x"] for number in range(50_000)])
    stream = sources.read(sources.find(str(tmp_path / "m.csv")))
    assert next(stream).id == "0"
    assert sources.fingerprint(sources.find(str(tmp_path / "m.csv")))[1] == 50_000


# ------ Hub, by way of a folder that datasets loads with the same call


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("hub")
    soundfile.write(folder / "tone.wav", np.sin(np.arange(16_000) / 10), 16_000)
    audio = (folder / "tone.wav").read_bytes()
    (folder / "tone.wav").unlink()
    for split, count in (("train", 3), ("test", 1)):
        records = {
            "audio": [{"bytes": audio, "path": f"{split}{i}.wav"} for i in range(count)],
            "transcription": [f"text {i}" for i in range(count)],
            "language": ["Marathi"] * count,
            "speaker_id": list(range(count)),
        }
        dataset = datasets.Dataset.from_dict(records)
        dataset = dataset.cast_column("audio", datasets.Audio(decode=False))
        dataset.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def test_a_hub_dataset_is_streamed_with_its_splits(hub_folder):
    result = rows(f"hub:{hub_folder}")
    assert [(row.id, row.split, row.speaker) for row in result] == [
        ("train0", "train", "0"),
        ("train1", "train", "1"),
        ("train2", "train", "2"),
        ("test0", "test", "0"),
    ]
    assert result[0].audio[:4] == b"RIFF" and not result[0].problem
    assert (result[0].text, result[0].language) == ("text 0", "Marathi")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"audio_column": "sound"},
            "--hub_audio_column sound is not a column .* give one of audio",
        ),
        ({"text_column": "words"}, "--hub_text_column words is not a column"),
    ],
)
def test_a_wrong_hub_column_is_refused_with_those_there_are(hub_folder, options, message):
    with pytest.raises(UserError, match=message):
        rows(f"hub:{hub_folder}", **options)


def test_a_hub_dataset_that_cannot_be_reached_is_one_line(monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="--source hub:nobody/nothing:mr_in cannot be") as error:
        rows("hub:nobody/nothing:mr_in")
    assert "\n" not in str(error.value) and "check its name" in str(error.value)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"),
        ("train.clean.100", "train"),
        ("test_other", "test"),
        ("dev-clean", "validation"),
        ("Test set", "test"),
        ("other", ""),
    ],
)
def test_hub_split_names_are_understood(name, split):
    assert hub.split_of(name) == split


def parquet(folder, records):
    """A folder of one parquet file of records, whose audio column is as given."""
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict(records)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    made.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return f"hub:{folder}"


SAMPLES = [round(0.3 * float(np.sin(i / 5)), 4) for i in range(4_000)]


@pytest.mark.parametrize(
    ("audio", "channels"),
    [
        ({"array": SAMPLES, "path": "a.wav", "sampling_rate": 8_000}, 1),
        ({"array": SAMPLES, "path": "a.wav", "sampling_rate": 8_000.0}, 1),
        ({"array": SAMPLES, "sample_rate": 8_000}, 1),
        ({"array": [SAMPLES, SAMPLES], "path": "a.wav", "sampling_rate": 8_000}, 2),
        ({"array": [round(32_768 * sample) for sample in SAMPLES], "sampling_rate": 8_000}, 1),
    ],
)
def test_arrays_of_samples_are_read_at_their_rate(tmp_path, audio, channels):
    (row,) = rows(parquet(tmp_path, {"audio": [audio], "text": ["x"]}))
    samples, rate = soundfile.read(io.BytesIO(row.audio), always_2d=True)
    assert (rate, samples.shape, row.problem) == (8_000, (4_000, channels), "")
    assert np.abs(samples[:, 0] - SAMPLES).max() < 1e-4


def test_a_list_of_samples_needs_a_rate(tmp_path):
    records = {"audio": [SAMPLES], "text": ["x"]}
    with pytest.raises(UserError, match="--hub_audio_column audio: holds samples without a sampl"):
        rows(parquet(tmp_path / "without", records))
    (row,) = rows(parquet(tmp_path / "with", {**records, "sampling_rate": [8_000]}))
    assert soundfile.info(io.BytesIO(row.audio)).samplerate == 8_000


@pytest.mark.parametrize("array", [[100_000, 3], [["x"]]])
def test_an_array_that_is_no_sound_is_a_problem_of_its_row(tmp_path, array):
    audio = {"array": array, "sampling_rate": 8_000}
    (row,) = rows(parquet(tmp_path, {"audio": [audio], "text": ["x"]}))
    assert row.problem == "malformed row" and "audio array" in row.detail


@pytest.mark.parametrize("place", ["clips", "data/clips"])
@pytest.mark.parametrize("is_text", [True, False])
def test_paths_in_local_parquet_are_relative_to_its_folder(tmp_path, place, is_text):
    path = touch(tmp_path / place / "a.wav")
    audios = ["clips/a.wav", "../b.wav", str(path)]
    if not is_text:
        audios = [{"path": name, "bytes": None} for name in audios]
    result = rows(parquet(tmp_path, {"audio": audios, "text": ["x", "y", "z"]}))
    assert [row.problem for row in result] == ["", reasons.OUTSIDE_SOURCE, ""]
    assert result[0].path == result[2].path == str(path)


def test_a_folder_that_save_to_disk_wrote_is_a_source(tmp_path):
    datasets = pytest.importorskip("datasets")
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(16_000) / 10), 16_000)
    audio = [{"bytes": (tmp_path / "a.wav").read_bytes(), "path": "a.wav"}]
    made = datasets.Dataset.from_dict({"audio": audio, "text": ["x"]})
    made = made.cast_column("audio", datasets.Audio(decode=False))
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "two")
    for name in ("one", "two"):
        for prefix in ("", "hub:"):
            result = rows(f"{prefix}{tmp_path / name}")
            splits = {"one": ["train"], "two": ["train", "test"]}[name]
            assert [(row.id, row.split, row.audio[:4]) for row in result] == [
                ("a", split, b"RIFF") for split in splits
            ]


def test_parquet_that_is_given_without_hub_is_refused_with_the_remedy(tmp_path):
    parquet(tmp_path, {"audio": [SAMPLES], "text": ["x"]})
    with pytest.raises(UserError, match=rf"--source hub:{tmp_path}\)"):
        sources.find(str(tmp_path))
    with pytest.raises(UserError, match=r"give hub:.*data$"):
        sources.find(str(tmp_path / "data" / "train-00000-of-00001.parquet"))


def test_times_and_channels_in_a_hub_dataset_are_reported_as_unused(tmp_path, capsys):
    audio = {"array": SAMPLES, "sampling_rate": 8_000}
    rows(parquet(tmp_path, {"audio": [audio], "text": ["x"], "begin_time": [1.5], "channel": [0]}))
    assert "is used whole: begin_time, channel are ignored" in capsys.readouterr().out
