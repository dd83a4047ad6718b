"""Leakage: scored clips that training had are counted, named, and left out beside the score."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny

import eval_wer
import train_lora
from common import cli, metrics, trained_on
from common.audio import decode_flac
from common.prepared import audio_hashes, hash64, load_prepared
from evaluation import leakage
from evaluation.leakage import leakage_shown


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory):
    """A run on clips of which one's text, and one's nearly, comes again in the test split."""
    folder = tmp_path_factory.mktemp("run")
    source = tiny.make_corpus(folder / "source", clips={"train": 6, "test": 4})
    texts = ["एक दोन तीन चार पाच सहा सात", "घर", "नदी", "सात आठ", "सहा", "पाणी"]
    texts += ["एक दोन तीन चार पाच सहा सत", "घर!", "शाळा शाळा", "चार चार"]
    header, *lines = source.read_text(encoding="utf-8").splitlines()
    for row, text in enumerate(texts):
        name, _, split, speaker = lines[row].split(",")
        lines[row] = f"{name},{text},{split},{'train1' if row == 8 else speaker}"
    source.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    tiny.prepare(source, checkpoint, folder / "data", validation_fraction=0.0)
    config = train_lora.Config(
        model=str(checkpoint), data_dir=str(folder / "data"), output_dir=str(folder / "run"),
        max_steps=1, global_batch_size=2, lora_rank=2, num_workers=0,
    )  # fmt: skip
    train_lora.main(config)
    return folder


@pytest.fixture(scope="module")
def options(checkpoint, run):
    return {
        "model": str(checkpoint), "adapter": str(run / "run" / "adapter"), "compare_base": True,
        "data_dir": str(run / "data"), "output_dir": str(run / "wer"), "num_workers": 0,
        "panels": False,
    }  # fmt: skip


@pytest.fixture(scope="module")
def scored(options):
    eval_wer.main(eval_wer.Config(**options))
    return json.loads((Path(options["output_dir"]) / "wer.json").read_text(encoding="utf-8"))


def test_the_hash_of_audio_is_that_of_its_samples(run):
    train = load_prepared(str(run / "data"))[0]["train"]
    expected = [hashlib.md5(decode_flac(clip["audio"]).tobytes()).digest() for clip in train]
    assert audio_hashes(train).tolist() == [
        int.from_bytes(digest[:8], "little") for digest in expected
    ]


def test_beside_an_adapter_stand_the_hashes_of_its_training_clips(run):
    train = load_prepared(str(run / "data"))[0]["train"]
    recorded = trained_on.read(str(run / "run" / "adapter"), "--adapter")
    assert recorded.texts.tolist() == sorted(
        hash64(metrics.keep_marks(text, "mr").encode()) for text in train["text"]
    )
    assert trained_on.same_clips(recorded, trained_on.hash_clips(train, "transcribe"))
    assert not trained_on.same_clips(
        recorded, trained_on.hash_clips(train.select(range(5)), "transcribe")
    )


def test_repeats_and_near_duplicates_are_counted_and_the_rates_without_them_stand_beside(
    scored, capsys
):
    own = scored["adapter"]["leakage"]
    assert (own["against"], own["is_train_split"], own["clips"]) == ("recorded", True, 2)
    assert own["same_text"] == ["test_001"], "punctuation is no difference"
    assert own["near_text"] == ["test_000"]
    assert own["same_audio"] == []
    assert (own["shared_speakers"], own["clips_of_shared_speakers"]) == (1, 1)
    assert own["without"]["clips"] == 2
    assert set(own["without"]["normalisers"]) == set(scored["adapter"]["normalisers"])
    assert scored["base"]["leakage"]["against"] == "train split"
    line = leakage_shown("adapter", scored["adapter"])
    start = "leakage adapter: of 4 clips 1 have the text of a training clip, 0 the audio, 1 nearly"
    assert line.startswith(start)
    assert f"raw WER of the other 2 clips {own['without']['normalisers']['raw']['wer']:.1f}" in line


def test_the_report_names_the_clips_and_links_to_them(scored, options):
    page = (Path(options["output_dir"]) / "report.html").read_text(encoding="utf-8")
    assert "Leakage, adapter:" in page
    listed = page.split("Clips met in training, adapter")[1].split("</details>")[0]
    assert "test_000" in listed
    assert "test_001" in listed
    assert "test_002" not in listed


def clip_hashes(texts, audio, speakers):
    return trained_on.ClipHashes(*(np.array(own, np.uint64) for own in (texts, audio, speakers)))


def test_audio_is_recognized_and_what_is_unknown_is_not():
    words = [metrics.ErrorCounts(1, 0, 0, 2)] * 3
    counts = {"raw": metrics.ClipCounts("word", words, words)}
    clips = clip_hashes([1, 0, 3], [5, 6, 0], [0, 0, 9])
    record = clip_hashes([0, 8], [0, 6], [0])
    own = leakage.leakage(["a", "b", "c"], clips, [record], None, None, counts)
    assert (own["same_text"], own["same_audio"], own["near_text"]) == ([], ["b"], None)
    assert own["without"] == {"clips": 2, "normalisers": {"raw": {"wer": 50.0, "cer": 50.0}}}
    assert leakage.leakage(["a"], clips, [], None, None, counts) == {"against": None}
    shown = leakage_shown("base", {"leakage": {"against": None}})
    assert shown.startswith("leakage base: unknown")


def test_near_duplicates_are_those_of_a_comparison_of_all_pairs():
    random = np.random.default_rng(0)
    texts = ["".join(random.choice(list("ab"), size=random.integers(1, 25))) for _ in range(120)]
    near = leakage.near_duplicates(texts[:60], texts[60:])
    distance = leakage.Levenshtein.normalized_distance
    expected = [any(distance(a, b) <= 0.1 for b in texts[60:]) for a in texts[:60]]
    assert near.tolist() == expected
    assert 0 < near.sum() < 60


def test_a_damaged_record_is_refused(options, tmp_path):
    copy = Path(shutil.copytree(options["adapter"], tmp_path / "adapter"))
    (copy / trained_on.NAME).write_bytes(b"no")
    with pytest.raises(cli.UserError, match=r"--adapter .*: its trained_on.safetensors is damaged"):
        trained_on.read(str(copy), "--adapter")
