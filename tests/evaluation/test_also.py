"""Other prepared folders in the same run, and what a system could do besides its task."""

import contextlib
import copy
import dataclasses
import html
import io
import json
import re
import shutil
from types import SimpleNamespace

import launch
import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from few_sounds import FEW

import eval_wer
import preprocess
from common import cli, decoding, labels, whisper
from common.audio import decode_flac
from common.predictions import Prediction
from common.prepared import load_prepared
from evaluation import abilities, html_report, nonspeech, report
from evaluation.scores import Scores
from training import lora

TIMES = 1501  # timestamps, from <|0.00|> to <|30.00|>
CLOCKS = ("wall_seconds", "real_time_factor", "peak_memory_gib", "batch_seconds")


@pytest.fixture(scope="module", autouse=True)
def few_sounds():
    """A panel of few clips: what it counts is tested in test_nonspeech.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nonspeech, "KINDS", FEW)
        yield


@pytest.fixture(scope="module")
def timed(checkpoint, tmp_path_factory):
    """The random Whisper, with timestamps in its vocabulary."""
    folder = tmp_path_factory.mktemp("timed")
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    model = whisper.load_base(str(checkpoint), dtype=torch.float32)
    torch.manual_seed(2)
    model.resize_token_embeddings(model.config.vocab_size + TIMES, mean_resizing=False)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(timed, tmp_path_factory):
    """An adapter that is not zero."""
    torch.manual_seed(1)
    base = whisper.load_base(str(timed), dtype=torch.float32)
    model = lora.add_lora(base, rank=4, alpha=8, targets=["q_proj", "v_proj"], dropout=0.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


def prepare(folder, checkpoint, language):
    source = tiny.make_corpus(folder / "source", clips={"test": 2}, longest=1.2, seed=5)
    config = preprocess.Config(
        source=str(source), model=str(checkpoint), output_dir=str(folder / "data"),
        language=language, num_workers=1,
    )  # fmt: skip
    preprocess.main(config)
    return folder / "data"


@pytest.fixture(scope="module")
def hindi(checkpoint, tmp_path_factory):
    """A folder of the same name as another, of clips in Hindi."""
    folder = tmp_path_factory.mktemp("hindi")
    return prepare(folder, checkpoint, "hi")


@pytest.fixture(scope="module")
def options(timed, prepared, adapter, hindi):
    return {
        "model": str(timed), "adapter": str(adapter), "data_dir": str(prepared),
        "also": str(hindi), "compare_base": True, "num_workers": 0, "max_clips": 2,
        "report_audio_mb": 0.0,
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(options, tmp_path_factory):
    """One evaluation: what it wrote and printed."""
    folder, loaded, printed = tmp_path_factory.mktemp("wer"), [], io.StringIO()
    load_system = eval_wer.load_system

    def load(*given, **named):
        loaded.append(given)
        return load_system(*given, **named)

    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(eval_wer, "load_system", load)
        eval_wer.main(eval_wer.Config(**options, output_dir=str(folder)))
    lines = printed.getvalue().splitlines()
    result = json.loads((folder / "wer.json").read_text(encoding="utf-8"))
    return SimpleNamespace(folder=folder, lines=lines, loaded=loaded, result=result)


def rates(systems):
    """Everything but what the machine decides, and the clips without speech."""
    left_out = {*CLOCKS, "nonspeech"}
    return {
        name: {key: value for key, value in systems[name].items() if key not in left_out}
        for name in ("base", "adapter")
    } | {name: systems[name] for name in ("comparisons", "bootstrap")}


# ------ other folders


def test_each_other_folder_has_the_rates_of_a_run_of_its_own(run, options, hindi, tmp_path):
    alone = options | {"data_dir": str(hindi), "also": "", "output_dir": str(tmp_path)}
    alone["batch_seconds"] = 1.0  # no result depends on the batch
    eval_wer.main(eval_wer.Config(**alone))
    expected = json.loads((tmp_path / "wer.json").read_text(encoding="utf-8"))
    assert rates(run.result["also"]["data"]) == rates(expected)
    texts = (run.folder / "predictions_data.jsonl").read_text(encoding="utf-8")
    assert texts == (tmp_path / "predictions.jsonl").read_text(encoding="utf-8")
    assert len(texts.splitlines()) == len(load_prepared(str(hindi))[0]["test"])
    assert run.result["recipe"]["config"]["also"] == str(hindi)


def test_a_model_is_loaded_once_for_all_folders(run):
    assert len(run.loaded) == 2


def test_rates_and_differences_on_other_folders_are_printed(run):
    printed = run.lines[run.lines.index("also data") :]
    assert "also data: 2 clips, 0.0 minutes, 1 processes, fp32" in run.lines
    for name in ("base", "adapter"):
        rate = run.result["also"]["data"][name]["normalisers"]["raw"]["wer"]
        assert any(line.startswith(f"{name} {rate:.1f} [") for line in printed)
    assert sum(line.startswith("difference ") for line in printed) == 2


def test_the_page_shows_other_data_and_says_in_words_what_got_worse(run):
    results = copy.deepcopy(run.result)
    for own in results["also"]["data"]["comparisons"]:
        own |= {"difference": 12.5, "distinguishable": True}
    text = " ".join(re.sub(r"<[^>]*>", " ", html_report.render(results, [], {})).split())
    other = text[text.index("Other data data 2 clips, 0.0 minutes") :]
    raw = results["also"]["data"]["base"]["normalisers"]["raw"]
    low, high = raw["wer_interval"]
    assert f"WER raw {raw['wer']:.1f} [{low:.1f}, {high:.1f}]" in other
    assert "WER raw, adapter less base: +12.5 points" in other
    assert other.count(" adapter is worse") == 2, "WER and CER"
    written = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "Other data" in written


def test_a_difference_that_is_an_increase_is_called_worse_in_print():
    own = {"systems": ["base", "adapter"], "difference": 3.0, "interval": [1.0, 5.0], "p": 0.01}
    line = report.difference_shown(own | {"distinguishable": True}, 9, alone=True)
    assert line == "difference +3.0 [1.0, 5.0], p = 0.0100: worse"
    less = own | {"difference": -3.0, "interval": [-5.0, -1.0], "distinguishable": True}
    assert not report.difference_shown(less, 9, alone=True).endswith("worse")


@pytest.mark.parametrize(
    ("also", "message"),
    [
        ("nowhere", "--also nowhere: no such folder: give the output of preprocess.py"),
        ("{hindi},", "--also {hindi},: no such folder"),
        ("{hindi},{hindi}/", "--also {hindi},{hindi}/: {hindi}, {hindi}/ is given twice: keep one"),
        ("{data}/.", "--also {data}/.: is scored as --data_dir already: leave it out"),
        ("tests", "--also tests holds no readable preprocess.json"),
    ],
)
def test_a_folder_that_cannot_be_scored_is_refused(options, hindi, tmp_path, also, message):
    places = {"hindi": hindi, "data": options["data_dir"]}
    output = tmp_path / "wer"
    given = options | {"also": also.format(**places), "output_dir": str(output)}
    with pytest.raises(cli.UserError) as error:
        eval_wer.main(eval_wer.Config(**given))
    assert message.format(**places) in str(error.value)
    assert "\n" not in str(error.value)
    assert not output.exists()


def test_another_folder_without_the_split_is_refused(options, hindi, tmp_path):
    given = options | {"split": "train", "output_dir": str(tmp_path / "wer")}
    with pytest.raises(cli.UserError, match=f"--split train: --also {hindi} has only test"):
        eval_wer.main(eval_wer.Config(**given))


# ------ abilities


def test_what_each_system_can_do_besides_its_task_is_counted_on_each_folder(run):
    for systems in (run.result, run.result["also"]["data"]):
        for name in ("base", "adapter"):
            own = systems[name]["abilities"]
            assert (own["clips"], own["other_task"]["clips"]) == (2, 2)
            confused = sum(pair["count"] for pair in own["languages"]["confusions"])
            assert 0 < own["languages"]["correct"] + confused <= 2
            assert own["other_task"]["task"] == "translate"
            assert set(own["timestamps"]) == {"starts", "ends", "in_order", "whole"}
    assert run.result["base"]["abilities"] != run.result["adapter"]["abilities"]


def test_languages_are_those_that_the_library_detects(timed, hindi, run):
    model = whisper.load_base(str(timed), dtype=torch.float32).eval()
    whisper.complete_generation_config(model, labels.load_tokenizer(str(timed)))
    detected = []
    for row in load_prepared(str(hindi))[0]["test"]:
        waves = torch.zeros(1, 480_000, dtype=torch.int16)
        samples = torch.from_numpy(decode_flac(row["audio"]))
        waves[0, : len(samples)] = samples
        token = model.detect_language(whisper.features(model, waves)).item()
        names = {token: name for name, token in model.generation_config.lang_to_id.items()}
        detected.append(names[token][2:-2])
    expected = abilities.count_languages(["hi"] * 2, detected)
    assert run.result["also"]["data"]["base"]["abilities"]["languages"] == expected


def test_a_clip_is_encoded_once_for_its_language_and_its_timestamps(options, monkeypatch, tmp_path):
    stock_encode, stock_observe, encoded = decoding.encode, abilities.observe, []

    def observe(*given):
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "encode", encode)
            return stock_observe(*given)

    def encode(model, waves):
        encoded.append(len(waves))
        return stock_encode(model, waves)

    monkeypatch.setattr(abilities, "observe", observe)
    alone = options | {"compare_base": False, "also": "", "output_dir": str(tmp_path)}
    eval_wer.main(eval_wer.Config(**alone))
    own = json.loads((tmp_path / "wer.json").read_text(encoding="utf-8"))["adapter"]["abilities"]
    assert own["languages"] and own["timestamps"]
    assert sum(encoded) == own["clips"]


def test_abilities_are_printed_and_on_the_page(run):
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    text = " ".join(re.sub(r"<[^>]*>", " ", page).split())
    rows = abilities.ability_rows({name: run.result[name] for name in ("base", "adapter")})
    assert len(rows) == 10
    for label, cells in rows:
        assert any(line.split() == [*label.split(), *" ".join(cells).split()] for line in run.lines)
        assert html.unescape(" ".join([label, *cells])) in html.unescape(text)


@pytest.mark.slow
def test_abilities_are_the_same_for_two_processes(run, options, tmp_path):
    two = options | {"output_dir": str(tmp_path)}
    done = launch.run("tests/few_sounds.py", two, processes=2, config="cpu")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "wer.json").read_text(encoding="utf-8"))
    assert rates(result) == rates(run.result)
    assert rates(result["also"]["data"]) == rates(run.result["also"]["data"])


def test_an_english_only_model_has_neither_languages_nor_tasks(english_model, tmp_path, capsys):
    folder = tmp_path / "model.en"
    tiny.make_checkpoint(folder)
    shutil.copytree(english_model, folder, dirs_exist_ok=True)
    model = whisper.load_base(str(folder), dtype=torch.float32)
    model.resize_token_embeddings(259 + TIMES, mean_resizing=False)
    model.save_pretrained(folder)
    data, output = prepare(tmp_path, folder, "en"), tmp_path / "wer"
    config = eval_wer.Config(
        model=str(folder), data_dir=str(data), output_dir=str(output), num_workers=0
    )
    eval_wer.main(config)
    own = json.loads((output / "wer.json").read_text(encoding="utf-8"))["base"]["abilities"]
    assert (own["languages"], own["other_task"]) == (None, None)
    assert own["timestamps"] is not None
    lines = capsys.readouterr().out.splitlines()
    assert "language identified".ljust(40) + " not applicable" in lines


@pytest.mark.parametrize(
    ("tokens", "form"),
    [
        ([100, 7, 150], (True, True, True)),
        ([100, 7, 150, 150, 8, 224], (True, True, True)),
        ([101, 7, 150], (False, True, True)),
        ([100, 7, 150, 140, 8, 160], (True, True, False)),
        ([100, 7, 226], (True, True, False)),  # 2.52 s, in a clip of 2 s
        ([100, 7, 8], (True, False, True)),
        ([100, 150], (True, False, True)),  # no text
        ([7, 8], (False, False, False)),
        ([], (False, False, False)),
    ],
)
def test_the_form_of_timestamps_is_read_from_the_tokens(tokens, form):
    own = abilities.timestamp_form(tokens, 2.0, first=100, end=50)
    assert (own.starts, own.ends, own.in_order) == form


def test_texts_that_are_no_translations_are_counted():
    texts = ["", "नमस्ते दुनिया!", "Hello नम", "no no no no"]
    rows = [Prediction(str(row), text, False) for row, text in enumerate(texts)]
    rows[-1] = dataclasses.replace(rows[-1], loops=True)
    own = abilities.count_texts(rows, ["", "नमस्ते, दुनिया", "hello", "x"])
    assert own == {
        "clips": 4, "empty": 1, "looping": 1, "same_text": 1, "letters": 22, "latin_letters": 13
    }  # fmt: skip


def test_at_most_16_clips_are_sampled_and_the_same_for_every_system():
    ids = [str(row) for row in range(100)]
    rows = {"id": ids, "language": ["hi"] * 100}
    scores = Scores(Dataset.from_dict(rows), None, None)
    for name in ("base", "adapter"):
        scores.texts[name] = {own: Prediction(own, f"{name} {own}", False) for own in ids}
    base, adapter = (abilities.draw_sample(scores, name) for name in ("base", "adapter"))
    assert base.clips["id"] == adapter.clips["id"]
    assert len(set(base.clips["id"])) == 16
    assert base.texts == [f"base {own}" for own in base.clips["id"]]
