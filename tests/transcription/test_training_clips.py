"""--align and --reference: texts of recordings, the manifest of their clips, their error rates."""

import json

import pytest

from common.cli import UserError
from prepare import table_rows
from transcription.recordings import Recording, find_recordings
from transcription.scoring import score
from transcription.texts import read_texts
from transcription.training_clips import write_clips

SEGMENTS = [  # start, end and what was recognized
    (1.0, 3.5, "nadila pani ale"),
    (4.1, 7.0, "mule shaet gelo"),
    (9.0, 12.0, "he kahi vegalech bolane ahe"),
    (12.0, 14.5, "pach rupaye dile"),
]
TEXT = "\ufeffNadilā pāṇī āle.\nMule śāḷet gelī —\n\n“Pāc rupaye,” dile!\n"


@pytest.fixture
def folder(tmp_path):
    """Two recordings and the json transcript of one."""
    for name in ("talk.wav", "day/other.wav"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "in" / name).write_bytes(b"")
    rows = [
        {"start": start, "end": end, "text": text, "language": "mr"}
        for start, end, text in SEGMENTS
    ]
    content = {
        "model": "base", "adapter": None, "weights": "0123", "task": "transcribe", "seconds": 15.0,
        "language": None, "segments": rows,
        "dropped": [{"start": 7.3, "end": 8.0, "text": "pani ale", "dropped": "repetition"}],
    }  # fmt: skip
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "talk.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "in" / "talk.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def test_a_manifest_has_the_words_as_the_text_spells_them_and_what_is_left_out_is_counted(folder):
    recordings, _ = find_recordings(str(folder / "in"))
    texts = read_texts("--align", str(folder / "in"), recordings)
    file = folder / "in" / "clips.jsonl"
    line = write_clips(file, folder / "out", recordings, texts, min_match=0.4)
    rows = [json.loads(row) for row in file.read_text(encoding="utf-8").splitlines()]
    assert [(row["start"], row["end"], row["text"]) for row in rows] == [
        (0.8, 3.7, "Nadilā pāṇī āle."),
        (3.9, 7.15, "Mule śāḷet gelī —"),
        (12.0, 14.7, "“Pāc rupaye,” dile!"),
    ]
    for row in rows:
        assert 0.4 <= row.pop("match") < 1.0
        assert {key: row[key] for key in row.keys() - {"start", "end", "text"}} == {
            "path": "talk.wav", "language": "mr", "speaker": "talk", "model": "base",
            "weights": "0123",
        }  # fmt: skip
    assert line.endswith(
        "clips.jsonl: 3 clips, 0:00:07 of 0:00:11 of speech, 9 of 9 words; stretches left out: "
        "1 not in the text, 1 not recognized; recordings without a text: 1"
    ), line
    table = table_rows.Table(file, folder / "in")
    read = list(table_rows.read((table,), folder / "in", table_rows.MANIFEST))
    assert [(row.start_seconds, row.end_seconds, row.problem) for row in read] == [
        (row["start"], row["end"], "") for row in rows
    ]


def test_whole_recordings_are_scored_and_those_without_a_text_are_counted(folder):
    recordings, _ = find_recordings(str(folder / "in"))
    texts = {recordings[1]: "nadila pani, ale mule gelo he kahi vegalech bolane ahe pach dile"}
    line = score(folder / "out", recordings, texts, tokenizer=None)
    content = json.loads((folder / "out" / "wer.json").read_text())
    words = content["normalisers"]["keep_marks"]["words"]
    assert (words["insertions"], words["reference_length"]) == (2, 12)
    assert content["recordings"] == [{"name": "talk", "wer": pytest.approx(25.0), "words": 12}]
    assert "WER 25.0 raw, 16.7 keep_marks, " in line
    assert line.endswith("1 recordings, 12 words; not scored: 1")


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        ("nowhere", None, "nowhere: does not exist: give a .txt file or a folder of them"),
        ("talk.srt", b"1", "talk.srt: is not plain text: save it as .txt in UTF-8"),
        ("talk.txt", "नमस्कार".encode("utf-16"), "talk.txt: cannot be read as UTF-8"),
        ("talk.txt", b" \n*\n", "talk.txt: holds no words"),
        ("texts", None, "texts: has no text of any recording: name that of talk.wav talk.txt"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused(tmp_path, source, content, message):
    recordings = [Recording(tmp_path / "talk.wav", "talk")]
    (tmp_path / "texts").mkdir()
    if content is not None:
        (tmp_path / source).write_bytes(content)
    with pytest.raises(UserError, match=f"--align .*{message}"):
        read_texts("--align", str(tmp_path / source), recordings)


def test_one_text_of_several_recordings_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    recordings = [Recording(tmp_path / f"{name}.wav", name) for name in "ab"]
    with pytest.raises(
        UserError, match=r"is one text, and --audio names 2 recordings: give a fold"
    ):
        read_texts("--align", str(tmp_path / "a.txt"), recordings)
