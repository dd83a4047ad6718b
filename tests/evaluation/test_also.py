"""Other prepared folders in the same run, and what a system could do besides its task."""

import contextlib
import copy
import io
import json
import re
from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState

import eval_wer
import preprocess
from common import cli, whisper
from common.prepared import load_prepared
from evaluation import html_report, report
from training import lora

CLOCKS = ("wall_seconds", "real_time_factor", "peak_memory_gib", "batch_seconds")


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    """An adapter that is not zero."""
    torch.manual_seed(1)
    base = whisper.load_base(str(checkpoint), dtype=torch.float32)
    model = lora.add_lora(base, rank=4, alpha=8, targets=["q_proj", "v_proj"], dropout=0.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hindi(checkpoint, tmp_path_factory):
    """A folder of the same name as another, of clips in Hindi."""
    folder = tmp_path_factory.mktemp("hindi")
    source = tiny.make_corpus(folder / "source", clips={"test": 4}, seed=5)
    config = preprocess.Config(
        source=str(source), model=str(checkpoint), output_dir=str(folder / "data"), language="hi",
        num_workers=1,
    )  # fmt: skip
    preprocess.main(config)
    return folder / "data"


@pytest.fixture(scope="module")
def options(checkpoint, prepared, adapter, hindi):
    return {
        "model": str(checkpoint), "adapter": str(adapter), "data_dir": str(prepared),
        "also": str(hindi), "compare_base": True, "num_workers": 0,
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
    """Everything but what the machine decides."""
    return {
        name: {key: value for key, value in systems[name].items() if key not in CLOCKS}
        for name in ("base", "adapter")
    } | {name: systems[name] for name in ("comparisons", "bootstrap")}


# ------ other folders


def test_each_other_folder_has_the_rates_of_a_run_of_its_own(run, options, hindi, tmp_path):
    alone = options | {"data_dir": str(hindi), "also": "", "output_dir": str(tmp_path)}
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
    assert "also data: 4 clips, 0.1 minutes" in run.lines
    for name in ("base", "adapter"):
        rate = run.result["also"]["data"][name]["normalisers"]["raw"]["wer"]
        assert any(line.startswith(f"{name} {rate:.1f} [") for line in printed)
    assert sum(line.startswith("difference ") for line in printed) == 2


def test_the_page_shows_other_data_and_says_in_words_what_got_worse(run):
    results = copy.deepcopy(run.result)
    for own in results["also"]["data"]["comparisons"]:
        own |= {"difference": 12.5, "distinguishable": True}
    text = " ".join(re.sub(r"<[^>]*>", " ", html_report.render(results, [], {})).split())
    other = text[text.index("Other data data 4 clips, 0.1 minutes") :]
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
