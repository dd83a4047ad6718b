"""--exclude: the clips that a list names are left out, and nothing else changes."""

import json

import pytest
from datasets import load_from_disk
from test_preprocess import dropped, manifest, model, run  # noqa: F401 (a fixture)

from common import cli
from prepare import exclude

CLIPS = [
    {"path": f"{name}.wav", "split": split, "text": f"text {name}"}
    for name, split in [("a", "train"), ("-b", "train"), ("c", "train"), ("d", "test")]
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    rows = [*CLIPS, CLIPS[2] | {"make": False}, {"path": "gone.wav", "make": False}]
    return manifest(tmp_path_factory.mktemp("source"), [dict(row) for row in rows])


def ids(folder):
    return {name: split["id"] for name, split in load_from_disk(folder).items()}


def write(path, content):
    path.write_text(content, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    "content",
    [
        '\ufeff"id","score"\r\n"\'-b","2.5"\r\n"d","1.0"\r\n',
        "sep=;\nscore;ID\n2.5;-b\n1.0;d\n",
        "reason\tid\na, b\t-b\n\td\n\t\n",
        "id\n-b\nd\n",
    ],
    ids=["audit.csv", "semicolons", "tabs", "a list"],
)
def test_ids_are_read_from_a_csv_of_any_separator_and_from_a_list(tmp_path, content):
    assert exclude.read_ids(write(tmp_path / "ids", content)) == {"-b", "d"}


def test_what_is_excluded_is_missing_and_counted_and_nothing_else_changes(
    source, model, tmp_path, capsys  # noqa: F811
):  # fmt: skip
    run(source, model, tmp_path / "all")
    assert ids(tmp_path / "all") == {"train": ["a", "-b", "c"], "test": ["d"]}
    file = write(tmp_path / "ids.csv", "id\n'-b\nd\nc#2\ngone\nnobody\n")
    capsys.readouterr()
    record = run(source, model, tmp_path / "less", exclude=file)
    assert ids(tmp_path / "less") == {"train": ["a", "c"]}
    assert record["dropped"]["excluded"] == 2
    assert {dropped(tmp_path / "less")[name] for name in ("-b", "d")} == {"excluded"}
    counts = {"ids": 5, "excluded": 2, "dropped_before": 2, "unknown": 1}
    assert record["exclude"] == counts
    printed = capsys.readouterr().out
    assert "--exclude: 5 ids, 2 of them of clips that are left out, 2 of clips dropped" in printed
    assert "warning: 1 ids of --exclude are of no clip" in printed


def test_a_clip_with_the_audio_of_an_excluded_one_does_not_take_its_place(source, model, tmp_path):  # noqa: F811
    file = write(tmp_path / "ids.csv", "id\nc\n")
    run(source, model, tmp_path / "less", exclude=file)
    assert ids(tmp_path / "less") == {"train": ["a", "-b"], "test": ["d"]}


def test_a_cut_by_speaker_stays_the_same_without_the_excluded_clips(model, tmp_path):  # noqa: F811
    rows = [{"path": f"{i}.wav", "speaker": f"speaker {i % 7}"} for i in range(21)]
    source = manifest(tmp_path / "source", rows)
    fractions = {"test_fraction": 0.3, "validation_fraction": 0.2}
    run(source, model, tmp_path / "all", **fractions)
    before = ids(tmp_path / "all")
    left_out = {clips[0] for clips in before.values()}
    file = write(tmp_path / "ids.csv", "\n".join(["id", *left_out]))
    run(source, model, tmp_path / "less", exclude=file, **fractions)
    after = {
        name: [clip for clip in clips if clip not in left_out] for name, clips in before.items()
    }
    assert ids(tmp_path / "less") == after


def test_another_list_is_another_preparation_and_the_same_list_elsewhere_is_not(
    source, model, tmp_path, capsys  # noqa: F811
):  # fmt: skip
    folder = tmp_path / "prepared"
    run(source, model, folder, exclude=write(tmp_path / "one.csv", "id\nc\n"))
    run(source, model, folder, exclude=write(tmp_path / "two.csv", "id,score\nc,2\n"))
    assert "nothing to do" in capsys.readouterr().out
    for other in (write(tmp_path / "three.csv", "id\na\n"), ""):
        with pytest.raises(cli.UserError, match=r"another preparation: --exclude \('1 ids, "):
            run(source, model, folder, exclude=other)


def test_a_preparation_from_before_the_option_is_still_finished(source, model, tmp_path, capsys):  # noqa: F811
    run(source, model, tmp_path / "prepared")
    file = tmp_path / "prepared" / "preprocess.json"
    record = json.loads(file.read_text())
    del record["config"]["exclude"]
    file.write_text(json.dumps(record))
    run(source, model, tmp_path / "prepared")
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"name,score\na,1\n", "has no column named id"),
        (b"", "has no column named id"),
        (b'id\n"a\n', "is damaged (unexpected end of data)"),
        ("id\nक\n".encode("utf-16"), "is damaged ('utf-8' codec can't decode"),
        (b"id\na\n-b\nc\nd\n", "names every clip that is left"),
    ],
)
def test_each_mistake_names_the_file_and_the_remedy(source, model, tmp_path, content, message):  # noqa: F811
    file = tmp_path / "ids.csv"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(cli.UserError) as error:
        run(source, model, tmp_path / "prepared", exclude=str(file))
    assert str(error.value).startswith(f"--exclude {file}: {message}")
    assert ": give " in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "prepared").exists()
