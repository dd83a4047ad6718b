"""preprocess.py: drops, splits, restarts, refusals, the data on disk and its copy on S3."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import datasets
import launch
import numpy as np
import psutil
import pyarrow as pa
import pytest
import soundfile
from datasets import load_from_disk
from tiny import make_tokenizer

import preprocess
from common import audio, labels
from common import prepared as prepared_data
from common.cli import UserError
from prepare import first_pass, output, parts, reasons, second_pass, splits, upload, writer

ROOT = launch.ROOT
HINDI = ROOT.parent / "shared" / "data" / "hindi-common-voice"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer(folder)
    return str(folder)


def noise(path, seconds=1.0, seed=0, rate=16_000):
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(seed).normal(0, 0.1, round(seconds * rate))
    soundfile.write(path, samples, rate)
    return path


def manifest(folder, records, name="m.jsonl"):
    """Write `records`; a clip of its own noise for every path that has no file yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, record in enumerate(records):
        path = folder / record["path"]
        if record.pop("make", True) and not path.exists():
            noise(path, seed=seed)
    lines = [json.dumps({"text": "text", **record}, ensure_ascii=False) for record in records]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / name)


def run(source, model, output_dir, **options):
    options = {"language": "mr", "num_workers": 1, "test_fraction": 0.0} | options
    options = {"validation_fraction": 0.0} | options
    preprocess.main(
        preprocess.Config(source=source, model=model, output_dir=str(output_dir), **options)
    )
    return json.loads((output_dir / "preprocess.json").read_text())


def dropped(output_dir):
    lines = (output_dir / "dropped.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["id"]: line["reason"] for line in map(json.loads, lines)}


def tree(folder):
    """Path -> content hash of everything in a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ------ the data on disk


def test_rows_hold_what_the_contract_says(tmp_path, model):
    records = [
        {"path": "a.wav", "text": "  मराठी  भाषा ", "speaker": "s1"},
        {"path": "b.wav", "text": "two", "language": "English", "split": "test"},
    ]
    records[0]["language"] = "mr-IN"
    source = manifest(tmp_path / "data", records)
    report = run(source, model, tmp_path / "out", audio_bits=16, language="")
    loaded = load_from_disk(tmp_path / "out")
    assert set(loaded) == {"train", "test"}
    assert loaded["train"].features == prepared_data.FEATURES
    row = loaded["train"][0]
    assert (row["id"], row["text"], row["language"]) == ("a", "मराठी  भाषा", "mr")
    assert (row["speaker"], row["seconds"]) == ("s1", 1.0)
    pcm, rate = soundfile.read(tmp_path / "data" / "a.wav", dtype="int16")
    assert rate == 16_000 and (audio.decode_flac(row["audio"]) == pcm).all()
    assert loaded["test"][0]["language"] == "en"
    assert report["languages"] == ["en", "mr"]
    assert load_from_disk(tmp_path / "out" / "test").num_rows == 1


def test_labels_are_exactly_what_the_whisper_tokenizer_writes(tmp_path, model):
    text = "एक, दोन (3) ok!"
    run(manifest(tmp_path, [{"path": "a.wav", "text": text}]), model, tmp_path / "out")
    tokenizer = labels.load_tokenizer(model, "mr", "transcribe")
    tokenizer.set_prefix_tokens(language="mr", task="transcribe", predict_timestamps=False)
    row = load_from_disk(tmp_path / "out")["train"][0]
    assert row["labels"] == tokenizer(f" {text}").input_ids
    assert (
        row["labels"][0] == tokenizer.convert_tokens_to_ids(labels.START) != tokenizer.bos_token_id
    )
    assert tokenizer.decode(row["labels"], skip_special_tokens=True) == f" {text}"


def test_english_only_labels_name_no_language_and_no_task(tmp_path, english_model):
    source = manifest(tmp_path, [{"path": "a.wav", "text": "hi"}])
    run(source, english_model, tmp_path / "out", language="")
    tokenizer = labels.load_tokenizer(english_model)
    row = load_from_disk(tmp_path / "out")["train"][0]
    expected = tokenizer.convert_tokens_to_ids([labels.START, labels.NO_TIMESTAMPS, "Ġ", "h", "i"])
    assert row["labels"] == [*expected, tokenizer.convert_tokens_to_ids(labels.END)]
    assert row["language"] == "en"


def test_segments_of_one_file_become_clips_of_their_own(tmp_path, model):
    noise(tmp_path / "long.wav", seconds=5)
    records = [
        {"path": "long.wav", "start": 0, "end": 2},
        {"path": "long.wav", "start": 2, "end": 3.5},
        {"path": "long.wav", "start": 4.95, "end": 9},
        {"path": "long.wav", "start": 7, "end": 9},
    ]
    run(manifest(tmp_path, records), model, tmp_path / "out")
    train = load_from_disk(tmp_path / "out")["train"]
    assert train["id"][:] == ["long-0.00-2.00", "long-2.00-3.50"]
    assert train["seconds"][:] == [2.0, 1.5]
    assert dropped(tmp_path / "out") == {
        "long-4.95-9.00": "shorter than min_seconds",
        "long-7.00-9.00": "empty audio",
    }


def test_ids_are_unique_whatever_the_paths(tmp_path, model):
    paths = ["a.wav", "a.flac", "a#2.wav", "a.ogg"]
    run(manifest(tmp_path, [{"path": path} for path in paths]), model, tmp_path / "out")
    assert load_from_disk(tmp_path / "out")["train"]["id"][:] == ["a", "a#3", "a#2", "a#4"]


def test_the_output_does_not_depend_on_where_parts_end(tmp_path, model, monkeypatch):
    names = [f"{i % 10}.{('wav', 'flac', 'ogg')[i // 10]}" for i in range(30)]
    names[1] = "0#2.wav"
    records = [
        {"path": name, "text": f"text {i % 7}", "split": ("test", "train", "dev")[i // 2 % 3]}
        for i, name in enumerate(names)
    ]
    sound = noise(tmp_path / names[3]).read_bytes()
    for i in range(8, 30, 9):  # in three other parts
        (tmp_path / names[i]).write_bytes(sound)
    source = manifest(tmp_path, records)
    run(source, model, tmp_path / "one_part", forbid_text_overlap=True)
    monkeypatch.setattr(parts, "PART_CLIPS", 4)
    run(source, model, tmp_path / "eight_parts", forbid_text_overlap=True)
    assert tree(tmp_path / "eight_parts") == tree(tmp_path / "one_part")
    reasons = set(dropped(tmp_path / "one_part").values())
    assert reasons == {"duplicate audio", "audio also in another split", "text also in training"}
    loaded = load_from_disk(tmp_path / "one_part").values()
    ids = [name for split in loaded for name in split["id"]] + list(dropped(tmp_path / "one_part"))
    assert sorted(ids) == sorted({*ids}) and {"0", "0#2", "0#3", "0#4", "9#3"} <= set(ids)


def test_readers_give_columns_and_label_lengths_without_the_audio(tmp_path, model):
    texts = ["a", "abc", "ab"]
    records = [{"path": f"{text}.wav", "text": text} for text in texts]
    run(manifest(tmp_path, records), model, tmp_path / "out")
    loaded, record = prepared_data.load_prepared(str(tmp_path / "out"))
    assert record["config"]["language"] == "mr"
    assert prepared_data.column(loaded["train"], "seconds").tolist() == [1.0, 1.0, 1.0]
    assert prepared_data.label_lengths(loaded["train"]).tolist() == [7, 9, 8]
    assert prepared_data.label_lengths(loaded["train"].select([1, 0])).tolist() == [9, 7]


def test_a_split_is_cut_into_files_and_small_batches(tmp_path):
    row = {name: [b"x" * 1000] if name == "audio" else ["x"] for name in prepared_data.FEATURES}
    row |= {"seconds": [1.0], "labels": [[1, 2]]}
    schema = prepared_data.FEATURES.arrow_schema
    split_writer = writer.SplitWriter(tmp_path / "train", file_bytes=100_000)
    for number in range(200):
        batch = pa.RecordBatch.from_pydict({**row, "id": [str(number)]}, schema=schema)
        writer.add_rows(split_writer, batch)
    writer.close_split(split_writer, "0123456789abcdef")
    names = sorted(path.name for path in (tmp_path / "train").glob("*.arrow"))
    assert names == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    loaded = load_from_disk(tmp_path / "train")
    assert loaded["id"][:] == [str(number) for number in range(200)]
    assert [chunk.num_rows for chunk in loaded.data.to_batches()] == [64, 64, 64, 8]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "--data_dir .* does not exist: give the folder preprocess.py wrote"),
        (lambda folder: folder.mkdir(), "--data_dir .* holds no readable preprocess.json"),
    ],
)
def test_a_folder_that_is_not_prepared_is_refused(tmp_path, make, message):
    make(tmp_path / "out")
    with pytest.raises(UserError, match=message):
        prepared_data.load_prepared(str(tmp_path / "out"))


def test_a_prepared_folder_that_lost_a_file_is_refused(tmp_path, model):
    run(manifest(tmp_path, [{"path": "a.wav"}]), model, tmp_path / "out")
    next((tmp_path / "out" / "train").glob("*.arrow")).unlink()
    with pytest.raises(UserError, match=r"--data_dir .* is incomplete or damaged .*copy it again"):
        prepared_data.load_prepared(str(tmp_path / "out"))


# ------ drops


def test_every_unusable_clip_is_dropped_with_its_reason_and_the_rest_is_kept(tmp_path, model):
    data = tmp_path / "data"
    noise(data / "long.wav", seconds=31)
    noise(data / "short.wav", seconds=0.05)
    noise(tmp_path / "outside.wav")
    soundfile.write(data / "silent.wav", np.zeros(16_000), 16_000)
    soundfile.write(data / "none.wav", np.zeros(0), 16_000)
    (data / "corrupt.mp3").write_bytes(b"no audio" * 1000)
    (data / "zero.wav").touch()
    (data / "copy.wav").write_bytes(noise(data / "good.wav", seed=99).read_bytes())
    noise(data / "slow.wav", seconds=10, seed=98)
    expected = {
        "long": "longer than max_seconds",
        "short": "shorter than min_seconds",
        "silent": "empty audio",
        "none": "empty audio",
        "corrupt": "unreadable audio",
        "zero": "unreadable audio",
        "copy": "duplicate audio",
        "missing": "missing audio file",
        "x" * 300: "missing audio file",
        "empty": "empty text",
        "null": "empty text",
        "special": "text spells a special token",
        "fast": "text impossible for the duration",
        "slow": "labels over 448 tokens",
        "klingon": "unknown language",
        "odd": "unknown split",
        "../outside": "path leaves the source folder",
        "m.jsonl:20": "malformed row",
        "m.jsonl:21": "malformed row",
        "m.jsonl:22": "malformed row",
    }
    records = [
        {"path": "good.wav", "text": "good"},
        *({"path": f"{name}.wav", "text": name} for name in ("long", "short", "silent", "none")),
        {"path": "corrupt.mp3", "make": False},
        *({"path": f"{name}.wav", "text": name, "make": False} for name in ("zero", "copy")),
        {"path": "missing.wav", "make": False},
        {"path": "empty.wav", "text": "  "},
        {"path": "null.wav", "text": None},
        {"path": "special.wav", "text": "so <|endoftext|> it ends"},
        {"path": "fast.wav", "text": "x" * 41},
        {"path": "slow.wav", "text": "x" * 444},
        {"path": "klingon.wav", "language": "tlh"},
        {"path": "odd.wav", "split": "holdout"},
        {"path": "../outside.wav"},
        {"path": "last.wav", "text": "x" * 40},
        {"path": "x" * 300 + ".wav", "make": False},
    ]
    for record in records:
        record.setdefault("language", "mr")
    source = Path(manifest(data, records))
    bad = ["{", '{"path": "nul\\u0000.wav", "text": "x"}', '{"path": "u.wav", "text": "\\ud800"}']
    source.write_text(source.read_text() + "\n".join(bad) + "\n")
    report = run(str(source), model, tmp_path / "out", language="")
    reasons_by_id = dropped(tmp_path / "out")
    assert reasons_by_id == expected
    assert load_from_disk(tmp_path / "out")["train"]["id"][:] == ["good", "last"]
    assert report["clips"] == {"read": 22, "kept": 2, "dropped": 20}
    assert sum(report["dropped"].values()) == 20 and report["dropped"]["empty audio"] == 2


def test_samples_that_are_not_between_minus_one_and_one_are_not_clipped_to_a_square(
    tmp_path, model
):
    for name, loud in (("integers", 20_000), ("overshoot", 1.5)):
        samples = loud * np.sin(np.arange(16_000) / 10)
        soundfile.write(tmp_path / f"{name}.wav", samples, 16_000, subtype="FLOAT")
    run(
        manifest(tmp_path, [{"path": "integers.wav"}, {"path": "overshoot.wav"}]),
        model,
        tmp_path / "out",
    )
    assert dropped(tmp_path / "out") == {"integers": "unreadable audio"}


def test_448_labels_are_kept(tmp_path, model):
    noise(tmp_path / "a.wav", seconds=20)
    text = "x" * (448 - 6)  # four tokens of the prompt, a space and the end
    run(manifest(tmp_path, [{"path": "a.wav", "text": text}]), model, tmp_path / "out")
    loaded = load_from_disk(tmp_path / "out")["train"]
    assert prepared_data.label_lengths(loaded).tolist() == [448]


def test_m4a_without_pyav_is_counted_with_the_remedy(tmp_path, model, monkeypatch, capsys):
    (tmp_path / "a.m4a").write_bytes(b"\x00\x00\x00\x18ftypM4A " + bytes(100))
    monkeypatch.setitem(sys.modules, "av", None)
    source = manifest(tmp_path, [{"path": "a.m4a"}, {"path": "b.wav"}])
    run(source, model, tmp_path / "out")
    assert dropped(tmp_path / "out") == {"a": "needs PyAV (pip install av)"}
    assert "1  needs PyAV (pip install av)" in capsys.readouterr().out


def test_a_held_out_clip_whose_audio_is_in_training_is_dropped(tmp_path, model):
    records = [
        {"path": "test.wav", "split": "test"},
        {"path": "valid.wav", "split": "dev"},
        {"path": "other.wav", "split": "test", "text": "TEXT "},
        {"path": "train.wav", "split": "train"},
        {"path": "both.wav", "split": "dev"},
        {"path": "both2.wav", "split": "test"},
    ]
    for name in ("test", "valid", "train"):
        noise(tmp_path / f"{name}.wav", seed=50)
    noise(tmp_path / "both.wav", seed=51)
    noise(tmp_path / "both2.wav", seed=51)
    report = run(manifest(tmp_path, records), model, tmp_path / "out")
    overlap = "audio also in another split"
    assert dropped(tmp_path / "out") == dict.fromkeys(("test", "valid", "both"), overlap)
    assert report["held_out_texts_in_training"] == 2
    details = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").open()]
    details = {line["id"]: line["detail"] for line in details}
    assert details["test"] == details["valid"] == "same audio as train"
    assert details["both"] == "same audio as both2"


def test_text_overlap_is_found_through_case_spacing_and_composition(tmp_path, model):
    records = [
        {"path": "a.wav", "text": "Café  Noir", "split": "train"},
        {"path": "b.wav", "text": "cafe\u0301 noir", "split": "test"},
        {"path": "c.wav", "text": "thé", "split": "test"},
        {"path": "d.wav", "text": "cafe noir", "split": "validation"},
    ]
    source = manifest(tmp_path, records)
    run(source, model, tmp_path / "kept")
    assert dropped(tmp_path / "kept") == {}
    run(source, model, tmp_path / "out", forbid_text_overlap=True)
    assert dropped(tmp_path / "out") == {"b": "text also in training"}


# ------ splits


def test_a_cut_by_speaker_never_divides_a_speaker(tmp_path, model):
    records = [{"path": f"{i}.wav", "speaker": f"s{i % 10}"} for i in range(40)]
    fractions = {"test_fraction": 0.2, "validation_fraction": 0.1}
    report = run(manifest(tmp_path, records), model, tmp_path / "out", **fractions)
    loaded = load_from_disk(tmp_path / "out")
    speakers = {name: set(split["speaker"]) for name, split in loaded.items()}
    assert {name: split.num_rows for name, split in loaded.items()} == {
        "train": 28,
        "validation": 4,
        "test": 8,
    }
    assert sum(map(len, speakers.values())) == 10 == len(set.union(*speakers.values()))
    assert report["splits_by"] == "speaker"


def test_one_speaker_is_cut_by_clip_with_a_note(tmp_path, model, capsys):
    records = [{"path": f"{i}.wav", "speaker": "s"} for i in range(20)]
    fractions = {"test_fraction": 0.2, "validation_fraction": 0.1}
    report = run(manifest(tmp_path, records), model, tmp_path / "out", **fractions)
    counts = {name: split["clips"] for name, split in report["splits"].items()}
    assert counts == {"train": 14, "validation": 2, "test": 4}
    assert "cut by clip" in capsys.readouterr().out


def test_a_source_with_a_test_split_keeps_it(tmp_path, model):
    records = [{"path": f"{i}.wav", "split": "test" if i < 2 else ""} for i in range(20)]
    report = run(manifest(tmp_path, records), model, tmp_path / "out", test_fraction=0.5)
    counts = {name: split["clips"] for name, split in report["splits"].items()}
    assert counts == {"train": 18, "test": 2} and report["splits_by"] == "found"


@pytest.mark.parametrize(("num_speakers", "unit"), [(9, "speaker"), (1, "clip")])
def test_a_source_without_validation_gets_it_from_training(
    tmp_path, model, capsys, num_speakers, unit
):
    records = [
        {"path": f"{i}.wav", "split": "test" if i < 2 else "train", "speaker": f"s{i % 9}"}
        for i in range(20)
    ]
    for record in records:
        record["speaker"] = f"s{int(record['speaker'][1:]) % num_speakers}"
    source = manifest(tmp_path, records)
    report = run(source, model, tmp_path / "out", validation_fraction=0.2, test_fraction=0.3)
    counts = {name: split["clips"] for name, split in report["splits"].items()}
    assert counts == {"train": 14, "validation": 4, "test": 2}
    assert report["splits_by"] == f"found, validation by {unit}"
    assert (
        f"no validation split: cut from training, validation by {unit}" in capsys.readouterr().out
    )
    loaded = load_from_disk(tmp_path / "out")
    assert set(loaded["test"]["id"]) == {"0", "1"}
    if unit == "speaker":
        assert not set(loaded["train"]["speaker"]) & set(loaded["validation"]["speaker"])


def facts_of(speakers):
    facts = np.zeros(len(speakers), splits.FACTS)
    facts["speaker_hash"] = speakers
    facts["id_hash"] = np.arange(len(speakers)) + 1000
    return facts


def test_the_seed_decides_the_cut_and_nothing_else_does():
    facts = facts_of(np.arange(200) % 50 + 1)
    first, _ = splits.cut(facts, (0.1, 0.1), seed=1)
    order = np.random.default_rng(0).permutation(200)
    shuffled, _ = splits.cut(facts[order], (0.1, 0.1), seed=1)
    assert (shuffled == first[order]).all()
    assert (splits.cut(facts, (0.1, 0.1), seed=2)[0] != first).any()


@pytest.mark.parametrize("num_clips", [1, 2, 3, 10])
@pytest.mark.parametrize("num_speakers", [0, 1, 2, 3, 9])
def test_a_cut_never_leaves_training_empty(num_clips, num_speakers):
    speakers = np.arange(num_clips) % num_speakers + 1 if num_speakers else np.zeros(num_clips)
    codes, _ = splits.cut(facts_of(speakers), (0.45, 0.45), seed=0)
    assert (codes == splits.TRAIN).any(), codes


def sizes_of(sizes, fractions, seed=0):
    """Clips of train, validation and test, for speakers with so many clips each."""
    speakers = np.repeat(np.arange(len(sizes)) + 1, sizes)
    codes, by = splits.cut(facts_of(speakers), fractions, seed)
    assert by == "speaker" and all(
        len(set(codes[speakers == speaker])) == 1 for speaker in speakers
    )
    return np.bincount(codes, minlength=4)[1:].tolist()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([20, 1, 1], [20, 1, 1]),
        ([1, 20, 1], [20, 1, 1]),
        ([8, 8, 8], [8, 8, 8]),
        ([50, 30, 10, 5, 5], [80, 10, 10]),
        ([88, 3, 3, 3, 3], [88, 6, 6]),
    ],
)
def test_whole_speakers_are_cut_as_near_to_the_fractions_as_they_allow(sizes, expected, seed):
    assert sizes_of(sizes, (0.1, 0.1), seed) == expected


def test_a_split_far_from_its_fraction_is_a_warning(tmp_path, model, capsys):
    records = [{"path": f"{i}.wav", "speaker": f"s{i % 3}"} for i in range(12)]
    fractions = {"test_fraction": 0.1, "validation_fraction": 0.3}
    report = run(manifest(tmp_path, records), model, tmp_path / "out", **fractions)
    assert report["fractions_missed"] == {"test": [0.1, 0.333]}
    shown = capsys.readouterr().out
    assert "warning: test has 33.3% of the clips instead of --test_fraction 10.0%" in shown
    assert "warning: validation" not in shown


def test_a_speaker_with_most_clips_stays_in_training():
    speakers = np.array([1] * 90 + [2] * 5 + [3] * 5)
    for seed in range(20):
        codes, _ = splits.cut(facts_of(speakers), (0.05, 0.05), seed)
        assert (codes[:90] == splits.TRAIN).all()


# ------ restarts


NUM_CLIPS = 1280  # 20 parts


def command(*words):
    return [sys.executable, str(ROOT / "preprocess.py"), *map(str, words)]


@pytest.fixture(scope="module")
def killed(tmp_path_factory, model):
    """The output of a run on two workers that was killed half-way and started again."""
    folder = tmp_path_factory.mktemp("killed")
    pool = np.random.default_rng(0).normal(0, 0.1, 32_000 + NUM_CLIPS)
    (folder / "data").mkdir()
    lines = ["path,text,speaker"]
    for i in range(NUM_CLIPS):
        soundfile.write(folder / "data" / f"{i}.wav", pool[i : i + 22_050], 22_050)
        lines.append(f"{i}.wav,text {i % 700},s{i % 30}")
    (folder / "data" / "m.csv").write_text("\n".join(lines) + "\n")
    words = ("--source", folder / "data" / "m.csv", "--language", "mr", "--model", model)
    words = command(*words, "--output_dir", folder / "out", "--num_workers", 2)
    finished = folder / "out.partial" / "parts"
    process = launch.start(words)
    deadline = time.monotonic() + 300
    while len(list(finished.glob("*.arrow"))) < 3 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    orphans = psutil.wait_procs(children, timeout=60)[1]
    number = len(list(finished.glob("*.arrow")))
    exists = (folder / "out").exists()
    (finished / "half.1234").write_bytes(b"what a killed worker leaves")
    again = launch.finish(words)
    assert again.returncode == 0, again.stderr
    assert len(children) >= 2 and not orphans, (children, orphans)
    return folder, process.returncode, number, exists, again.stdout


def test_a_killed_run_leaves_parts_and_no_output(killed):
    _, returncode, number, exists, _ = killed
    assert returncode == -signal.SIGKILL and not exists
    assert 3 <= number < NUM_CLIPS // parts.PART_CLIPS, number


def test_a_restart_uses_the_finished_parts_and_cleans_up(killed):
    folder, *_, stdout = killed
    assert "finished before" in stdout
    assert not (folder / "out.partial").exists()


def test_kill_and_restart_on_two_workers_gives_the_bytes_of_one_run_on_one_worker(killed, model):
    folder = killed[0]
    fractions = {"test_fraction": 0.1, "validation_fraction": 0.1}
    run(str(folder / "data" / "m.csv"), model, folder / "fresh", **fractions)
    assert tree(folder / "out") == tree(folder / "fresh")
    assert len(tree(folder / "out")) == 12


def test_a_result_that_was_half_written_is_written_again(tmp_path, model):
    source = manifest(tmp_path, [{"path": "a.wav"}])
    junk = tmp_path / "out.partial" / "result" / "train" / "data-00000.arrow"
    junk.parent.mkdir(parents=True)
    junk.write_bytes(b"half")
    run(source, model, tmp_path / "out")
    assert load_from_disk(tmp_path / "out")["train"].num_rows == 1


def test_a_finished_preparation_is_recognised(tmp_path, model, capsys):
    source = manifest(tmp_path, [{"path": "a.wav"}])
    run(source, model, tmp_path / "out")
    before = tree(tmp_path / "out")
    run(source, model, tmp_path / "out", num_workers=2)
    assert "holds this preparation already: nothing to do" in capsys.readouterr().out
    assert tree(tmp_path / "out") == before


def test_a_clip_that_changed_between_two_starts_is_prepared_again(tmp_path, model, monkeypatch):
    source = manifest(tmp_path, [{"path": "a.wav"}])
    with monkeypatch.context() as patch:
        patch.setattr(second_pass, "write_splits", lambda *words: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(source, model, tmp_path / "out")
    noise(tmp_path / "a.wav", seconds=2)
    run(source, model, tmp_path / "out")
    assert load_from_disk(tmp_path / "out")["train"]["seconds"][:] == [2.0]


def test_an_output_that_is_a_link_is_written_where_it_points(tmp_path, model):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    run(manifest(tmp_path / "data", [{"path": "a.wav"}]), model, tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert load_from_disk(tmp_path / "disk")["train"].num_rows == 1


def test_no_output_file_names_the_folder_of_the_audio(tmp_path, model):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "bad.mp3").write_bytes(b"no audio" * 100)
    records = [{"path": "bad.mp3"}, {"path": "../b.wav"}, {"path": "c.wav"}]
    run(manifest(tmp_path / "data", records), model, tmp_path / "out")
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file() and path.name != "preprocess.json":
            assert str(tmp_path).encode() not in path.read_bytes(), path


# ------ refusals


def test_another_configuration_in_the_output_is_refused_by_name(tmp_path, model):
    source = manifest(tmp_path, [{"path": "a.wav"}])
    run(source, model, tmp_path / "out")
    with pytest.raises(UserError) as error:
        run(source, model, tmp_path / "out", language="hi", max_seconds=20.0)
    message = str(error.value)
    assert "--language ('mr' there, 'hi' here), --max_seconds (30.0 there, 20.0 here)" in message
    assert "give another folder or remove it" in message


def test_a_source_that_changed_since_is_refused(tmp_path, model):
    run(manifest(tmp_path, [{"path": "a.wav"}]), model, tmp_path / "out")
    source = manifest(tmp_path, [{"path": "a.wav"}, {"path": "b.wav"}])
    with pytest.raises(UserError, match=r"--output_dir .* was prepared from --source .* changed"):
        run(source, model, tmp_path / "out")


def test_a_folder_of_other_files_is_not_written_into(tmp_path, model):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    with pytest.raises(UserError, match=r"--output_dir .* holds files that preprocess.py did not"):
        run(manifest(tmp_path, [{"path": "a.wav"}]), model, tmp_path / "out")


def test_two_runs_do_not_write_the_same_output(tmp_path):
    work = tmp_path / "out.partial"
    with (
        output.locked(work, "out"),
        pytest.raises(UserError, match="--output_dir out is being written by another"),
        output.locked(work, "out"),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"language": "marathy"}, r"--language 'marathy' .*: did you mean mr \(marathi\)\?"),
        ({"language": "xqz"}, "--language 'xqz' .* give a code such as hi"),
        ({"task": "summarise"}, "--task 'summarise' is not a task: give transcribe or translate"),
        ({"language": ""}, "--language is empty and row 1 of --source .* give --language"),
        ({"num_workers": 0}, "--num_workers 0: give 1 or more"),
        ({"max_seconds": 40.0}, "--max_seconds 40.0: give more than 0 and at most 30"),
        ({"test_fraction": 1.5}, "--test_fraction 1.5 and .* less than 1 together"),
        ({"source": ""}, "--source is empty: give a Common Voice folder"),
        ({"source": "nowhere"}, "--source nowhere does not exist"),
        ({"model": "./nowhere"}, "--model ./nowhere does not exist: give a checkpoint folder"),
        ({"s3_uri": "bucket/prefix"}, "--s3_uri bucket/prefix is not an S3 URI: write s3://"),
        ({"s3_uri": "s3://my-bucket/shared//mr"}, "write s3://my-bucket/shared/mr"),
        ({"s3_uri": "s3://My_Bucket/mr"}, "--s3_uri s3://My_Bucket/mr My_Bucket is no bucket"),
        ({"language": "yue"}, "--language yue .* is not among the languages of --model"),
    ],
)
def test_a_mistake_is_one_line_that_names_option_value_and_remedy(
    tmp_path, model, options, message
):
    source = manifest(tmp_path, [{"path": "a.wav"}])
    given = {"source": source, "model": model} | options
    with pytest.raises(UserError, match=message) as error:
        run(given.pop("source"), given.pop("model"), tmp_path / "out", **given)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_several_mistakes_are_told_at_once():
    with pytest.raises(UserError, match=r"--num_workers 0.*; --min_seconds -1.0"):
        preprocess.check(preprocess.Config(num_workers=0, min_seconds=-1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"language": "hi"},
            "--model .* is English-only and cannot take --language hi: give a multi",
        ),
        ({"language": "", "task": "translate"}, "English-only and cannot take --task translate"),
    ],
)
def test_an_english_only_model_takes_no_other_language(tmp_path, english_model, options, message):
    source = manifest(tmp_path, [{"path": "a.wav"}])
    with pytest.raises(UserError, match=message):
        run(source, english_model, tmp_path / "out", **options)


def test_an_english_only_model_refuses_a_source_in_another_language(tmp_path, english_model):
    source = manifest(tmp_path, [{"path": "a.wav", "language": "hi"}])
    with pytest.raises(UserError, match=r"English-only, and row 1 of --source .* is in hi"):
        run(source, english_model, tmp_path / "out", language="")


def test_no_clips_left_is_an_error_that_says_why_and_leaves_nothing(tmp_path, model):
    source = manifest(tmp_path, [{"path": "a.wav", "text": ""}, {"path": "b.wav", "make": False}])
    with pytest.raises(UserError, match=r"none of its 2 clips .1 empty text, 1 missing audio file"):
        run(source, model, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_source_without_rows_is_refused(tmp_path, model):
    (tmp_path / "m.csv").write_text("path,text\n")
    with pytest.raises(UserError, match=r"--source .*m.csv has no rows: give one with clips"):
        run(str(tmp_path / "m.csv"), model, tmp_path / "out")


def test_the_command_line_says_it_in_one_line_and_exits_with_2(tmp_path, model):
    words = ("--source", tmp_path / "no", "--model", model, "--language", "mr")
    done = subprocess.run(
        command(*words, "--output_dir", tmp_path / "out"), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --source {tmp_path / 'no'} does not exist: give")
    assert done.stderr.count("\n") == 1


@pytest.mark.root
def test_a_full_disk_is_one_line_and_the_run_can_be_continued(tmp_path, model):
    with launch.small_disk(tmp_path / "disk", "1m") as disk:
        records = [{"path": f"{i}.wav"} for i in range(80)]
        words = ("--source", manifest(tmp_path, records), "--model", model, "--language", "mr")
        words = command(*words, "--output_dir", disk / "out", "--num_workers", 1)
        done = launch.finish(words)
        assert done.returncode == 2 and done.stderr.startswith("error: the disk is full")
        assert not (disk / "out").exists()
        grow = ["mount", "-o", "remount,size=64m", str(disk)]
        subprocess.run(grow, check=True)
        assert launch.finish(words).returncode == 0


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_file_larger_than_the_system_allows_is_told_as_a_full_disk(tmp_path, model, num_workers):
    source = manifest(tmp_path, [{"path": f"{i}.wav"} for i in range(8)])
    words = ("--source", source, "--model", model, "--language", "mr")
    done = subprocess.run(
        command(*words, "--output_dir", tmp_path / "out", "--num_workers", num_workers),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert done.returncode == 2 and done.stderr.startswith("error: the disk is full"), done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_worker_that_is_killed_is_a_one_line_error():
    job = Future()
    job.set_exception(BrokenProcessPool())
    with pytest.raises(UserError, match=r"--num_workers 8: a worker was killed.*give fewer"):
        first_pass.wait_for(first_pass.PendingPart(Path("part"), 64, job), num_workers=8)


# ------ Hub


def test_a_hub_dataset_is_prepared_like_any_other(tmp_path, model):
    wav = noise(tmp_path / "a.wav", seconds=2, rate=44_100).read_bytes()
    audios = [{"bytes": wav, "path": "a.wav"}, {"bytes": b"no audio", "path": "b.wav"}]
    records = {"audio": audios, "transcription": ["एक", "दोन"], "language": ["Marathi"] * 2}
    hub = datasets.Dataset.from_dict(records).cast_column("audio", datasets.Audio(decode=False))
    hub.to_parquet(tmp_path / "hub" / "train.parquet")
    source = f"hub:{tmp_path / 'hub'}"
    run(source, model, tmp_path / "out", language="")
    (row,) = load_from_disk(tmp_path / "out")["train"]
    assert (row["id"], row["text"], row["language"], row["seconds"]) == ("a", "एक", "mr", 2.0)
    assert dropped(tmp_path / "out") == {"b": "unreadable audio"}


# ------ languages


def test_a_locale_gives_way_to_the_language_option(tmp_path, model):
    noise(tmp_path / "clips" / "a.wav")
    header = "client_id\tpath\tsentence\tlocale"
    (tmp_path / "validated.tsv").write_text(f"{header}\ns\ta.wav\ttext\thi-IN\n")
    run(str(tmp_path), model, tmp_path / "own", language="")
    run(str(tmp_path), model, tmp_path / "given", language="Marathi")
    languages = [load_from_disk(tmp_path / out)["train"][0]["language"] for out in ("own", "given")]
    assert languages == ["hi", "mr"]


@pytest.mark.parametrize("form", ["manifest", "audiofolder", "hub"])
def test_the_language_option_is_that_of_all_rows_whatever_they_say(tmp_path, model, capsys, form):
    wav = noise(tmp_path / "data" / "a.wav").read_bytes()
    other = noise(tmp_path / "data" / "b.wav", seed=1).read_bytes()
    lines = '{"file_name": "a.wav", "text": "x", "language": "sw"}\n'
    lines += '{"file_name": "b.wav", "text": "y", "language": "lug"}\n'
    (tmp_path / "data" / "metadata.jsonl").write_text(lines)
    audios = [{"bytes": wav, "path": "a.wav"}, {"bytes": other, "path": "b.wav"}]
    records = {"audio": audios, "text": ["x", "y"], "language": ["sw", "lug"]}
    hub = datasets.Dataset.from_dict(records).cast_column("audio", datasets.Audio(decode=False))
    hub.to_parquet(tmp_path / "hub" / "train.parquet")
    source = {
        "manifest": str(tmp_path / "data" / "metadata.jsonl"),
        "audiofolder": str(tmp_path / "data"),
        "hub": f"hub:{tmp_path / 'hub'}",
    }[form]
    run(source, model, tmp_path / "out", language="cy")
    assert load_from_disk(tmp_path / "out")["train"]["language"][:] == ["cy", "cy"]
    assert "--language cy is used for all rows, although row 1 says sw" in capsys.readouterr().out


def test_a_language_of_a_hub_dataset_may_be_a_class_label(tmp_path, model):
    audios = [
        {"bytes": noise(tmp_path / f"{i}.wav", seed=i).read_bytes(), "path": f"{i}.wav"}
        for i in range(2)
    ]
    records = {"audio": audios, "text": ["x", "y"], "language": [1, 0]}
    hub = datasets.Dataset.from_dict(records).cast_column("audio", datasets.Audio(decode=False))
    hub = hub.cast_column("language", datasets.ClassLabel(names=["en", "hr"]))
    hub.to_parquet(tmp_path / "hub" / "train.parquet")
    run(f"hub:{tmp_path / 'hub'}", model, tmp_path / "out", language="")
    assert load_from_disk(tmp_path / "out")["train"]["language"][:] == ["hr", "en"]


def test_a_language_that_all_rows_have_and_whisper_lacks_is_refused_with_a_related_one(
    tmp_path, model
):
    source = manifest(tmp_path, [{"path": "a.wav", "language": "ga-IE"}])
    message = (
        r"none of its 1 clips \(1 unknown language; .*ga-IE\): --language: .* such as cy \(welsh\)"
    )
    with pytest.raises(UserError, match=message):
        run(source, model, tmp_path / "out", language="")


# ------ S3


def test_upload_sends_everything_once_and_the_record_last(tmp_path, model, bucket, capsys):
    source = manifest(tmp_path, [{"path": "a.wav"}])
    run(source, model, tmp_path / "out", s3_uri="s3://speech/mr/v1")
    assert "s3://speech/mr/v1: 6 files sent, 0 were there already" in capsys.readouterr().out
    stored = bucket.list_objects_v2(Bucket="speech")["Contents"]
    assert {item["Key"] for item in stored} == {f"mr/v1/{name}" for name in tree(tmp_path / "out")}
    newest = max(stored, key=lambda item: item["LastModified"])["LastModified"]
    assert (
        newest == bucket.head_object(Bucket="speech", Key="mr/v1/preprocess.json")["LastModified"]
    )
    arrow = next(item["Key"] for item in stored if item["Key"].endswith(".arrow"))
    bucket.delete_object(Bucket="speech", Key="mr/v1/preprocess.json")
    bucket.put_object(Bucket="speech", Key=arrow, Body=b"cut off")
    run(source, model, tmp_path / "out", s3_uri="s3://speech/mr/v1")
    assert "2 files sent, 4 were there already" in capsys.readouterr().out
    body = bucket.get_object(Bucket="speech", Key=arrow)["Body"].read()
    assert body == (tmp_path / "out" / arrow.removeprefix("mr/v1/")).read_bytes()


def test_upload_in_parts_keeps_the_content(tmp_path, bucket):
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "a").write_bytes(os.urandom(9 * 2**20))
    (tmp_path / "big" / "z.json").write_text("{}")
    assert upload.send_folder(tmp_path / "big", "s3://speech", last="z.json") == (2, 0)
    body = bucket.get_object(Bucket="speech", Key="a")["Body"].read()
    assert body == (tmp_path / "big" / "a").read_bytes()
    assert upload.send_folder(tmp_path / "big", "s3://speech", last="z.json") == (0, 2)


def test_upload_does_not_mix_two_datasets(tmp_path, model, bucket):
    source = manifest(tmp_path, [{"path": "a.wav"}])
    run(source, model, tmp_path / "one", s3_uri="s3://speech/x")
    with pytest.raises(UserError, match="--s3_uri s3://speech/x holds another dataset"):
        run(source, model, tmp_path / "two", s3_uri="s3://speech/x", language="hi")


def test_a_missing_bucket_is_found_before_the_work_starts(tmp_path, model, bucket):
    source = manifest(tmp_path, [{"path": "a.wav"}])
    with pytest.raises(UserError, match=r"--s3_uri s3://nobucket/x: .*Not Found: check the bucket"):
        run(source, model, tmp_path / "out", s3_uri="s3://nobucket/x")
    assert not (tmp_path / "out").exists()


def test_missing_credentials_are_named(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match="--s3_uri s3://speech/x: no AWS credentials found: set"):
        upload.check("s3://speech/x")


# ------ real speech


@pytest.mark.skipif(not HINDI.is_dir(), reason="the Hindi clips are not here")
def test_real_mp3_clips_keep_their_length_and_fit_in_far_less_than_padded_features(tmp_path, model):
    data = tmp_path / "data"
    data.mkdir()
    (data / "clips").symlink_to(HINDI / "clips")
    (data / "test.tsv").write_bytes((HINDI / "test.tsv").read_bytes())
    with pytest.raises(UserError, match="78 path leaves the source folder"):
        run(str(data), model, tmp_path / "out", language="hi", max_chars_per_second=40.0)
    (data / "clips").unlink()
    (data / "clips").mkdir()
    for path in sorted((HINDI / "clips").iterdir()):
        (data / "clips" / path.name).write_bytes(path.read_bytes())
    report = run(str(data), model, tmp_path / "out", language="hi")
    assert report["clips"]["kept"] == 78
    assert report["disk"]["times_smaller"] > 5, report["disk"]


def test_every_reason_of_a_source_is_known():
    assert len(set(reasons.REASONS)) == len(reasons.REASONS)
