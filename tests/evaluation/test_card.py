"""The model card: what wer.json says, beside the adapter, loadable as it says, nothing private."""

import copy
import json
import re
import shutil

import launch
import numpy as np
import pytest
import soundfile
import tiny
from few_sounds import FEW
from huggingface_hub import ModelCard

import eval_wer
import train_lora
from common.prepared import load_prepared, read_record
from evaluation import card, nonspeech


@pytest.fixture(scope="module", autouse=True)
def few_sounds():
    """A panel of few clips: what it counts is tested in test_nonspeech.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nonspeech, "KINDS", FEW)
        yield


@pytest.fixture(scope="module")
def scored(checkpoint, prepared, tmp_path_factory):
    """A folder with a run's adapter and its evaluation; options of the latter."""
    folder = tmp_path_factory.mktemp("card")
    config = train_lora.Config(
        model=str(checkpoint), data_dir=str(prepared), output_dir=str(folder / "run"),
        max_steps=2, global_batch_size=7, lora_rank=2, weight_decay=0.01, num_workers=0,
    )  # fmt: skip
    train_lora.main(config)
    options = {
        "model": str(checkpoint), "adapter": str(folder / "run" / "adapter"),
        "data_dir": str(prepared), "compare_base": True, "output_dir": str(folder / "wer"),
        "num_workers": 0, "report_audio_mb": 0.0, "both_windows": True,
    }  # fmt: skip
    eval_wer.main(eval_wer.Config(**options))
    return options


@pytest.fixture
def results(scored):
    return json.loads(launch.Path(scored["output_dir"], "wer.json").read_text("utf-8"))


def read_card(options):
    return launch.Path(options["adapter"], "README.md").read_text(encoding="utf-8")


def render(results, options, *, name="adapter", record=True, **data):
    made = json.loads(launch.Path(options["adapter"], "recipe.json").read_text())
    prepared = read_record(launch.Path(options["data_dir"]))
    return card.render(results, name, made if record else None, prepared | data, "adapter")


def test_the_card_beside_a_scored_adapter_holds_its_rates_raw_first(scored, results):
    text = read_card(scored)
    metrics = ModelCard(text).data.eval_results
    raw = results["adapter"]["normalisers"]["raw"]
    assert [own.metric_name for own in metrics][:3] == [
        "WER (raw)",
        "CER (raw)",
        "WER (keep_marks)",
    ]
    assert [own.metric_value for own in metrics][:2] == [
        pytest.approx(raw[rate], abs=0.005) for rate in ("wer", "cer")
    ]
    assert {(own.dataset_name, own.dataset_split) for own in metrics} == {("clips.csv", "test")}
    low, high = raw["wer_interval"]
    base = results["base"]["normalisers"]["raw"]
    assert f"Raw WER **{raw['wer']:.1f}** [{low:.1f}, {high:.1f}]" in text
    rows = [line for line in text.splitlines() if line.startswith("| WER raw | ")]
    low, high = base["wer_interval"]
    assert rows[0].startswith(f"| WER raw | {base['wer']:.1f} [{low:.1f}, {high:.1f}] | ")
    assert "\n\n\n" not in text


def test_the_card_has_the_metadata_of_the_hub(scored):
    data = ModelCard(read_card(scored)).data
    assert data.language == ["mr"]
    assert (data.library_name, data.pipeline_tag) == ("peft", "automatic-speech-recognition")
    assert data.license == "unknown"
    assert data.base_model is None, "the base is a folder, which is nobody's id on the Hub"


def test_the_card_says_what_the_adapter_was_trained_on_and_how(scored, prepared):
    text = read_card(scored)
    train = load_prepared(str(prepared))[0]["train"]
    hours = sum(train["seconds"]) / 3600
    assert f"Trained on {len(train)} clips, {hours:.2f} hours, 3 speakers." in text
    for row in (
        "| steps | 2 |",
        "| lora_rank | 2 |",
        "| weight_decay | 0.01 |",
        "| max_steps | 2 |",
    ):
        assert row in text.splitlines(), row


def test_an_option_that_was_not_changed_is_on_the_card_only_if_it_matters(scored):
    text = read_card(scored)
    assert "| lora_dropout | 0.05 |" in text
    assert "max_grad_norm" not in text
    assert "num_workers" not in text, "it changes no weight"


def test_the_card_holds_no_path_no_text_and_no_speaker(scored, prepared):
    text = read_card(scored)
    test = load_prepared(str(prepared))[0]["test"]
    assert not {word for line in test["text"] for word in line.split() if word in text}
    assert not {speaker for speaker in test["speaker"] if re.search(rf"\b{speaker}\b", text)}
    for name in ("model", "adapter", "data_dir", "output_dir"):
        assert str(launch.Path(scored[name]).parent) not in text, name


def test_the_same_results_give_the_same_card_in_any_folder_at_any_speed(scored, results):
    results["recipe"]["config"] |= {"output_dir": "elsewhere", "data_dir": "/moved/prepared"}
    for name in ("base", "adapter"):
        results[name] |= {"wall_seconds": 99.0, "real_time_factor": 9.9, "peak_memory_gib": 9.9}
    assert render(results, scored) == read_card(scored)


def test_the_folder_of_an_adapter_that_a_run_went_on_from_is_not_shown():
    options = {"init_adapter": "/home/anna/run/adapter", "nospeech_share": 0.05, "speed": 0.1}
    record = {"config": options, "changed": ["init_adapter", "speed"]}
    assert card.shown_options(record) == {"nospeech_share": 0.05, "speed": 0.1}


def test_the_code_on_the_card_loads_the_adapter_plain_and_merged(scored, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", read_card(scored), flags=re.S)
    assert len(blocks) == 2
    for name in ("model", "adapter"):
        path = launch.Path(scored[name])
        shutil.copytree(path, tmp_path / path.name)
    generation = tmp_path / launch.Path(scored["model"]).name / "generation_config.json"
    few = json.loads(generation.read_text()) | {"max_length": 20}  # a random model never ends
    generation.write_text(json.dumps(few))
    soundfile.write(tmp_path / "clip.wav", tiny.tone(1.0, pitch=200.0), 16_000)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec("\n".join(blocks), names)  # as a reader of the card does
    assert names["tokens"].shape[0] == 1
    merged = type(names["merged"]).from_pretrained("merged")
    again = merged.generate(**names["inputs"], language="mr", task="transcribe")
    assert np.array_equal(again.numpy(), names["tokens"].numpy())


@pytest.mark.parametrize("edit", ["# Mine\n", None], ids=["of another program", "edited"])
def test_a_card_that_is_not_as_we_wrote_it_is_kept(scored, results, tmp_path, edit):
    adapter = launch.Path(shutil.copytree(scored["adapter"], tmp_path / "adapter"))
    kept = edit or (adapter / "README.md").read_text("utf-8").replace("Not known", "Apache 2.0")
    (adapter / "README.md").write_text(kept, encoding="utf-8")
    results["adapters"] = {"adapter": str(adapter)}
    (tmp_path / "wer.json").write_text(json.dumps(results))
    cards, lines = card.write_cards(tmp_path)
    assert (adapter / "README.md").read_text("utf-8") == kept
    assert cards == {"adapter": adapter / "README.md"}
    elsewhere = tmp_path / "model_card_adapter.md"
    assert elsewhere.read_text("utf-8") == read_card(scored)
    assert lines == [
        f"{adapter / 'README.md'} was edited, or is another program's, and is kept: "
        f"model card {elsewhere}"
    ]


@pytest.mark.root
def test_a_read_only_adapter_is_no_error_and_its_card_lies_with_the_scores(
    scored, results, tmp_path
):
    bare = launch.Path(shutil.copytree(scored["adapter"], tmp_path / "bare"))
    (bare / "README.md").unlink()
    with launch.read_only(bare, tmp_path / "adapter") as adapter:
        results["adapters"] = {"adapter": str(adapter)}
        (tmp_path / "wer.json").write_text(json.dumps(results))
        cards, lines = card.write_cards(tmp_path)
    assert cards == {"adapter": tmp_path / "model_card_adapter.md"}
    assert cards["adapter"].read_text("utf-8") == read_card(scored)
    assert "cannot be written (" in lines[0]


def test_a_part_of_the_test_split_gives_no_card():
    assert eval_wer.has_card(eval_wer.Config())
    for part in ({"max_clips": 3}, {"split": "validation"}, {"model_card": False}):
        assert not eval_wer.has_card(eval_wer.Config(**part)), part


def test_a_full_fine_tune_has_a_card_and_a_base_has_none(scored, results, tmp_path):
    made = json.loads(launch.Path(scored["adapter"], "recipe.json").read_text())
    made["config"] |= {"tune": "full"}
    made["base_id"] = "openai/whisper-small"
    (tmp_path / "model").mkdir()
    results["adapters"] = {}
    results["recipe"]["config"]["model"] = str(tmp_path / "model")
    (tmp_path / "wer.json").write_text(json.dumps(results))
    assert card.write_cards(tmp_path) == ({}, [])
    (tmp_path / "model" / "recipe.json").write_text(json.dumps(made))
    card.write_cards(tmp_path)
    text = (tmp_path / "model" / "README.md").read_text("utf-8")
    data = ModelCard(text).data
    assert (data.library_name, data.base_model) == ("transformers", "openai/whisper-small")
    assert "lora_" not in text
    assert 'from_pretrained("model")' in text
    assert "PeftModel" not in text


def test_each_of_several_adapters_has_a_card_of_its_own_rates(results, scored):
    results["adapter_1"] = results.pop("adapter")
    results["adapter_2"] = copy.deepcopy(results["adapter_1"])
    results["adapter_2"]["normalisers"]["raw"]["wer"] = 12.3
    first, second = (render(results, scored, name=f"adapter_{number}") for number in (1, 2))
    assert "Raw WER **12.3**" in second
    assert "12.3" not in first


def test_limits_name_what_was_not_shown(results, scored):
    for comparison in results["comparisons"]:
        comparison["distinguishable"] = False
    text = render(results, scored, held_out_texts_in_training=3)
    assert "WER raw: the difference to the base is not distinguishable on 7 clips." in text
    assert "* 3 texts of the held-out splits occur in the training split" in text
    assert "3 speakers, fewer than 20: intervals may be too narrow and p too small." in text
    alone = {name: value for name, value in results.items() if name != "base"}
    assert "The base was not scored on these clips" in render(alone | {"comparisons": []}, scored)


def test_an_adapter_that_was_trained_elsewhere_or_before_says_what_is_not_known(results, scored):
    assert "another program, which left no record" in render(results, scored, record=False)
    made = json.loads(launch.Path(scored["adapter"], "recipe.json").read_text())
    for name in ("data", "changed", "base_id"):  # not recorded before there were cards
        del made[name]
    data = read_record(launch.Path(scored["data_dir"]))
    text = card.render(results, "adapter", made, data, "adapter")
    assert "does not say how many clips and hours" in text


def test_panels_of_an_evaluation_are_on_its_card(results, scored):
    counts, text = results["adapter"]["nonspeech"]["natural"], read_card(scored)
    assert f"| {counts['clips_with_words']} of {counts['clips']}, " in text
    assert "| language identified | " in text
    assert "Clips met in training: of 7 clips " in text
    assert "Not tested" not in text
    for system in ("base", "adapter"):
        for kind in ("nonspeech", "abilities", "leakage", "other_window"):
            del results[system][kind]
    text = render(results, scored)
    assert "Not tested: what it writes where nobody speaks." in text
    assert "Not tested: the other window" in text


def test_both_windows_of_an_evaluation_are_in_its_results_and_on_its_card(scored, results):
    other = results["adapter"]["other_window"]
    assert (results["adapter"]["window"], other["window"]) == ("natural", "full")
    assert (results["base"]["window"], results["base"]["other_window"]["window"]) == (
        "full",
        "natural",
    )
    raw = other["normalisers"]["raw"]
    low, high = raw["wer_interval"]
    shown = f" | {raw['wer']:.1f} [{low:.1f}, {high:.1f}] |"
    rows = read_card(scored).splitlines()
    (row,) = [row for row in rows if row.startswith("| WER raw, other window | ")]
    assert row.endswith(shown)
    folder = launch.Path(scored["output_dir"])
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "WER raw there" in page
    options = scored | {"context": "full", "output_dir": str(folder / "full"), "panels": False}
    eval_wer.main(eval_wer.Config(**options | {"model_card": False, "both_windows": False}))
    alone = json.loads((folder / "full" / "wer.json").read_text("utf-8"))["adapter"]
    assert alone["normalisers"] == other["normalisers"], "as a run of its own at that window"


def test_codes_are_those_of_the_hub_and_names_cannot_break_the_page(results, scored):
    groups = [{"group": code, "clips": 1, "wer": 1.0} for code in ("no", "jw")]
    results["adapter"]["breakdown"]["language"] = groups
    results["recipe"]["config"] |= {"license": "apache-2.0", "model": 'a/"b`|<i>'}
    text = render(results, scored, config={"source": "/home/me/x | <script> `y"})
    data = ModelCard(text).data
    assert data.language == ["no", "jv"], "YAML reads a bare no as false"
    assert data.license == "apache-2.0"
    assert "Test split of x script y: " in text
    assert "<script>" not in text.split("---")[2]
