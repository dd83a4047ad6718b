"""preprocess.py --num_shards: machines that share a disk, or only S3, make one dataset together."""

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import launch
import numpy as np
import pytest
import soundfile

import preprocess
from common import prepared as prepared_data
from common.cli import UserError
from prepare import meeting, parts

OPTIONS = {"language": "mr", "num_workers": 1, "shard_wait_minutes": 1.0}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def model(checkpoint):
    return checkpoint


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "PART_CLIPS", 4)


def corpus(folder, num_clips, *, splits=False):
    """Short noises with everything that reaches across shards: audio twice, ids twice, both."""
    folder.mkdir(parents=True)
    pool = np.random.default_rng(0).normal(0, 0.1, 8_000 + num_clips)
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    lines = ["path,text,speaker,split"]
    for at in range(num_clips):
        sound = 3 if at % 9 == 8 else at  # every ninth is one and the same clip
        name = f"{at % (num_clips // 3)}.{('wav', 'flac', 'ogg')[at // (num_clips // 3) % 3]}"
        if at == 1:
            name = "0#2.wav"
        if at % 17 == 16:
            name = f"lost{at}.wav"
        else:
            soundfile.write(folder / name, pool[sound : sound + 4_000 + sound], 16_000)
        split = ("test", "train", "train", "dev")[at // 2 % 4] if splits else ""
        lines.append(f"{name},text {at % 37},s{at % 11},{split}")
    (folder / "m.csv").write_text("\n".join(lines))  # no newline at the end
    return str(folder / "m.csv")


def config(source, model, output_dir, **options):
    return preprocess.Config(
        source=str(source), model=str(model), output_dir=str(output_dir), **OPTIONS | options
    )


def run_shards(source, model, output_dirs, **options):
    """All shards at once, each with its own of `output_dirs`."""
    configs = [
        config(source, model, output_dir, num_shards=len(output_dirs), shard=shard, **options)
        for shard, output_dir in enumerate(output_dirs)
    ]
    with ThreadPoolExecutor(len(configs)) as threads:
        list(threads.map(preprocess.main, configs))


def single_run(source, model, output_dir, **options):
    preprocess.main(config(source, model, output_dir, **options))
    return output_dir


def assert_same(sharded, single):
    """All that a reader sees is the same: rows in their order, drops, figures."""
    (found, recipe), (expected, expected_recipe) = (
        prepared_data.load_prepared(str(folder)) for folder in (sharded, single)
    )
    assert list(found) == list(expected)
    for name in expected:
        assert found[name].to_list() == expected[name].to_list(), name
        assert found[name]._fingerprint == expected[name]._fingerprint
    assert (sharded / "dropped.jsonl").read_text() == (single / "dropped.jsonl").read_text()
    for one in (recipe, expected_recipe):
        assert one.pop("disk")["bytes"] > 0
    assert recipe == expected_recipe


def drops(folder):
    return [json.loads(line) for line in (folder / "dropped.jsonl").open(encoding="utf-8")]


# ------ a shared disk


def start(source, model, output_dir, shard, num_shards):
    options = {"source": source, "model": model, "output_dir": output_dir, "shard": shard}
    options |= {"num_shards": num_shards} | OPTIONS
    return launch.start(launch.command("preprocess.py", options))


def test_three_processes_of_which_one_was_killed_write_what_one_run_writes(tmp_path, model):
    source = corpus(tmp_path / "data", 400)
    killed = start(source, model, tmp_path / "out", 2, 3)
    finished = tmp_path / "out.partial" / "parts"
    deadline = time.monotonic() + 300
    while not list(finished.glob("*.arrow")):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    num_kept = len(list(finished.glob("*.arrow")))
    processes = [start(source, model, tmp_path / "out", shard, 3) for shard in range(3)]
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert 1 <= num_kept <= 3 and "finished before" in said[2][0]
    assert "shard 0 is finished; shard 2 makes one dataset of all" in said[0][0]
    assert not (tmp_path / "out.partial").exists()
    single = single_run(source, model, tmp_path / "single")
    assert_same(tmp_path / "out", single)
    names = {path.name for path in (tmp_path / "out" / "train").glob("*.arrow")}
    assert names == {f"data-0000{shard}-of-00003-00000.arrow" for shard in range(3)}
    same_audio = [line for line in drops(single) if line["detail"] == "same audio as 3"]
    assert len(same_audio) > 20, "the audio of a clip of shard 0 occurs in all shards"
    ids = [
        name
        for split in prepared_data.load_prepared(str(single))[0].values()
        for name in split["id"]
    ]
    assert len(set(ids)) == len(ids) and {"0", "0#2", "0#3", "0#4", "6#2", "6#3"} <= set(ids)


@pytest.mark.parametrize("num_shards", [2, 5])
def test_splits_that_the_source_names_and_their_overlaps_are_the_same(
    tmp_path, model, small_parts, num_shards
):
    source = corpus(tmp_path / "data", 60, splits=True)
    options = {"forbid_text_overlap": True}
    run_shards(source, model, [tmp_path / "out"] * num_shards, **options)
    assert_same(tmp_path / "out", single_run(source, model, tmp_path / "single", **options))
    reasons = {line["reason"] for line in drops(tmp_path / "out")}
    assert {"duplicate audio", "audio also in another split", "text also in training"} <= reasons


def test_a_shard_without_parts_takes_part(tmp_path, model):
    source = corpus(tmp_path / "data", 6)
    run_shards(source, model, [tmp_path / "out"] * 3)
    assert_same(tmp_path / "out", single_run(source, model, tmp_path / "single"))


def test_shards_run_one_after_another_are_complete_after_the_second_time(
    tmp_path, model, small_parts
):
    source = corpus(tmp_path / "data", 30)
    shards = [
        config(source, model, tmp_path / "out", num_shards=3, shard=shard, shard_wait_minutes=0.0)
        for shard in range(3)
    ]
    for shard, missing in zip(shards, ("1, 2", "2", "0, 1"), strict=True):
        message = (
            rf"--shard_wait_minutes 0: of 3 shards these are not as far: {missing}: start them"
        )
        with pytest.raises(UserError, match=message):
            preprocess.main(shard)
    assert not (tmp_path / "out").exists()
    work = tmp_path / "out.partial"
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*.arrow")}
    assert len(before) > 8, "eight parts, and what the last shard has written"
    for shard in shards[:2]:
        preprocess.main(shard)
    after = {path: path.stat().st_mtime_ns for path in work.rglob("*.arrow")}
    assert before.items() < after.items(), "nothing is prepared or written again"
    preprocess.main(shards[2])
    assert_same(tmp_path / "out", single_run(source, model, tmp_path / "single"))


def test_a_shard_that_is_started_again_when_all_is_done_does_nothing(
    tmp_path, model, small_parts, capsys
):
    source = corpus(tmp_path / "data", 12)
    run_shards(source, model, [tmp_path / "out"] * 2)
    preprocess.main(config(source, model, tmp_path / "out", num_shards=2))
    assert "holds this preparation already: nothing to do" in capsys.readouterr().out
    assert not (tmp_path / "out.partial").exists()


def test_a_clip_that_changed_before_a_restart_is_never_joined_with_what_was_decided_before(
    tmp_path, model, small_parts
):
    source = corpus(tmp_path / "data", 12)
    options = {"num_shards": 2, "shard_wait_minutes": 0.0}
    first = config(source, model, tmp_path / "out", shard=0, **options)
    last = config(source, model, tmp_path / "out", shard=1, **options)
    for shard in (first, last):
        with pytest.raises(UserError, match="these are not as far"):
            preprocess.main(shard)
    preprocess.main(first)
    soundfile.write(tmp_path / "data" / "2.ogg", np.full(16_000, 0.5), 16_000)  # of the last
    with pytest.raises(UserError, match="these are not as far: 0: start them"):
        preprocess.main(last)
    preprocess.main(first)
    preprocess.main(last)
    assert_same(tmp_path / "out", single_run(source, model, tmp_path / "single"))


# ------ S3


def download(client, prefix, folder):
    for item in client.list_objects_v2(Bucket="speech")["Contents"]:
        path = folder / item["Key"].removeprefix(prefix)
        path.parent.mkdir(parents=True, exist_ok=True)
        client.download_file("speech", item["Key"], str(path))
    return folder


def test_machines_that_share_only_s3_leave_one_dataset_there(
    tmp_path, model, bucket, small_parts, capsys
):
    source = corpus(tmp_path / "data", 60, splits=True)
    folders = [tmp_path / f"machine{shard}" / "out" for shard in range(3)]
    run_shards(source, model, folders, s3_uri="s3://speech/mr/v1")
    assert "s3://speech/mr/v1 holds the dataset of all shards" in capsys.readouterr().out
    assert not any(folder.exists() for folder in folders)
    stored = bucket.list_objects_v2(Bucket="speech")["Contents"]
    assert all(item["Key"].startswith("mr/v1/") and "/." not in item["Key"] for item in stored)
    loaded = download(bucket, "mr/v1/", tmp_path / "copy")
    assert_same(loaded, single_run(source, model, tmp_path / "single"))
    again = config(source, model, folders[0], num_shards=3, s3_uri="s3://speech/mr/v1")
    preprocess.main(again)
    assert "s3://speech/mr/v1 holds this preparation already" in capsys.readouterr().out
    assert not list(folders[0].parent.iterdir()), "the parts kept for a restart are removed"
    with pytest.raises(UserError, match=r"--s3_uri .* holds another preparation: --language"):
        run_shards(source, model, folders, s3_uri="s3://speech/mr/v1", language="hi")


# ------ refusals


def test_a_shard_with_other_options_is_refused_by_name(tmp_path, model, small_parts):
    source = corpus(tmp_path / "data", 12)
    first = {"num_shards": 2, "shard_wait_minutes": 0.0}
    with pytest.raises(UserError, match="these are not as far: 1: start them"):
        preprocess.main(config(source, model, tmp_path / "out", **first))
    other = {"num_shards": 3, "shard": 2, "language": "hi"}
    message = (
        r"--shard 0 was started differently: --language \('mr' there, 'hi' here\), "
        r"--num_shards \(2 there, 3 here\): start all shards alike; to begin anew remove .*shards"
    )
    with pytest.raises(UserError, match=message) as caught:
        preprocess.main(config(source, model, tmp_path / "out", **other))
    assert "\n" not in str(caught.value)


def test_tables_that_differ_between_machines_are_refused(tmp_path, model, small_parts):
    source = corpus(tmp_path / "data", 12)
    options = {"num_shards": 2, "shard_wait_minutes": 0.0}
    with pytest.raises(UserError, match="not as far"):
        preprocess.main(config(source, model, tmp_path / "out", **options))
    with (tmp_path / "data" / "m.csv").open("a") as table:
        table.write("\n0.wav,one more,s0,")
    with pytest.raises(UserError, match="--shard 0 was started differently: the tables of --sou"):
        preprocess.main(config(source, model, tmp_path / "out", shard=1, **options))


def test_the_same_shard_is_not_run_twice_nor_beside_a_whole_run(tmp_path):
    work = tmp_path / "out.partial"
    with preprocess.locked(work, "out", 0), preprocess.locked(work, "out", 1):
        for shard in (0, None):
            message = "--output_dir out is being written by another"
            with pytest.raises(UserError, match=message), preprocess.locked(work, "out", shard):
                pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_shards": 0}, "--num_shards 0: give 1 or more"),
        ({"num_shards": 2, "shard": 2}, "--shard 2: give 0 or more, less than --num_shards 2"),
        ({"shard": 1}, "--shard 1: give 0 or more, less than --num_shards 1"),
        ({"shard_wait_minutes": -1.0}, "--shard_wait_minutes -1.0: give 0 or more"),
        ({"num_shards": 2, "source": "hub:x"}, "--num_shards 2: a Hub dataset is a stream .* give"),
    ],
)
def test_impossible_shards_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        preprocess.check(preprocess.Config(**options))


def test_no_clips_left_is_the_same_error_in_every_shard(tmp_path, model, small_parts):
    source = tmp_path / "m.csv"
    source.write_text("path,text\n" + "".join(f"{at}.wav,text\n" for at in range(6)))
    with pytest.raises(UserError, match=r"none of its 6 clips .6 missing audio file; the first, "):
        run_shards(source, model, [tmp_path / "out"] * 2)


# ------ the pieces


@pytest.mark.parametrize("num_rows", [1, 63, 64, 65, 1000, 6401])
@pytest.mark.parametrize("num_shards", [1, 2, 3, 7, 200])
def test_shards_cover_every_row_once_in_whole_parts(num_rows, num_shards):
    spans = [preprocess.span_of(shard, num_shards, num_rows) for shard in range(num_shards)]
    rows = [row for first, end in spans for row in range(first, end)]
    assert rows == list(range(num_rows))
    assert all(first % parts.PART_CLIPS == 0 for first, end in spans if first < end)


def test_the_wait_says_for_whom(tmp_path, capsys):
    meeting.put(tmp_path, "facts-1", b"x")
    with pytest.raises(UserError, match=r"--shard_wait_minutes 0.01: of 3 .* far: 0, 2: start"):
        meeting.wait(tmp_path, [f"facts-{at}" for at in range(3)], 0.01, bytes.decode)
    assert capsys.readouterr().out.count("waiting for shards 0, 2 after 0 s") == 1
