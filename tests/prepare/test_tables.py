"""common/tables.py and common/columns.py: any dialect, any name of a column, nothing guessed."""

import csv
import json

import pytest

from common.cli import UserError
from prepare import columns, sources, tables

QUOTED = 'She said "come" to me'


def rows(path):
    return list(sources.read(sources.find(str(path))))


def texts(path):
    return [row.text for row in rows(path)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def row_of(tmp_path, **record):
    """The row of one JSON object."""
    path = write(tmp_path / "m.jsonl", json.dumps({"path": "a.wav", "text": "x", **record}))
    (row,) = rows(path)
    return row


# ------ csv and tsv


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("suffix", ["tsv", "TSV", "csv"])
@pytest.mark.parametrize("separator", ["\t", ",", ";", "|"])
def test_what_csv_writers_write_is_read_back(tmp_path, quoting, suffix, separator):
    written = [QUOTED, '"all of it"', "a, b; c | d", "plain", 'in "the" middle', 'ends "so"']
    with (tmp_path / f"m.{suffix}").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=separator, quoting=quoting)
        writer.writerow(["path", "sentence", "split"])
        writer.writerows([f"{i}.wav", text, "train"] for i, text in enumerate(written))
    with (tmp_path / f"m.{suffix}").open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, delimiter=separator)
        assert [record["sentence"] for record in reader] == written
    assert texts(tmp_path / f"m.{suffix}") == written


def test_what_pandas_writes_as_tsv_is_read_back(tmp_path):
    pandas = pytest.importorskip("pandas")
    written = [QUOTED, '"', '""', 'a " b', "plain"]
    table = pandas.DataFrame({"path": [f"{i}.wav" for i in range(5)], "text": written})
    table.to_csv(tmp_path / "m.tsv", sep="\t", index=False)
    assert texts(tmp_path / "m.tsv") == written
    table.to_csv(tmp_path / "index.tsv", sep="\t")
    assert texts(tmp_path / "index.tsv") == written


def test_a_quoted_cell_of_several_lines_is_malformed_not_half_a_text(tmp_path):
    content = 'path\ttext\na.wav\t"one\ntwo"\nb.wav\tthree\nc.wav\t"four\nd.wav\tfive\n'
    result = rows(write(tmp_path / "m.tsv", content))
    assert [row.problem or row.text for row in result] == [
        *["malformed row"] * 2,
        "three",
        '"four',
        "five",
    ]


def test_common_voices_own_quotes_stay_as_they_are(tmp_path):
    header, cell = "client_id\tpath\tsentence\n", '"She said ""come"""'
    write(tmp_path / "clips" / "a.mp3", "x")
    write(tmp_path / "train.tsv", f'{header}s\ta.mp3\t{cell}\ns\tb.mp3\t"Halt!"\n')
    assert texts(tmp_path) == [cell, '"Halt!"']


def test_a_part_of_common_voices_table_that_pandas_wrote_is_unquoted(tmp_path):
    content = 'client_id\tpath\tsentence\ns\ta.mp3\t"She said ""come"""\ns\tb.mp3\t"Halt!"\n'
    assert texts(write(tmp_path / "part.tsv", content)) == ['She said "come"', '"Halt!"']


def test_the_separator_that_a_spreadsheet_names_is_taken(tmp_path):
    assert texts(write(tmp_path / "m.csv", "sep=;\r\npath;text\r\na.wav;x, y\r\n")) == ["x, y"]


def test_a_quote_behind_a_space_is_a_quote(tmp_path):
    content = 'path, text\na.wav, "one, two"\nb.wav, "three"\nc.wav, four "five"\n'
    assert texts(write(tmp_path / "m.csv", content)) == ["one, two", "three", 'four "five"']


def test_a_table_without_a_header_is_refused_with_the_remedy(tmp_path):
    path = write(tmp_path / "metadata.csv", "LJ001|one|one\nLJ002|two|two\n")
    with pytest.raises(UserError, match=r"lacks an audio path .* write a first line that names"):
        rows(path)


def test_two_columns_of_one_name_are_refused(tmp_path):
    with pytest.raises(UserError, match="has two columns text: rename one"):
        rows(write(tmp_path / "m.csv", "path,text,Text\na.wav,x,y\n"))
    assert texts(write(tmp_path / "m.csv", "path,text,note,Note\na.wav,x,y,z\n")) == ["x"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_text_of_two_bytes_a_character_without_a_mark_is_refused(tmp_path, encoding, suffix):
    (tmp_path / f"m.{suffix}").write_bytes("path,text\na.wav,x\n".encode(encoding))
    with pytest.raises(UserError, match=r"is UTF-16 without a byte order mark.* save it as UTF-8"):
        rows(tmp_path / f"m.{suffix}")


@pytest.mark.parametrize("order", ["le", "be"])
@pytest.mark.parametrize("suffix", ["txt", "tsv", "csv", "jsonl", "json"])
def test_utf_16_with_a_byte_order_mark_is_read(tmp_path, order, suffix):
    content = f"path\ttext\r\na.wav\t{QUOTED}\r\nb.wav\tमराठी ਊ\r\n"  # U+0A0A: two line feeds
    if "json" in suffix:
        texts_given = zip("ab", (QUOTED, "मराठी ਊ"), strict=True)
        content = "\n".join(json.dumps({"path": f"{n}.wav", "text": t}) for n, t in texts_given)
    elif suffix == "txt":  # as Excel quotes
        content = content.replace(QUOTED, '"She said ""come"" to me"')
    (tmp_path / f"m.{suffix}").write_bytes(f"\ufeff{content}".encode(f"utf-16-{order}"))
    assert texts(tmp_path / f"m.{suffix}") == [QUOTED, "मराठी ਊ"]


def test_utf_16_that_ends_within_a_character_is_refused(tmp_path):
    (tmp_path / "m.txt").write_bytes("path\ttext\na.wav\tx\n".encode("utf-16")[:-1])
    with pytest.raises(UserError, match="is damaged UTF-16"):
        rows(tmp_path / "m.txt")


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "cp1251", "gbk"])
def test_other_encodings_are_refused_with_the_line_and_the_remedy(tmp_path, encoding):
    text = {"cp1251": "привет", "gbk": "今天天气很好"}.get(encoding, "café au lait, señor")
    (tmp_path / "m.tsv").write_bytes(f"path\ttext\na.wav\tx\nb.wav\t{text}\n".encode(encoding))
    with pytest.raises(UserError, match=r"is not UTF-8 \(byte 0x.. in line 3\).* iconv -f CP1252"):
        rows(tmp_path / "m.tsv")


# ------ without a header


def speech_synthesis(folder, content, audio="wavs/{}.wav", name="metadata.csv"):
    for number in (1, 2):
        write(folder / audio.format(f"LJ00{number}"), "x")
    return write(folder / name, content)


LJ = 'LJ001|He paid 5 "pounds", and|He paid five "pounds", and\nLJ002|1984|nineteen eighty-four\n'
LJ_TEXTS = ['He paid five "pounds", and', "nineteen eighty-four"]


@pytest.mark.parametrize("audio", ["wavs/{}.wav", "{}.wav", "wavs/{}.flac"])
@pytest.mark.parametrize("is_folder", [True, False])
def test_ljspeechs_table_is_read_without_a_header(tmp_path, capsys, audio, is_folder):
    path = speech_synthesis(tmp_path, LJ, audio)
    result = rows(tmp_path if is_folder else path)
    assert [row.text for row in result] == LJ_TEXTS
    assert [row.path for row in result] == [
        str(tmp_path / audio.format(name)) for name in ("LJ001", "LJ002")
    ]
    assert not any(row.speaker or row.problem for row in result)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(
        "no header, read as LJSpeech's: column 1 is audio, column 2 is not used, column 3 is text; "
        f"audio is {audio}"
    )


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", ["metadata.csv", "train.txt", "list.tsv"])
def test_tables_of_paths_and_texts_are_read_without_a_header(tmp_path, name, mark, ending):
    content = f"{mark}wavs/LJ001.wav|one, two{ending}wavs/LJ002.wav|three{ending}"
    assert texts(speech_synthesis(tmp_path, content, name=name)) == ["one, two", "three"]


def test_the_speaker_of_a_table_without_a_header_is_taken(tmp_path, capsys):
    content = "LJ001|s1|one two\nLJ002|s2|three\nLJ001|s1|half\n\n"
    result = rows(speech_synthesis(tmp_path, content, name="list.txt"))
    assert [(row.text, row.speaker) for row in result] == [
        ("one two", "s1"), ("three", "s2"), ("half", "s1")
    ]  # fmt: skip


def test_a_table_without_a_header_that_is_not_unmistakable_is_refused(tmp_path):
    for content in (LJ.replace("LJ", "XY"), LJ.replace("|", "\t"), "LJ001|a|b|c\n", "LJ001\n"):
        path = speech_synthesis(tmp_path, content)
        with pytest.raises(UserError, match=r"write a first line that names the columns, such as"):
            rows(path)


def test_a_row_of_other_columns_is_malformed_where_there_is_no_header(tmp_path):
    content = "LJ001|one|two\n" * 100 + "LJ002|one\nLJ003|one|two\n"
    result = rows(speech_synthesis(tmp_path, content))
    assert result[100].problem == "malformed row" and "2 cells, not 3" in result[100].detail
    assert (result[101].text, result[101].problem) == ("two", "")


@pytest.mark.parametrize("name", ["m.csv", "m.tsv", "m.jsonl", "m.json"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path, name):
    content = {"csv": "path,text\na.wav,x\n", "tsv": "path\ttext\na.wav\tx\n"}
    content = content.get(name[2:], '{"path": "a.wav", "text": "x"}\n')
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert texts(tmp_path / name) == ["x"]


# ------ JSON

RECORDS = [{"audio": "a.wav", "text": "one", "start": 1}, {"audio": "b.wav", "text": "two"}]
COLUMNS = {"audio": ["a.wav", "b.wav"], "text": ["one", "two"]}


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(RECORDS),
        json.dumps(RECORDS, indent=2),
        json.dumps(COLUMNS),
        json.dumps(COLUMNS, indent=2),
        json.dumps({name: dict(enumerate(cells)) for name, cells in COLUMNS.items()}),
        "\n\n".join(map(json.dumps, RECORDS)),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "JSON", "jsonl", "JSONL"])
def test_json_of_any_shape_gives_the_same_rows(tmp_path, content, suffix):
    result = rows(write(tmp_path / f"m.{suffix}", content))
    assert [(row.text, row.path) for row in result] == [
        ("one", str(tmp_path / "a.wav")),
        ("two", str(tmp_path / "b.wav")),
    ]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_single_object_is_one_row(tmp_path, indent):
    assert texts(write(tmp_path / "m.json", json.dumps(RECORDS[0], indent=indent))) == ["one"]


def test_what_pandas_writes_as_json_is_read_back(tmp_path):
    pandas = pytest.importorskip("pandas")
    for orient in ("records", "columns"):
        pandas.DataFrame(COLUMNS).to_json(tmp_path / "m.json", orient=orient)
        assert texts(tmp_path / "m.json") == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"data": [{"path": "a.wav", "text": "x"}]}', "without columns of paths and texts .*data"),
        ('{"path": ["a.wav"], "text": ["x", "y"]}', "columns of different lengths"),
        ('[\n{"path": "a.wav", "text": "x"},\n]', "m.json is not JSON .*line 3"),
    ],
)
def test_json_that_is_no_table_is_refused_by_name(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        rows(write(tmp_path / "m.json", content))


def test_audio_that_is_an_object_gives_its_path_and_its_times(tmp_path):
    row = row_of(tmp_path, path=None, audio={"path": "b.wav", "start_time": 1, "end_time": 2.5})
    assert row.path == str(tmp_path / "b.wav")
    assert (row.start_seconds, row.end_seconds) == (1.0, 2.5)


# ------ values


@pytest.mark.parametrize("value", [None, float("nan"), "nan", "NaN", "None", "<NA>", ""])
def test_a_value_that_is_none_is_nobodys_name_and_nobodys_words(tmp_path, value):
    row = row_of(tmp_path, speaker=value, language=value, split=value)
    assert (row.speaker, row.language, row.split, row.problem) == ("", "", "", "")
    row = row_of(tmp_path, text=value)
    assert (row.text, row.problem or "empty text") == ("", "empty text")


@pytest.mark.parametrize("value", [True, False, ["one", "two"], {"en": "one"}])
def test_a_text_that_is_none_is_a_problem_of_its_row(tmp_path, value):
    row = row_of(tmp_path, text=value)
    assert row.problem == "empty text" and "text is not a text" in row.detail


def test_the_spellings_of_an_accent_are_one_speaker(tmp_path):
    names = {row_of(tmp_path, speaker=name).speaker for name in ("Jos\u00e9", "Jose\u0301")}
    assert names == {"Jos\u00e9"}


def test_numbers_are_texts_and_names(tmp_path):
    row = row_of(tmp_path, text=1984, speaker=7.0, split="train")
    assert (row.text, row.speaker) == ("1984", "7")
    assert row_of(tmp_path, text="null").text == "null"


@pytest.mark.parametrize("value", [0, True])
def test_a_split_that_is_a_number_is_an_unknown_split(tmp_path, value):
    assert row_of(tmp_path, split=value).problem == "unknown split"


@pytest.mark.parametrize("column", ["subset", "Partition", "set", "data_split"])
def test_splits_in_a_column_of_another_name_are_kept(tmp_path, capsys, column):
    assert row_of(tmp_path, **{column: "Test"}).split == "test"
    assert "no column is named split" in capsys.readouterr().out
    assert row_of(tmp_path, split="dev", **{column: "train"}).split == "validation"
    row = row_of(tmp_path, **{column: "XL"})
    assert (row.split, row.problem) == ("", "")
    assert "split" not in capsys.readouterr().out


def test_which_of_several_columns_of_texts_is_taken_is_said(tmp_path, capsys):
    assert row_of(tmp_path, text="", sentence="y").text == "y"
    assert "taken" not in capsys.readouterr().out
    assert row_of(tmp_path, sentence="y", transcript="z").text == "x"
    assert "texts are taken from text, not from sentence, transcript" in capsys.readouterr().out


def test_of_several_path_columns_the_one_that_leads_to_a_file_is_taken(tmp_path):
    write(tmp_path / "clips" / "a.wav", "x")
    for names in (("path", "file_name"), ("file_name", "path")):
        row = row_of(tmp_path, **dict(zip(names, ("/old/a.wav", "clips/a.wav"), strict=True)))
        assert row.path == str(tmp_path / "clips" / "a.wav")
    row = row_of(tmp_path, path="gone.wav", file_name="lost.wav")
    assert row.path == str(tmp_path / "gone.wav")


def test_a_path_that_windows_wrote_is_found(tmp_path):
    write(tmp_path / "clips" / "a.wav", "x")
    write(tmp_path / "odd\\name.wav", "x")
    row = row_of(tmp_path, path="clips\\a.wav")
    assert (row.id, row.path) == ("clips/a", str(tmp_path / "clips" / "a.wav"))
    assert row_of(tmp_path, path="odd\\name.wav").path == str(tmp_path / "odd\\name.wav")


# ------ times


@pytest.mark.parametrize(
    "record",
    [
        {"offset": 1.5, "duration": 2},
        {"offset": "1.5", "duration": "2"},
        {"start_time": 1.5, "end_time": 3.5},
        {"begin": 1.5, "end": 3.5},
        {"begin_time": 1.5, "end_time": 3.5, "duration": 9},
        {"start_ms": 1500, "end_ms": 3500},
        {"start_ms": 1500, "duration_ms": 2000},
        {"Start (ms)": 1500, "End (ms)": 3500},
        {"start_time_ms": 1500, "end_time_ms": 3500},
        {"startTime": 1.5, "endTime": 3.5},
        {"segment_start": 1.5, "segment_end": 3.5},
        {"start_sec": 1.5, "stop_sec": 3.5},
        {"start_s": 1.5, "end_s": 3.5, "start_frame": 24_000},
        {"from": 1.5, "to": 3.5},
        {"from_ms": 1500, "to_ms": 3500},
        {"xmin": 1.5, "xmax": 3.5},
        {"start": "00:00:01.500", "end": "00:03,5"},
        {"start": 1.5, "start_ms": 1500, "end": 3.5},
        {"ts_from": 1.5, "ts_to": 3.5},
        {"start_ts": 1.5, "end_ts": 3.5},
        {"beg": 1.5, "end": 3.5},
        {"StartTimeInSeconds": 1.5, "EndTimeInSeconds": 3.5, "vad_start": 9, "vad_end": 10},
    ],
)
def test_columns_that_cut_the_audio_are_understood_by_any_name(tmp_path, record):
    row = row_of(tmp_path, **record)
    assert (row.start_seconds, row.end_seconds, row.problem) == (1.5, 3.5, "")
    assert row.id == "a-1.50-3.50"


@pytest.mark.parametrize(
    "record",
    [
        {"duration": 2.5},
        {"duration": "unknown"},
        {"duration_ms": 2500, "num_frames": 40_000, "length": 3},
        {"from": "hindi", "to": "marathi"},
        {"offset": None, "duration": 2.5},
        {"start": "", "end": ""},
        {"start_year": 1990, "end_year": 1994, "char_start": 0, "char_end": 5},
        {"translated_from": "hindi", "translated_to": "marathi", "vad_start": None, "vad_end": 2},
        {"timestamp": "2024-01-02 10:00", "segment": 7, "interval": [5], "chunk": [1, "x"]},
        {"time_range": [0, 0], "trim_start": 0, "trim_end": 0},
    ],
)
def test_columns_that_only_inform_cut_nothing(tmp_path, record):
    row = row_of(tmp_path, **record)
    assert (row.start_seconds, row.end_seconds, row.problem) == (0.0, None, "")


@pytest.mark.parametrize(
    ("record", "detail"),
    [
        ({"start_frame": 10, "end_frame": 20}, "startframe is not read: give start and end in sec"),
        ({"start": 1, "end_sample": 20_000}, "endsample is not read"),
        ({"offset": 1, "length": 2}, "length has no unit"),
        ({"offset": 1, "start_time": 2, "duration": 3}, "offset and starttime differ"),
        ({"offset": 1, "duration": -1}, "duration is -1"),
        ({"start": True}, "start is True"),
        ({"offset": float("nan"), "duration": 2}, "offset is nan"),
        ({"frame_offset": 24_000, "num_frames": 32_000}, "frameoffset is not read"),
        ({"sample_start": 24_000, "sample_end": 56_000}, "samplestart is not read"),
        ({"start_minutes": 1, "end_minutes": 2}, "startminutes is not read"),
        ({"end": 3.5}, "end has no start"),
        ({"t0": 1.5, "t1": 3.5}, "t0 and t1 look like the times of a clip: name them start and"),
        ({"stime": "1.5", "etime": "3.5"}, "stime and etime look like"),
        ({"cut_start": 0, "cut_end": 3.5}, "cutstart and cutend look like"),
        ({"audio_sentence_from": "0:01", "audio_sentence_to": "0:03"}, "from and audiosentenceto"),
        ({"timestamps": [1.5, 3.5]}, "timestamps looks like the times of a clip: give them as"),
        ({"segment": {"start": 1.5, "end": 3.5}}, "segment looks like"),
        ({"interval": "[1.5, 3.5]"}, "interval looks like"),
    ],
)
def test_columns_that_cut_the_audio_in_another_way_are_refused_by_name(tmp_path, record, detail):
    row = row_of(tmp_path, **record)
    assert row.problem == "malformed row" and detail in row.detail, row.detail


def test_names_of_columns_are_compared_without_case_spaces_and_signs(tmp_path):
    path = write(tmp_path / "m.csv", "Audio File,Transcript ,Speaker ID\na.wav,x,s1\n")
    (row,) = rows(path)
    assert (row.id, row.text, row.speaker) == ("a", "x", "s1")


@pytest.mark.parametrize(
    "name", ["text", "segment", "intent", "tone", "storage", "stopwords", "into", "begum", "sample"]
)
def test_other_columns_are_no_times(name):
    assert columns._time_role(name) is None


def test_reading_json_lines_does_not_hold_them(tmp_path):
    path = write(tmp_path / "m.json", "\n".join(json.dumps(RECORDS[0]) for _ in range(100_000)))
    assert next(tables.records(path))["text"] == "one"
