"""transcribe.py as a user runs it: files in, transcripts out."""

import json

import numpy as np
import pytest
import soundfile
import soxr

import transcribe
from demo import espeak

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
    defaults = {"language": "mr", "no_speech": 2.0, "formats": "txt,srt,vtt,tsv,json"}
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
def transcripts(checkpoint, folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "transcripts"
    with pytest.raises(SystemExit) as stop:
        run(checkpoint, folder, output)
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
    assert content["window"] == "full" and content["language"] == "mr"
    for row in content["segments"]:
        edges = [edge for word in row["words"] for edge in (word["start"], word["end"])]
        assert edges == sorted(edges) and row["start"] <= edges[0] and edges[-1] <= row["end"]
        assert "".join(word["text"] for word in row["words"]).strip() == row["text"]
