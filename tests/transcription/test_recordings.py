"""What --audio names: a file, a folder or a manifest."""

import pytest

from common.cli import UserError
from transcription.recordings import find_recordings


@pytest.fixture
def folder(tmp_path):
    for name in ("a.wav", "a.mp4", "b/c.ogg", "b/.hidden.ogg", "b/notes.txt", "B.FLAC"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def names(source):
    recordings, passed_over = find_recordings(str(source))
    return [own.name for own in recordings], passed_over


def test_a_folder_is_read_in_order_and_names_of_transcripts_differ(folder):
    assert names(folder) == (
        ["B", "a.mp4", "a.wav", "b/c"],
        "files of other kinds: 1 (1 .txt)",
    )
    assert names(folder / "a.wav") == (["a"], "")


def test_no_transcript_has_the_name_of_a_file_of_ours(tmp_path):
    for name in ("wer.wav", "transcribe.mp3", "b/wer.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert names(tmp_path)[0] == ["b/wer", "transcribe.mp3", "wer.wav"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.txt", "b/c.ogg\na.wav\n"),
        ("table.csv", "path,language\nb/c.ogg,Hindi\na.wav,\n"),
        ("table.tsv", "language\tpath\nhi\tb/c.ogg\n\ta.wav\n"),
        ("rows.jsonl", '{"path": "b/c.ogg", "language": "hi"}\n{"audio": "a.wav"}\n'),
    ],
)
def test_a_manifest_keeps_its_order_and_its_languages(folder, name, text):
    (folder / name).write_text(text)
    recordings, _ = find_recordings(str(folder / name))
    assert [own.name for own in recordings] == ["b/c", "a"]
    assert [own.path for own in recordings] == [folder / "b/c.ogg", folder / "a.wav"]
    assert [own.language for own in recordings] == ["" if name == "list.txt" else "hi", ""]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.jsonl", "{", "cannot be read"),
        ("table.csv", "name\na.wav\n", "row 1 has no path"),
        ("list.txt", "a.wav\na.wav\n", "a.wav is in it 2 times"),
        ("list.txt", "", "holds no audio or video"),
        ("table.csv", "path,language\na.wav,Klingon\n", "Klingon"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused(folder, name, text, message):
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=message):
        find_recordings(str(folder / name))
