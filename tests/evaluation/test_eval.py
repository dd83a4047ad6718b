"""Evaluation: one corpus score whatever the number of processes, and reports that hide nothing."""

import contextlib
import functools
import io
import json
import shutil
from types import SimpleNamespace

import launch
import pytest
import tiny
import torch
from accelerate import Accelerator
from datasets import Dataset
from safetensors.torch import load_file, save_file

import eval_wer
import train_lora
from common import cli, decoding, labels, predictions, provenance, systems, whisper
from common.prepared import load_prepared
from evaluation import report
from evaluation.scores import worst_clips


@pytest.fixture(scope="module")
def adapter(checkpoint, prepared, tmp_path_factory):
    """An adapter trained far enough to change what the random base says."""
    run = tmp_path_factory.mktemp("run")
    config = train_lora.Config(
        model=str(checkpoint), data_dir=str(prepared), output_dir=str(run), max_steps=30,
        global_batch_size=7, learning_rate=2e-2, lora_targets="q_proj,v_proj,fc1,fc2",
        lora_rank=8, eval_every=1000, num_workers=0,
    )  # fmt: skip
    train_lora.main(config)
    return run / "adapter"


@pytest.fixture(scope="module")
def ending(checkpoint, tmp_path_factory):
    """Options of a base that ends some clips by itself at its natural window, and others not."""
    folder = tmp_path_factory.mktemp("ending")
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    model = whisper.load_base(str(checkpoint), dtype=torch.float32)
    torch.manual_seed(6)
    torch.nn.init.normal_(model.proj_out.weight, std=0.05)
    model.generation_config.begin_suppress_tokens = [tiny.END]
    model.save_pretrained(folder)
    return {"model": str(folder), "adapter": "", "compare_base": False, "context": "natural"}


@pytest.fixture(scope="module")
def shared(checkpoint, prepared, adapter):
    """Options of base and adapter on the same clips, without a folder."""
    return {
        "model": str(checkpoint),
        "adapter": str(adapter),
        "data_dir": str(prepared),
        "compare_base": True,
        "num_workers": 0,
        "panels": False,
    }


@pytest.fixture
def options(shared, tmp_path):
    return shared | {"output_dir": str(tmp_path / "wer")}


@pytest.fixture(scope="module")
def evaluated(shared, tmp_path_factory):
    """An evaluation with options of its own, made once: its options, wer.json and output."""

    @functools.cache
    def run(**own):
        given = shared | own | {"output_dir": str(tmp_path_factory.mktemp("wer") / "wer")}
        with contextlib.redirect_stdout(io.StringIO()) as out:
            result = evaluate(given)
        return SimpleNamespace(options=given, result=result, lines=out.getvalue().splitlines())

    return run


def evaluate(options):
    eval_wer.main(eval_wer.Config(**options))
    return json.loads(read(options, "wer.json"))


def read(options, name):
    return launch.Path(options["output_dir"], name).read_text(encoding="utf-8")


def scores(result):
    """Everything but what the machine decides, and the recipe."""
    clocks = ("wall_seconds", "real_time_factor", "peak_memory_gib", "batch_seconds")
    return {
        name: {key: value for key, value in result[name].items() if key not in clocks}
        for name in ("base", "adapter")
        if name in result
    } | {name: result[name] for name in ("comparisons", "bootstrap")}


def test_base_and_adapter_are_scored_on_the_same_clips(evaluated, prepared):
    result = evaluated().result
    references = load_prepared(str(prepared))[0]["test"]
    words = sum(len(text.split()) for text in references["text"])
    for name in ("base", "adapter"):
        assert result[name]["clips"] == len(references)
        assert set(result[name]["normalisers"]) == {"raw", "keep_marks", "whisper_basic"}
        assert result[name]["normalisers"]["raw"]["words"]["reference_length"] == words
        assert result[name]["real_time_factor"] > 0
        assert len(result[name]["worst"]) == len(references)
    base, tuned = (result[name]["normalisers"]["raw"]["cer"] for name in ("base", "adapter"))
    assert base != tuned
    assert result["recipe"]["config"]["model"] == evaluated().options["model"]


def test_every_rate_and_the_difference_have_an_interval_in_wer_json_and_in_print(evaluated):
    result, lines = evaluated().result, evaluated().lines
    for name in ("base", "adapter"):
        for rates in result[name]["normalisers"].values():
            for rate in ("wer", "cer"):
                low, high = rates[f"{rate}_interval"]
                assert low <= rates[rate] <= high
        raw = result[name]["normalisers"]["raw"]
        low, high = raw["wer_interval"]
        assert any(line.startswith(f"{name} {raw['wer']:.1f} [{low:.1f}, ") for line in lines)
    assert len(result["comparisons"]) == 6, "two rates under three normalisers"
    wer = result["comparisons"][0]
    assert wer["systems"] == ["base", "adapter"]
    rates = [result[name]["normalisers"]["raw"]["wer"] for name in ("base", "adapter")]
    assert wer["difference"] == pytest.approx(rates[1] - rates[0])
    assert any(line.startswith(f"difference {wer['difference']:+.1f} [") for line in lines)
    assert result["bootstrap"]["replicas"] == 10_000
    assert any(line == f"warning: {result['bootstrap']['warning']}" for line in lines)


def test_wer_json_says_where_each_system_fails(evaluated, prepared):
    result = evaluated().result
    test = load_prepared(str(prepared))[0]["test"]
    for name in ("base", "adapter"):
        groups = result[name]["breakdown"]
        assert {row["group"] for row in groups["language"]} == set(test["language"])
        assert {row["group"] for row in groups["speaker"]} == set(test["speaker"])
        raw = result[name]["normalisers"]["raw"]
        assert groups["language"][0]["wer"] == raw["wer"]
        assert groups["language"][0]["wer_interval"] == raw["wer_interval"]
        assert sum(row["clips"] for row in groups["unseen_words"]) == len(test)
        confused = result[name]["confusions"]["words"]
        assert 0 < sum(row["count"] for row in confused) <= raw["words"]["substitutions"]


def test_several_adapters_are_compared_pair_by_pair_in_one_run(
    evaluated, options, tmp_path, capsys
):
    alone = evaluated().result
    assert alone["adapters"] == {"adapter": options["adapter"]}
    copy = str(shutil.copytree(options["adapter"], tmp_path / "copy"))
    result = evaluate(options | {"adapter": f"{options['adapter']},{copy}"})
    assert result["adapters"] == {"adapter_1": options["adapter"], "adapter_2": copy}
    assert result["base"]["normalisers"] == alone["base"]["normalisers"]
    for name in ("adapter_1", "adapter_2"):
        assert result[name]["normalisers"] == alone["adapter"]["normalisers"]
    pairs = [["base", "adapter_1"], ["base", "adapter_2"], ["adapter_1", "adapter_2"]]
    for rate in ("wer", "cer"):
        raw = [
            own for own in result["comparisons"]
            if (own["normaliser"], own["rate"]) == ("raw", rate)
        ]  # fmt: skip
        assert [own["systems"] for own in raw] == pairs
    assert [own["distinguishable"] for own in raw] == [True, True, False], "of letters"
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("adapter_2: wer_raw=") for line in lines)
    same = "adapter_2 - adapter_1 +0.0 [0.0, 0.0], p = 1.0000"
    assert any(line.startswith(same) and "not distinguishable on 7 clips" in line for line in lines)


def test_the_word_errors_of_the_clips_add_up_to_the_corpus_score(evaluated):
    options, result = evaluated().options, evaluated().result
    rows = [json.loads(line) for line in read(options, "predictions.jsonl").splitlines()]
    for name in ("base", "adapter"):
        words = result[name]["normalisers"]["raw"]["words"]
        errors = sum(words[edit] for edit in ("substitutions", "deletions", "insertions"))
        assert sum(row[f"{name}_word_errors"] for row in rows) == errors
        assert result[name]["clips_looping"] == sum(row[f"{name}_loops"] for row in rows)
        assert result[name]["clips_empty"] == sum(not row[name] for row in rows)
    assert all("speaker" in row for row in rows)
    assert result["adapter"]["clips_looping"] > 0


def texts(options, name):
    rows = [json.loads(line) for line in read(options, "predictions.jsonl").splitlines()]
    return [row[name] for row in rows]


def test_each_model_is_decoded_at_the_window_it_was_trained_for(evaluated):
    result = evaluated().result
    assert (result["base"]["window"], result["adapter"]["window"]) == ("full", "natural")
    own = {name: texts(evaluated().options, name) for name in ("base", "adapter")}
    found = {
        context: {name: texts(evaluated(context=context).options, name) for name in own}
        for context in ("natural", "full")
    }
    assert own == {"base": found["full"]["base"], "adapter": found["natural"]["adapter"]}


def test_a_clip_that_loops_or_is_cut_off_at_its_window_is_decoded_once_more_at_30_seconds(
    options, ending, monkeypatch
):
    passes, once = [], predictions._transcribe_once

    def remember(model, tokenizer, dataset, batches, *others):
        attempts = once(model, tokenizer, dataset, batches, *others)
        passes.append((batches, dict(attempts)))
        return attempts

    monkeypatch.setattr(predictions, "_transcribe_once", remember)
    result = evaluate(options | ending)["base"]
    (_, first), (batches, second) = passes
    assert {window for batch in batches for window in batch.windows} == {1500}
    failed = {clip for clip, (_, fails) in first.items() if fails}
    cut = {clip for clip, (prediction, _) in first.items() if prediction.hit_cap}
    assert set(second) == failed >= cut > set()
    assert result["clips_decoded_again"] == len(failed) < len(first)
    said = [(second if clip in failed else first)[clip][0].text for clip in range(len(first))]
    assert texts(options, "base") == said
    evaluate(options | ending | {"context": "full"})
    wide = texts(options, "base")
    assert [said[clip] for clip in failed] == [wide[clip] for clip in failed]


def test_chinese_is_scored_by_letter_where_it_was_transcribed_and_not_where_translated():
    rows = {"id": ["a", "b"], "language": ["zh", "zh"], "text": ["我们去公园吧", "we go out"]}
    clips = Dataset.from_dict(rows)
    said = {"a": predictions.Prediction("a", "我们 去花园吧。", False)}
    said["b"] = predictions.Prediction("b", "we go", False)
    counts = predictions.count_errors(clips.select([0]), said, None, task="transcribe")
    found = predictions.summarise(said, counts)["normalisers"]
    assert {name: rates["unit"] for name, rates in found.items()} == {
        "raw": "word", "keep_marks": "letter", "whisper_basic": "letter"
    }  # fmt: skip
    assert found["keep_marks"]["wer"] == 100 / 6
    worst = worst_clips(clips.select([0]), said, counts["keep_marks"])[0]
    assert (worst["word_errors"], worst["reference_words"]) == (1, 6)
    extra = {"window": "full", "clips_at_cap": 0, "clips_decoded_again": 0}
    extra |= {"clips_looping": 0, "clips_empty": 0}
    extra |= {"real_time_factor": 0.0, "peak_memory_gib": 0.0}
    shown = report.table({"base": {"normalisers": found} | extra})
    assert "counted by word, but keep_marks by letter, whisper_basic by letter" in shown
    translated = predictions.count_errors(clips.select([1]), said, None, task="translate")
    found = predictions.summarise(said, translated)["normalisers"]
    assert {rates["unit"] for rates in found.values()} == {"word"}
    assert found["whisper_english"]["words"]["reference_length"] == 3


def test_predictions_hold_every_clip_and_both_texts(evaluated, prepared):
    lines = read(evaluated().options, "predictions.jsonl").splitlines()
    rows = [json.loads(line) for line in lines]
    test = load_prepared(str(prepared))[0]["test"]
    assert [row["id"] for row in rows] == test["id"]
    assert [row["text"] for row in rows] == test["text"]
    assert all({"base", "adapter", "base_hit_cap", "adapter_hit_cap"} <= set(row) for row in rows)


@pytest.mark.parametrize(
    "context", [{}, {"context": "natural"}, {"context": "full"}], ids=["auto", "natural", "full"]
)
def test_the_score_is_bit_equal_for_any_batch_size(evaluated, options, context):
    small = scores(evaluate(options | context | {"batch_seconds": 1.0}))
    assert small == scores(evaluated(**context).result)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_clips_decoded_again_are_bit_equal_for_any_batch_size(
    evaluated, options, ending, num_beams
):
    natural = ending | {"num_beams": num_beams}
    large = scores(evaluated(**natural).result)
    assert 0 < large["base"]["clips_decoded_again"] < large["base"]["clips"]
    assert scores(evaluate(options | natural | {"batch_seconds": 1.0})) == large


def test_only_the_process_that_writes_counts_errors(options, monkeypatch, tmp_path):
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    monkeypatch.setattr(predictions, "count_errors", lambda *given, **named: pytest.fail("counts"))
    more = {"output_dir": str(tmp_path), "both_windows": True, "compare_base": False}
    eval_wer.main(eval_wer.Config(**options | more))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu", "deepspeed_zero3", "fsdp2"])
def test_the_score_is_bit_equal_for_two_processes_under_any_engine(evaluated, options, config):
    done = launch.run("eval_wer.py", options, processes=2, config=config)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    assert scores(json.loads(read(options, "wer.json"))) == scores(evaluated().result)


@pytest.mark.slow
def test_clips_decoded_again_are_bit_equal_for_two_processes(evaluated, options, ending):
    one = scores(evaluated(**ending, num_beams=1).result)
    two = options | ending
    done = launch.run("eval_wer.py", two, processes=2, config="cpu")
    assert done.returncode == 0, done.stderr
    assert scores(json.loads(read(two, "wer.json"))) == one
    assert 0 < one["base"]["clips_decoded_again"] < one["base"]["clips"]


def test_beams_give_a_score_that_does_not_depend_on_the_batch_either(options):
    beams = options | {"num_beams": 3, "max_clips": 3}
    assert scores(evaluate(beams)) == scores(evaluate(beams | {"batch_seconds": 1.0}))


def test_clips_that_hit_their_cap_are_counted(evaluated, prepared):
    options, result = evaluated().options, evaluated().result
    rate = json.loads((prepared / "preprocess.json").read_text())["tokens_per_second"]["p999"]
    assert decoding.token_cap(2.0, rate) == int(-(-2.0 * rate * 1.25 // 1)) + 16
    assert decoding.token_cap(30.0, 100.0) == 444, "the decoder has 448 positions, 4 are the prompt"
    rows = read(options, "predictions.jsonl").splitlines()
    hits = sum(json.loads(row)["base_hit_cap"] for row in rows)
    assert result["base"]["clips_at_cap"] == hits > 0, "a random model loops"


def test_merging_is_done_in_float32_before_the_weights_are_converted(checkpoint, adapter):
    device = torch.device("cpu")
    wide = systems.load_for_decoding(
        str(checkpoint), str(adapter), dtype=torch.float32, device=device
    )
    narrow = systems.load_for_decoding(
        str(checkpoint), str(adapter), dtype=torch.bfloat16, device=device
    )
    for name, weight in wide.state_dict().items():
        assert torch.equal(weight.bfloat16(), narrow.state_dict()[name]), name


def test_a_full_checkpoint_is_scored_without_adapter(options):
    result = evaluate(options | {"adapter": "", "compare_base": False})
    assert set(result) == {"base", "also", "adapters", "comparisons", "bootstrap", "recipe"}
    assert (result["adapters"], result["comparisons"]) == ({}, [])
    assert "abilities" not in result["base"], "panels are off"


def test_an_old_fine_tune_without_language_ids_is_scored_the_same(evaluated, options, tmp_path):
    old = launch.Path(shutil.copytree(options["model"], tmp_path / "old"))
    generation = json.loads((old / "generation_config.json").read_text())
    for name in ("lang_to_id", "task_to_id", "no_timestamps_token_id", "is_multilingual"):
        del generation[name]
    generation["forced_decoder_ids"] = [[1, tiny.START + 1], [2, tiny.START + 101]]
    (old / "generation_config.json").write_text(json.dumps(generation))
    expected = evaluated().result["base"]["normalisers"]
    got = evaluate(options | {"model": str(old), "adapter": "", "compare_base": False})
    assert got["base"]["normalisers"] == expected


def test_the_report_is_written_last_and_its_address_is_printed_last(evaluated, options, adapter):
    path = launch.Path(evaluated().options["output_dir"], "report.html")
    *_, headline, address = evaluated().lines
    assert headline.startswith("raw WER: base ")
    assert address == f"report {path.as_uri()}"
    page = path.read_text(encoding="utf-8")
    assert page.count("<audio") == len(texts(evaluated().options, "base"))
    assert page.count("Training of adapter") == 1
    assert str(adapter) not in page
    evaluate(options)
    assert read(options, "report.html") == page


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"adapter": "nowhere"}, "--adapter nowhere: no such folder"),
        ({"adapter": "tests,nowhere"}, "--adapter nowhere: no such folder"),
        ({"adapter": "tests,"}, "--adapter tests,: no such folder"),
        ({"adapter": "tests,tests"}, "--adapter tests,tests: tests is given twice: keep one"),
        ({"data_dir": "nowhere"}, "--data_dir nowhere"),
        ({"split": "dev"}, "--split dev: "),
        ({"adapter": ""}, "--compare_base true needs an adapter"),
        ({"batch_seconds": -1.0}, "--batch_seconds -1.0: give a positive number, or 0"),
        ({"report_audio_mb": -1.0}, "--report_audio_mb -1.0: give a number of megabytes, or 0"),
    ],
)
def test_each_mistake_names_option_value_and_remedy(options, wrong, message):
    with pytest.raises(cli.UserError) as error:
        evaluate(options | wrong)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not launch.Path(options["output_dir"]).exists()


def test_an_adapter_of_another_base_of_the_same_shape_is_refused(options, tmp_path):
    copy = launch.Path(shutil.copytree(options["adapter"], tmp_path / "other"))
    made = json.loads((copy / "recipe.json").read_text())
    made["base_probe"] = [value + 0.5 for value in made["base_probe"]]
    (copy / "recipe.json").write_text(json.dumps(made))
    with pytest.raises(cli.UserError, match=r"--adapter .* whose weights are not those of --model"):
        evaluate(options | {"adapter": str(copy)})


def test_an_adapter_that_changes_nothing_is_scored_with_a_warning(options, tmp_path, capsys):
    folder = shutil.copytree(options["adapter"], tmp_path / "zero")
    file = folder / "adapter_model.safetensors"
    save_file({n: tensor * ("lora_B" not in n) for n, tensor in load_file(file).items()}, file)
    result = evaluate(options | {"adapter": str(folder), "max_clips": 1})
    shown = capsys.readouterr().out
    assert f"warning: {folder}: the adapter changes nothing" in shown
    assert "changes nothing" in result["adapter"]["warning"] and result["base"]["warning"] == ""
    assert "changes nothing" in read(options, "report.html")


def test_only_a_model_trained_on_empty_texts_may_write_nothing(ending, options, tmp_path):
    """Checkpoints of Whisper forbid their decoding to end before the first word."""
    copy = launch.Path(shutil.copytree(options["adapter"], tmp_path / "other"))
    made = json.loads((copy / "recipe.json").read_text())
    tokenizer, forbidden = labels.load_tokenizer(ending["model"]), {}
    for share in (0.0, 0.1):
        made["config"]["nospeech_share"] = share
        (copy / "recipe.json").write_text(json.dumps(made))
        for name, adapter in (("base", ""), ("adapter", str(copy))):
            system = systems.load_system(
                ending["model"], adapter, tokenizer, Accelerator(cpu=True), window_mode="auto",
                dtype=torch.float32,
            )  # fmt: skip
            first = system.model.generation_config.begin_suppress_tokens
            forbidden[name, share] = tiny.END in first
    assert forbidden == {
        ("base", 0.0): True, ("adapter", 0.0): True, ("base", 0.1): True, ("adapter", 0.1): False
    }  # fmt: skip


def test_a_recipe_of_another_program_is_no_record_and_a_damaged_one_is_refused(tmp_path):
    assert provenance.read_record(str(tmp_path), "--adapter") is None
    for content in ("[1]", '{"steps": 3}'):
        (tmp_path / "recipe.json").write_text(content)
        assert provenance.read_record(str(tmp_path), "--adapter") is None
    (tmp_path / "recipe.json").write_text('{"window": ')
    with pytest.raises(cli.UserError, match=r"--adapter .*: its recipe\.json is damaged"):
        provenance.read_record(str(tmp_path), "--adapter")
