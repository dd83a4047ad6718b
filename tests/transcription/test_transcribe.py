"""transcribe.py as a user runs it: files in, transcripts out."""

import itertools
import json
import shutil
import subprocess
from functools import partial

import launch
import numpy as np
import pytest
import soundfile
import soxr
import tiny
import torch

import preprocess
import transcribe
from common import cli, whisper
from demo import espeak
from evaluation import sounds
from transcription import pipeline
from transcription.formats import FORMATS
from transcription.segments import decode_stretches
from transcription.stretches import find_stretches
from transcription.vad import load_vad

pytest.importorskip("silero_vad", reason="requirements-export.txt")
SENTENCES = ("आज सकाळी पाऊस पडला", "मुले शाळेत गेली", "नदीला पाणी आले")


def noise(seconds, seed=0):
    return 0.001 * np.random.default_rng(seed).standard_normal(round(seconds * 16_000))


def spoken(sentence):
    """A sentence by espeak-ng, float (N,) at 16 kHz."""
    samples, rate = espeak.speak(sentence, variant="f2", words_per_minute=150, pitch=50)
    return soxr.resample(samples / 32768, rate, 16_000)


@pytest.fixture(scope="module")
def speech():
    """Sentences with pauses of 2 s, and where each begins and ends."""
    parts, limits, now = [noise(1)], [], 1.0
    for sentence in SENTENCES:
        samples = spoken(sentence)
        limits.append((now, now + len(samples) / 16_000))
        parts += [samples, noise(2)]
        now = limits[-1][1] + 2.0
    return np.concatenate(parts).astype(np.float32), limits


@pytest.fixture(scope="module")
def talker(checkpoint, tmp_path_factory):
    """The random Whisper, but its texts end after some 20 tokens and do not loop."""
    folder = tmp_path_factory.mktemp("talker")
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    model = whisper.load_base(str(checkpoint), dtype=torch.float32)
    tiny.end_texts(model, tiny.END, 2.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(speech, tmp_path_factory):
    """Recordings in several containers, one of them damaged, one without speech."""
    folder = tmp_path_factory.mktemp("recordings")
    samples, _ = speech
    (folder / "day").mkdir()
    soundfile.write(folder / "day" / "talk.flac", samples, 16_000)
    soundfile.write(folder / "day" / "talk.wav", np.stack([samples, samples], axis=1), 16_000)
    soundfile.write(folder / "quiet.ogg", noise(5), 16_000)
    (folder / "broken.mp4").write_bytes(b"no video at all")
    (folder / "notes.docx").write_bytes(b"not read")
    return folder


def run(checkpoint, audio, output, **options):
    defaults = {"language": "mr", "context": "natural", "formats": ",".join(FORMATS)}
    config = transcribe.Config(
        audio=str(audio), model=str(checkpoint), output_dir=str(output), **defaults | options
    )
    transcribe.main(config)
    return output


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if path.name != "transcribe.json"
    }


@pytest.fixture(scope="module")
def transcripts(talker, folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "transcripts"
    with pytest.raises(SystemExit) as stop:
        run(talker, folder, output)
    assert stop.value.code == 1  # of the broken file
    return output


def test_what_each_recording_gives(transcripts):
    names = {"day/talk.flac", "day/talk.wav", "quiet"}
    wanted = {
        f"{name}.{suffix}" for name in names for suffix in ("txt", "srt", "vtt", "tsv", "json")
    }
    assert contents(transcripts).keys() == wanted | {"failed.jsonl"}
    [failed] = map(json.loads, (transcripts / "failed.jsonl").read_text().splitlines())
    assert failed["file"].endswith("broken.mp4") and "cannot be read" in failed["reason"]
    assert (transcripts / "quiet.txt").read_text() == ""
    assert json.loads((transcripts / "quiet.json").read_text())["segments"] == []


def test_segments_are_the_sentences(transcripts, speech):
    _, limits = speech
    content = json.loads((transcripts / "day" / "talk.flac.json").read_text())
    rows = sorted(content["segments"] + content["dropped"], key=lambda row: row["start"])
    times = [(row["start"], row["end"]) for row in rows]
    assert np.allclose(times, limits, atol=0.3), (times, limits)
    assert content["window"] == "natural" and content["language"] == "mr"
    assert len(content["segments"]) == 3 and not content["dropped"]
    for row in content["segments"]:
        edges = [edge for word in row["words"] for edge in (word["start"], word["end"])]
        assert [row["start"], *edges, row["end"]] == sorted([row["start"], *edges, row["end"]])
        assert "".join(word["text"] for word in row["words"]).strip() == row["text"]


def test_a_run_that_is_killed_goes_on_and_writes_the_same_bytes(
    talker, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(pipeline, "GROUP_FILES", 1)
    for name in ("whole", "killed"):
        with monkeypatch.context() as patch:
            if name == "killed":
                read = partial(killed_at, "talk.wav", pipeline.read_pieces)
                patch.setattr(pipeline, "read_pieces", read)
                with pytest.raises(KeyboardInterrupt):
                    run(talker, folder, tmp_path / name, word_times=False)
                left = {path.name for path in (tmp_path / name).rglob("*")}
                assert "talk.flac.srt" in left and "talk.wav.srt" not in left
        with pytest.raises(SystemExit):
            run(talker, folder, tmp_path / name, word_times=False)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def killed_at(name, read, path):
    yield from itertools.islice(read(path), 20)
    if path.name == name:
        raise KeyboardInterrupt
    yield from itertools.islice(read(path), 20, None)


def test_little_speech_is_held_however_long_a_recording_is(talker, speech, tmp_path, monkeypatch):
    samples, _ = speech
    soundfile.write(tmp_path / "long.wav", np.tile(samples, 4), 16_000)
    held = []

    def decode(runtime, stretches, languages, options):
        held.append([stretch.seconds for stretch in stretches])
        return decode_stretches(runtime, stretches, languages, options)

    monkeypatch.setattr(pipeline, "decode_stretches", decode)
    whole = run(talker, tmp_path / "long.wav", tmp_path / "whole")
    assert len(held) == 1 and len(held[0]) == 4 * len(SENTENCES)
    [all_at_once], held = held, []
    monkeypatch.setattr(pipeline, "WAITING_SECONDS", 4.0)
    in_parts = run(talker, tmp_path / "long.wav", tmp_path / "in_parts")
    assert contents(whole) == contents(in_parts)
    assert list(itertools.chain(*held)) == all_at_once and len(held) > 3
    assert all(sum(own[:-1]) < 4.0 for own in held)


def test_a_finished_folder_is_left_as_it_is_and_other_options_are_refused(
    transcripts, talker, folder, capsys
):
    before = contents(transcripts)
    times = {path: path.stat().st_mtime_ns for path in transcripts.rglob("*.json")}
    with pytest.raises(SystemExit):  # the broken file is tried again
        run(talker, folder, transcripts)
    assert "4 recordings, 3 transcribed before" in capsys.readouterr().out
    assert contents(transcripts) == before
    kept = {path: own for path, own in times.items() if path.name != "transcribe.json"}
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    with pytest.raises(cli.UserError, match=r"--output_dir .*\(language 'mr', now 'hi'\)"):
        run(talker, folder, transcripts, language="hi")


def test_a_folder_of_a_version_with_fewer_options_is_resumed(transcripts, talker, folder, capsys):
    file = transcripts / "transcribe.json"
    record = json.loads(file.read_text())
    del record["decisive"]["num_beams"]
    file.write_text(json.dumps(record))
    with pytest.raises(cli.UserError, match=r"--output_dir .*\(num_beams 1, now 2\)"):
        run(talker, folder, transcripts, num_beams=2)
    with pytest.raises(SystemExit):
        run(talker, folder, transcripts)
    assert "4 recordings, 3 transcribed before" in capsys.readouterr().out


def test_the_text_does_not_depend_on_batches_and_languages_are_detected(talker, folder, tmp_path):
    texts = []
    for batch_seconds in (1.0, 240.0):
        output = tmp_path / str(batch_seconds)
        options = {"language": "", "batch_seconds": batch_seconds, "word_times": False}
        run(talker, folder / "day", output, formats="json", **options)
        content = json.loads((output / "talk.flac.json").read_text())
        rows = content["segments"] + content["dropped"]
        assert len(rows) == 3 and {row["language"] for row in rows} == {content["language"]}
        assert 0 < content["language_probability"] <= 1
        texts.append([(row["text"], row["language"], row["start"]) for row in rows])
    assert texts[0] == texts[1]
    run(
        talker, folder / "day", tmp_path / "own", formats="json", language="",
        language_by_segment=True, word_times=False,
    )  # fmt: skip
    content = json.loads((tmp_path / "own" / "talk.flac.json").read_text())
    assert content["language"] is None
    for row in content["segments"] + content["dropped"]:
        assert row["language"] and row["language_probability"] > 0


# ------ CTranslate2


@pytest.fixture(scope="module")
def exported(talker, tmp_path_factory):
    """The talker for PyTorch and, in two types, for CTranslate2."""
    converters = pytest.importorskip("ctranslate2.converters", reason="requirements-export.txt")
    folder = tmp_path_factory.mktemp("exported")
    shutil.copytree(talker, folder / "hf")
    for name in ("float32", "int8"):
        converters.TransformersConverter(str(talker)).convert(str(folder / name), quantization=name)
        vocabulary = json.loads((folder / name / "vocabulary.json").read_text())
        vocabulary[0] = ""  # Whisper's multilingual vocabularies are known by this token
        (folder / name / "vocabulary.json").write_text(json.dumps(vocabulary))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(talker / file, folder / name)
    return folder


def rows_of(output, name):
    content = json.loads((output / f"{name}.json").read_text())
    return content, sorted(content["segments"] + content["dropped"], key=lambda row: row["start"])


def test_an_export_to_ctranslate2_gives_the_same_transcripts(exported, folder, tmp_path):
    options = {"language": "", "formats": "srt,json"}
    contents_of = {}
    for name in ("hf", "float32", "int8"):
        output = run(exported / name, folder / "day", tmp_path / name, **options)
        contents_of[name] = rows_of(output, "talk.flac")
    wanted, rows = contents_of["hf"]
    for name in ("float32", "int8"):
        content, own_rows = contents_of[name]
        assert (content["runtime"], content["window"]) == ("ct2", "natural")
        assert content["precision"].startswith(name) and content["weights"] != wanted["weights"]
        times = [(row["start"], row["end"]) for row in own_rows]
        assert times == [(row["start"], row["end"]) for row in rows] and len(times) == 3
    content, own_rows = contents_of["float32"]
    assert content["language"] == wanted["language"]
    for own, row in zip(own_rows, rows, strict=True):
        assert (own["text"], own["language"]) == (row["text"], row["language"])
        for name in ("language_probability", "logprob", "no_speech_probability"):
            assert own[name] == pytest.approx(row[name], abs=2e-3), name
    for own in contents_of["float32"][0]["segments"]:
        edges = [edge for word in own["words"] for edge in (word["start"], word["end"])]
        assert [own["start"], *edges, own["end"]] == sorted([own["start"], *edges, own["end"]])
        assert "".join(word["text"] for word in own["words"]).strip() == own["text"]
        assert all(0 < word["probability"] < 1 for word in own["words"])
    assert (tmp_path / "float32" / "talk.flac.srt").read_text().count(" --> ") >= 3


def test_a_run_with_ctranslate2_loads_no_models_of_pytorch(exported, folder, tmp_path):
    options = {"audio": folder / "day", "model": exported / "float32", "output_dir": tmp_path}
    words = launch.command("transcribe.py", options)
    done = subprocess.run(
        [words[0], "-X", "importtime", *words[1:]],
        cwd=launch.ROOT, env=launch.environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    modules = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "ctranslate2" in modules
    assert not modules & {
        "transformers.models.whisper.modeling_whisper", "peft", "evaluate", "datasets", "scipy"
    }  # fmt: skip


def test_a_run_with_ctranslate2_is_resumed_and_does_not_depend_on_batches(
    exported, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(pipeline, "GROUP_FILES", 1)
    whole = run(exported / "float32", folder / "day", tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "read_pieces", partial(killed_at, "talk.wav", pipeline.read_pieces))
        with pytest.raises(KeyboardInterrupt):
            run(exported / "float32", folder / "day", tmp_path / "killed", word_times=False)
    run(exported / "float32", folder / "day", tmp_path / "killed", word_times=False, runtime="ct2")
    for name in ("talk.flac", "talk.wav"):
        rows = [rows_of(output, name)[1] for output in (whole, tmp_path / "killed")]
        for row in itertools.chain(*rows):
            row.pop("words", None)
        assert rows[0] == rows[1]
    alone = run(exported / "float32", folder / "day", tmp_path / "alone", batch_seconds=1.0)
    assert contents(alone) == contents(whole)


@pytest.mark.parametrize("name", ["hf", "float32"])
def test_beams_give_other_texts_which_do_not_depend_on_batches_either(
    exported, folder, tmp_path, name
):
    rows = []
    for index, options in enumerate([{}, {"num_beams": 4}, {"num_beams": 4, "batch_seconds": 1.0}]):
        output = tmp_path / str(index)
        run(exported / name, folder / "day", output, formats="json", word_times=False, **options)
        rows.append(rows_of(output, "talk.flac")[1])
    greedy, beams, alone = rows
    assert beams == alone
    assert [row["text"] for row in beams] != [row["text"] for row in greedy]
    assert all((row["logprob"] is None) is (name == "hf") for row in beams)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("hf", {"num_beams": 5, "manifest": "a.jsonl"}, "--num_beams 5: PyTorch gives no"),
        ("float32", {"runtime": "torch"}, "--runtime torch: --model .* is a CTranslate2 export"),
        ("hf", {"runtime": "ct2"}, "--runtime ct2: --model .* has no model.bin: give a folder"),
        ("float32", {"adapter": "run/adapter"}, "--adapter run/adapter: cannot be added"),
        ("float32", {"precision": "bf16"}, "--precision bf16: .* computed as it is stored"),
    ],
)
def test_what_does_not_go_with_a_runtime_is_refused(exported, model, options, message):
    with pytest.raises(cli.UserError, match=message):
        transcribe.main(transcribe.Config(audio="a.wav", model=str(exported / model), **options))


def test_transcripts_become_training_data(transcripts, talker, folder, tmp_path, capsys):
    """A resumed run writes the manifest of all recordings, and preprocess.py reads it."""
    manifest = folder / "pseudo.jsonl"
    options = {"manifest": str(manifest), "min_confidence": 0.0, "min_language": 0.0}
    with pytest.raises(SystemExit):
        run(talker, folder, transcripts, **options)
    assert "pseudo.jsonl: 6 segments; left out: none" in capsys.readouterr().out
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert {row["model"] for row in rows} == {str(talker)}
    preprocess.main(
        preprocess.Config(
            source=str(manifest), model=str(talker), output_dir=str(tmp_path / "data"),
            max_chars_per_second=1000.0, num_workers=1,
        )
    )  # fmt: skip
    report = json.loads((tmp_path / "data" / "preprocess.json").read_text())
    assert report["clips"]["read"] == 6
    with pytest.raises(SystemExit):
        run(talker, folder, transcripts, **options | {"min_confidence": 0.99})
    assert "0 segments; left out: 6 confidence" in capsys.readouterr().out
    with pytest.raises(cli.UserError, match="beside or below a manifest only: give a file in"):
        run(talker, folder, transcripts, manifest=str(tmp_path / "pseudo.jsonl"))


def test_a_text_without_times_becomes_training_data_and_recordings_are_scored(
    transcripts, talker, folder, tmp_path, capsys
):
    """Nothing is decoded again for it; what was recognized stands for the text."""
    texts = tmp_path / "texts"
    (texts / "day").mkdir(parents=True)
    content = json.loads((transcripts / "day" / "talk.wav.json").read_text(encoding="utf-8"))
    lines = [f"«{row['text']}»" for row in content["segments"]]
    (texts / "day" / "talk.wav.txt").write_text("\n".join(lines), encoding="utf-8")
    manifest = folder / "clips.jsonl"
    options = {"manifest": str(manifest), "align": str(texts), "reference": str(texts)}
    with pytest.raises(SystemExit):  # of the broken file
        run(talker, folder, transcripts, **options)
    out = capsys.readouterr().out
    assert "3 transcribed before" in out and "recordings without a text: 3" in out
    assert ", 0.0 keep_marks, " in out and "1 recordings, " in out
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    whole = " ".join(" ".join(lines).split())
    assert rows and whole.startswith(rows[0]["text"]) and rows[0]["match"] == 1.0
    starts = [row["start"] for row in content["segments"]]
    assert rows[0]["start"] == pytest.approx(starts[0], abs=0.21)
    assert {row["path"] for row in rows} == {"day/talk.wav"}
    (transcripts / "wer.json").unlink()
    manifest.unlink()


def test_nothing_is_written_where_nobody_speaks(talker, tmp_path):
    """Silence, noise at three levels, hum and clicks."""
    random, seconds = np.random.default_rng(0), 5.0
    clips = {
        "silence": sounds.silence(random, seconds),
        "hum": sounds.hum(random, seconds),
        "clicks": sounds.clicks(random, seconds),
    }
    for level in (-20, -40, -60):
        clips[f"noise{level}"] = sounds.white_noise(random, seconds, dbfs=level)
    (tmp_path / "in").mkdir()
    for name, samples in clips.items():
        soundfile.write(tmp_path / "in" / f"{name}.wav", samples, 16_000)
    output = run(talker, tmp_path / "in", tmp_path / "out")
    assert all((output / f"{name}.txt").read_text() == "" for name in clips)
    rows = [json.loads((output / f"{name}.json").read_text()) for name in clips]
    assert all(not row["segments"] and not row["dropped"] for row in rows)


def test_what_is_dropped_is_listed_with_its_reason(talker, checkpoint, folder, tmp_path, capsys):
    """A no-speech probability and a text that repeats itself each decide alone."""
    talk = folder / "day" / "talk.flac"
    options = {"formats": "txt,json", "word_times": False}
    silent = run(talker, talk, tmp_path / "silent", no_speech=1e-9, **options)
    assert "dropped segments: 3 no speech" in capsys.readouterr().out
    looping = run(checkpoint, talk, tmp_path / "looping", no_speech=1.0, **options)
    assert "dropped segments: 3 repetition" in capsys.readouterr().out
    for output, reason in ((silent, "no_speech"), (looping, "repetition")):
        assert (output / "talk.txt").read_text() == ""
        dropped = json.loads((output / "talk.json").read_text())["dropped"]
        assert [row["dropped"] for row in dropped] == [reason] * 3
        assert all(
            row["text"] and row["decoded_again"] == (reason == "repetition") for row in dropped
        )
    padded = run(checkpoint, talk, tmp_path / "padded", no_speech=1.0, context="full", **options)
    rows = json.loads((padded / "talk.json").read_text())["dropped"]
    assert [(row["dropped"], row["decoded_again"]) for row in rows] == [("repetition", False)] * 3


def test_speech_is_not_lost(speech):
    """At most 0.1 % of the 10-ms frames of speech, of which espeak-ng's silence is known."""
    samples, limits = speech
    made = list(find_stretches([samples], load_vad()))
    loud = np.square(samples[: len(samples) // 160 * 160].reshape(-1, 160)).mean(axis=1) > 1e-5
    heard = np.zeros(len(loud), bool)
    for own in made:
        first = round(own.start * 100)
        heard[first : first + len(own.samples) // 160] = True
    assert len(made) == len(limits) and loud.sum() > 300
    assert (loud & ~heard).sum() <= 0.001 * loud.sum()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"audio": ""}, "--audio is empty"),
        (
            {"formats": "txt,doc"},
            "--formats txt,doc: doc is not a format: give some of",
        ),
        ({"language": "mr", "language_by_segment": True}, "--language mr: is not detected"),
        ({"min_pause": 0.0}, "--min_pause 0.0: give a positive number"),
        ({"num_beams": 0}, "--num_beams 0: give 1 or more"),
        ({"audio": "nowhere"}, "--audio nowhere: does not exist"),
        ({"align": "a.txt"}, "--align a.txt: clips are written to --manifest: give it a file"),
        ({"reference": "a.txt", "formats": "srt"}, "--reference a.txt: .* add json to --formats"),
    ],
)
def test_what_cannot_be_done_is_refused(options, message):
    with pytest.raises(cli.UserError, match=message):
        transcribe.main(transcribe.Config(**{"audio": "a.wav"} | options))
