"""--audit: transcripts that do not fit their clips are found, listed, and can be left out."""

import csv
import io
import json

import numpy as np
import pytest
import soundfile
import tiny
import torch
from accelerate import Accelerator
from datasets import Dataset, load_from_disk

import eval_wer
from common import cli, labels
from common.predictions import Prediction, collator_for
from common.prepared import load_prepared
from common.systems import load_system
from common.whisper import features
from evaluation import audit

TEXTS = ["एक दोन तीन", "चार पाच सहा", "सात आठ घर", "पाणी शाळा नदी", "दोन चार आठ", "घर नदी एक"] * 5


def judged(heard, texts=TEXTS, seconds=None, losses=None):
    """Suspects by id, of clips that hear what `heard` says where it differs from `texts`."""
    ids = [f"clip-{i}" for i in range(len(texts))]
    seconds = [2.0 for _ in texts] if seconds is None else seconds
    dataset = Dataset.from_dict({"id": ids, "text": texts, "seconds": seconds})
    said = {i: Prediction(f"clip-{i}", text, False) for i, text in enumerate(texts)}
    texts = {own.id: own for own in (said | heard).values()}
    losses = np.full(len(ids), 0.5) if losses is None else losses
    clips = audit.judge(dataset, ["mr"] * len(ids), texts, losses)
    return {clip.id: clip.reasons for clip in clips if clip.reasons}, clips


def test_each_kind_of_suspect_has_its_reason_and_the_others_have_none():
    heard = {
        3: Prediction("clip-3", TEXTS[4], False),
        9: Prediction("clip-9", "", False),
        15: Prediction("clip-15", "न " * 14, False, loops=True),
    }
    seconds, losses = np.full(30, 2.0), np.full(30, 0.5)
    seconds[20], seconds[21], losses[25] = 0.5, 9.0, 4.0
    reasons, clips = judged(heard, seconds=seconds, losses=losses)
    assert reasons == {
        "clip-3": ("high CER", audit.NEIGHBOUR),
        "clip-9": ("high CER", "nothing heard"),
        "clip-15": ("high CER", "heard a loop"),
        "clip-20": ("many characters a second",),
        "clip-21": ("few characters a second",),
        "clip-25": ("high loss",),
    }
    assert clips[0].id == "clip-3", "it has two measures against it"
    assert clips[0].row()["reason"] == f"high CER; {audit.NEIGHBOUR} clip-4"
    assert [clip.score for clip in clips] == sorted((clip.score for clip in clips), reverse=True)


def test_a_corpus_without_outliers_has_no_suspects():
    assert judged({})[0] == {}


# ------ the script


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Clips of training alone, some of whose ids and texts a spreadsheet would evaluate."""
    folder = tmp_path_factory.mktemp("source")
    random = np.random.default_rng(0)
    lines = ["path,text,speaker"]
    for i in range(12):
        name = ["=1+1", "@SUM", "-2"][i] if i < 3 else f"clip{i}"
        seconds = 6.0 if i in (0, 1, 8) else random.uniform(1.0, 2.0)
        soundfile.write(folder / f"{name}.wav", tiny.tone(seconds, pitch=200 + i, seed=i), 16_000)
        text = "=एक" if i == 0 else " ".join(random.choice(tiny.WORDS, size=3))
        lines.append(f"{name}.wav,{text},speaker{i % 3}")
    (folder / "clips.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "clips.csv"


@pytest.fixture(scope="module")
def audited(checkpoint, source, tmp_path_factory):
    """A prepared folder without held-out splits, the options of its audit, and what it wrote."""
    folder = tmp_path_factory.mktemp("audited")
    none = {"test_fraction": 0.0, "validation_fraction": 0.0}
    data = tiny.prepare(source, checkpoint, folder / "data", **none)
    options = {
        "model": str(checkpoint), "data_dir": str(data), "audit": "train",
        "output_dir": str(folder / "wer"), "num_workers": 0,
    }  # fmt: skip
    eval_wer.main(eval_wer.Config(**options))
    content = (folder / "wer" / "audit.csv").read_bytes().decode("utf-8")
    return data, options, content


def rows_of(content):
    return list(csv.DictReader(io.StringIO(content.removeprefix("\ufeff"), newline="")))


def test_a_folder_of_training_clips_alone_is_audited_without_scores(audited):
    _, options, content = audited
    folder = tiny.Path(options["output_dir"])
    record = json.loads((folder / "wer.json").read_text(encoding="utf-8"))["audit"]
    rows = rows_of(content)
    assert (record["split"], record["system"], record["clips"]) == ("train", "base", 12)
    assert record["suspects"] == len(rows) > 0
    assert not (folder / "report.html").exists()
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    long = {row["id"] for row in rows if "few characters a second" in row["reason"]}
    assert long == {"'=1+1", "'@SUM", "clip8"}
    assert record["worst"][0]["id"] == rows[0]["id"].removeprefix("'")


def test_no_cell_is_a_formula_to_a_spreadsheet(audited):
    _, _, content = audited
    rows = rows_of(content)
    assert content.startswith('\ufeff"id","score","reason"')
    assert {row["text"] for row in rows if row["id"] == "'=1+1"} == {"'=एक"}
    for row in rows:
        assert not any(cell.startswith(("=", "+", "-", "@", "\t")) for cell in row.values())


def test_what_is_audited_excluded_and_prepared_again_lacks_exactly_the_suspects(
    audited, source, checkpoint, tmp_path
):
    data, options, content = audited
    before = load_from_disk(data)["train"]["id"]
    suspects = {"=1+1", "@SUM"} | {row["id"] for row in rows_of(content)}
    less = tiny.prepare(
        source, checkpoint, tmp_path / "less", test_fraction=0.0, validation_fraction=0.0,
        exclude=f"{options['output_dir']}/audit.csv",
    )  # fmt: skip
    assert load_from_disk(less)["train"]["id"] == [name for name in before if name not in suspects]
    record = json.loads((less / "preprocess.json").read_text(encoding="utf-8"))
    assert record["exclude"]["excluded"] == record["exclude"]["ids"] == len(rows_of(content))


def test_the_loss_is_that_of_the_text_alone_and_does_not_depend_on_the_batch(audited, checkpoint):
    data, _, _ = audited
    accelerator, tokenizer = Accelerator(cpu=True), labels.load_tokenizer(str(checkpoint))
    dataset = load_prepared(str(data))[0]["train"].select(range(4))
    system = load_system(
        str(checkpoint), "", tokenizer, accelerator, window_mode="full", dtype=torch.float32
    )  # fmt: skip
    one, many = (audit.transcript_losses(system, dataset, seconds, 0) for seconds in (30.0, 120.0))
    assert one.tolist() == many.tolist()
    waves = collator_for(system.model).waves([dataset[0]], 1500)["waves"]
    tokens = torch.tensor([dataset[0]["labels"]])
    targets = tokens[:, 1:].clone()
    targets[:, :3] = -100  # language, task and no timestamps
    stock = system.model(
        input_features=features(system.model, waves), decoder_input_ids=tokens[:, :-1],
        labels=targets,
    ).loss  # fmt: skip
    assert one[0] == pytest.approx(stock.item(), abs=1e-3)


def test_an_unknown_split_is_refused_by_the_name_of_its_option(audited):
    _, options, _ = audited
    with pytest.raises(cli.UserError, match=r"--audit dev: .* has only train: give one"):
        eval_wer.main(eval_wer.Config(**options | {"audit": "dev"}))
    with pytest.raises(cli.UserError, match=r"--split dev: .* has only train: give one"):
        eval_wer.main(eval_wer.Config(**options | {"split": "dev"}))
