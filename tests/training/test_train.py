"""Training: the same losses however the batch is cut, exact resume, and what a run leaves."""

import itertools
import json
import math
import shutil
import signal

import launch
import numpy as np
import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from short_run import AUGMENTED, SMALL, records, small_options, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

import eval_wer
from common import cli, predictions, whisper, windows
from common.batching import MicroBatch
from common.collator import load_batches
from common.prepared import label_lengths, load_prepared
from training import checkpoint as checkpoint_files
from training import step as steps
from training import validation
from training.loss import SpeechLoss
from training.schedule import learning_rate


@pytest.fixture
def options(checkpoint, prepared, tmp_path):
    return small_options(checkpoint, prepared, tmp_path, save_every=2, eval_every=3)


@pytest.fixture
def unvalidated(options, train_only):
    """Options of a run that evaluates nothing, for tests of its steps alone."""
    return options | {"data_dir": str(train_only)}


def read_json(options, name):
    return json.loads(launch.Path(options["output_dir"], name).read_text(encoding="utf-8"))


def adapter(options, name="adapter"):
    return load_file(f"{options['output_dir']}/{name}/adapter_model.safetensors")


@pytest.fixture(scope="module")
def finished(checkpoint, prepared, tmp_path_factory):
    """Options of a run that has ended, for tests that read it."""
    folder = tmp_path_factory.mktemp("finished")
    options = small_options(checkpoint, prepared, folder, save_every=2, eval_every=3)
    train(options)
    return options


@pytest.fixture
def ended(finished, options):
    """A copy of it, for tests that train in its folder."""
    shutil.copytree(finished["output_dir"], options["output_dir"])
    return options


# ------ loss


def test_what_a_base_draws_by_itself_is_off_so_the_loss_is_that_of_any_accumulation(
    unvalidated, checkpoint, tmp_path
):
    """SpecAugment, dropout and layer drop, where a base's config asks for them."""
    restless = shutil.copytree(checkpoint, tmp_path / "restless")
    config = json.loads((restless / "config.json").read_text(encoding="utf-8"))
    config |= {"apply_spec_augment": True, "mask_time_prob": 0.3, "dropout": 0.1}
    config |= {"attention_dropout": 0.1, "activation_dropout": 0.1, "encoder_layerdrop": 0.5}
    (restless / "config.json").write_text(json.dumps(config | {"decoder_layerdrop": 0.5}))
    runs = []
    for seconds in (1000.0, 1.0):
        own = unvalidated | {"model": str(restless), "max_batch_seconds": seconds, "max_steps": 3}
        own |= {"output_dir": str(tmp_path / f"in_{seconds}")}
        train(own)
        runs.append(records(own, "loss"))
    train(unvalidated | {"max_steps": 3})
    runs.append(records(unvalidated, "loss"))  # of a base that draws nothing
    assert np.allclose(list(runs[0].values()), list(runs[1].values()), rtol=1e-5), runs
    assert np.allclose(list(runs[0].values()), list(runs[2].values()), rtol=1e-5), runs


def test_the_loss_is_the_same_for_every_accumulation(unvalidated, tmp_path):
    runs = []
    for clips in (4, 2, 1):
        seconds = clips * 30.0
        own = (
            unvalidated
            | AUGMENTED
            | {
                "output_dir": str(tmp_path / f"of{clips}"),
                "max_batch_seconds": seconds,
                "context": "full",
                "max_steps": 3,
                "lora_dropout": 0.0,
            }
        )
        train(own)
        runs.append(list(records(own, "loss").values()))
    assert np.allclose(runs[0], runs[1], rtol=1e-5), runs
    assert np.allclose(runs[0], runs[2], rtol=1e-5), runs


@pytest.mark.slow
def test_the_loss_is_the_same_with_two_processes(options, tmp_path):
    one = options | AUGMENTED | {"global_batch_size": 3}  # 3: the ranks' shares differ
    train(one)
    two = one | {"output_dir": str(tmp_path / "two")}
    done = launch.run("train_lora.py", two, processes=2)
    assert done.returncode == 0, done.stderr
    assert read_json(two, "train.json")["processes"] == 2
    for key in ("loss", "eval_loss", "grad_norm"):
        expected, got = records(one, key), records(two, key)
        assert expected.keys() == got.keys()
        difference = [abs(got[step] / expected[step] - 1) for step in expected]
        assert max(difference) < 1e-4, f"{key} differs by {max(difference)}"
    assert records(one, "wer_raw") == records(two, "wer_raw")


def test_the_summed_loss_over_tokens_is_the_models_own_mean(checkpoint, prepared):
    train_split = load_prepared(str(prepared))[0]["train"]
    model = whisper.load_base(str(checkpoint), dtype=torch.float32).eval()
    longest = int(label_lengths(train_split)[:3].max()) - 1
    batches = [MicroBatch((0, 1, 2), 400, longest)]
    (inputs,) = load_batches(train_split, batches, predictions.collator_for(model), num_workers=0)
    with torch.no_grad():
        own = steps.batch_loss(SpeechLoss(model), inputs) / (inputs["labels"] != -100).sum()
        states = whisper.encode(model, inputs["waves"])
        stock = model(encoder_outputs=(states,), labels=inputs["labels"]).loss
    assert own.item() == pytest.approx(stock.item(), rel=1e-5)


def test_one_batch_can_be_learnt_by_heart(options, checkpoint, tmp_path):
    source = tiny.make_corpus(tmp_path / "source", clips={"train": 3})
    data = tiny.prepare(source, checkpoint, tmp_path / "data")
    train(
        options
        | {
            "data_dir": str(data),
            "max_steps": 100,
            "global_batch_size": 3,
            "learning_rate": 1e-2,
            "lora_targets": "q_proj,k_proj,v_proj,out_proj,fc1,fc2",
            "lora_rank": 32,
            "lora_alpha": 32,
            "lora_dropout": 0.0,
            "save_every": 1000,
        }
    )
    losses = records(options, "loss")
    assert losses[100] < 0.1 * losses[1], losses


def test_a_corpus_without_validation_trains_to_its_end(options, checkpoint, tmp_path, capsys):
    source = tiny.make_corpus(tmp_path / "source", clips={"train": 5, "test": 1})
    data = tiny.prepare(source, checkpoint, tmp_path / "data", validation_fraction=0.0)
    with pytest.raises(cli.UserError, match=r"--patience 2: .* has no validation split"):
        train(options | {"data_dir": str(data), "patience": 2})
    train(options | {"data_dir": str(data)})
    assert "no validation split" in capsys.readouterr().out
    assert not records(options, "eval_loss")
    assert adapter(options)
    assert not launch.Path(options["output_dir"], "adapter_best").exists()


# ------ schedule


def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero():
    for decay in ("linear", "cosine"):
        options = {"peak": 2.0, "warmup_ratio": 0.1, "decay": decay}
        rates = [learning_rate(step, 100, **options) for step in range(101)]
        assert rates[9] == rates[10] == 2.0
        assert rates[4] == pytest.approx(1.0)
        assert rates[55] == pytest.approx(1.0)
        assert rates[100] == pytest.approx(0.0)
        assert rates[10:] == sorted(rates[10:], reverse=True)


# ------ what a run leaves


def test_only_the_adapter_changes(finished, checkpoint):
    names = adapter(finished)
    assert names
    assert all("lora_" in name for name in names)
    stock = WhisperForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(stock, f"{finished['output_dir']}/adapter")
    base = WhisperForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    for name, weight in base.state_dict().items():
        kept = tuned.get_base_model().state_dict()
        assert torch.equal(kept.get(name, kept.get(_wrapped(name))), weight), name
    assert any(value.abs().max() > 0 for name, value in names.items() if "lora_B" in name)


def _wrapped(name):
    stem, _, last = name.rpartition(".")
    return f"{stem}.base_layer.{last}"


def test_checkpoints_hold_no_base_and_only_the_newest_are_kept(finished):
    folder = launch.Path(finished["output_dir"]) / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-00000006"]
    for path in folder.iterdir():
        assert {file.name for file in path.iterdir()} == {
            "weights.safetensors",
            "exp_avg.safetensors",
            "exp_avg_sq.safetensors",
            "state.json",
        }
        for file in path.glob("*.safetensors"):
            assert all("lora_" in name for name in load_file(file))


def test_the_recipe_and_the_window_lie_beside_the_adapter(finished):
    for name in ("adapter", "adapter_best"):
        made = read_json(finished, f"{name}/recipe.json")
        assert made["window"]["train_margin"] == list(windows.TRAIN_MARGIN)
        assert made["config"]["lora_rank"] == 4
        assert made["versions"]["peft"]
        assert "commit" in made


def test_the_best_adapter_is_that_of_the_lowest_validation_loss(finished):
    losses = records(finished, "eval_loss")
    best = read_json(finished, "train.json")["best"]
    assert best["step"] == min((step for step in losses if step), key=losses.get)
    made = read_json(finished, "adapter_best/recipe.json")
    assert made["step"] == best["step"]


def test_tensorboard_holds_the_curves_and_texts(finished):
    events = EventAccumulator(f"{finished['output_dir']}/tensorboard").Reload()
    expected = {
        "loss", "grad_norm", "learning_rate", "clips_per_second", "audio_seconds_per_second",
        "data_wait_share", "eval_loss", "wer_raw", "cer_keep_marks",
    }  # fmt: skip
    assert expected <= set(events.Tags()["scalars"])
    assert len(events.Scalars("loss")) == SMALL["max_steps"]
    assert any("predictions" in tag for tag in events.Tags()["tensors"])


def test_a_logged_step_is_one_line_of_stable_keys(ended, capsys):
    train(ended | {"resume": "never"})
    lines = [line for line in capsys.readouterr().out.splitlines() if " loss=" in line]
    assert len(lines) == SMALL["max_steps"]
    keys = [pair.split("=")[0] for pair in lines[0].split()]
    assert keys == [
        "step", "epoch", "loss", "grad_norm", "learning_rate", "clips_per_second",
        "audio_seconds_per_second", "data_wait_share",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "extra",
    [
        {"quantize": "int8"},
        {"quantize": "nf4"},
        {"precision": "bf16"},
        {"gradient_checkpointing": True},
        {"schedule": "cosine"},
    ],
)
def test_each_way_to_hold_the_base_trains(unvalidated, extra):
    train(unvalidated | {"max_steps": 2} | extra)
    assert all(math.isfinite(loss) for loss in records(unvalidated, "loss").values())
    moved = [value for name, value in adapter(unvalidated).items() if "lora_B" in name]
    assert all(value.dtype == torch.float32 for value in moved)
    assert all(value.abs().max() > 0 for value in moved)


@pytest.mark.parametrize("left_out", [[], ["generation_config.json", "preprocessor_config.json"]])
def test_a_full_fine_tune_writes_the_language_asked_for_in_stock_transformers(
    options, checkpoint, tmp_path, left_out
):
    base = shutil.copytree(checkpoint, tmp_path / "base")
    generation = {"max_length": 448, "begin_suppress_tokens": [tiny.END, 30]}
    (base / "generation_config.json").write_text(json.dumps(generation))
    for name in left_out:
        (base / name).unlink()
    full = {"tune": "full", "max_steps": 1, "learning_rate": 1e-5, "nospeech_share": 0.4}
    train(options | full | {"model": str(base)})
    saved = f"{options['output_dir']}/model"
    written = json.loads(launch.Path(saved, "generation_config.json").read_text())
    first = written["begin_suppress_tokens"]
    assert tiny.END not in first, "it may write nothing"
    assert (30 in first) == (not left_out)
    assert not written.get("_from_model_config"), "transformers would leave its entries out"
    stock = WhisperForConditionalGeneration.from_pretrained(saved, dtype=torch.float32).eval()
    features = WhisperFeatureExtractor.from_pretrained(saved)(
        tiny.tone(2.0, pitch=200.0), sampling_rate=16_000, return_tensors="pt"
    ).input_features
    ids = stock.generation_config.lang_to_id
    for code in ("mr", "hi"):
        written = stock.generate(
            features, language=code, task="transcribe", max_new_tokens=4,
            return_dict_in_generate=True,
        ).sequences[0]  # fmt: skip
        prompt = [tiny.START, ids[f"<|{code}|>"], tiny.START + 101, tiny.START + 105]
        assert written[:4].tolist() == prompt


def test_checkpointing_changes_memory_and_not_the_loss(unvalidated, tmp_path):
    train(unvalidated)
    other = unvalidated | {"gradient_checkpointing": True, "output_dir": str(tmp_path / "other")}
    train(other)
    expected, got = records(unvalidated, "loss"), records(other, "loss")
    assert np.allclose(list(expected.values()), list(got.values()), rtol=1e-5)


def test_memory_that_runs_out_halves_the_pieces_and_not_the_loss(
    unvalidated, monkeypatch, tmp_path, capsys
):
    plain = unvalidated | {"lora_dropout": 0.0, "max_batch_seconds": 120.0}
    train(plain)
    stock = steps.batch_loss

    def fails_on_two_clips(model, inputs):
        if model.training and len(inputs["labels"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stock(model, inputs)

    monkeypatch.setattr(steps, "batch_loss", fails_on_two_clips)
    halved = plain | {"output_dir": str(tmp_path / "halved")}
    train(halved)
    assert "pieces are cut into 4 from here on" in capsys.readouterr().out
    expected, got = records(plain, "loss"), records(halved, "loss")
    assert np.allclose(list(expected.values()), list(got.values()), rtol=1e-5)


def test_a_step_that_starts_again_has_the_gradient_of_one_that_does_not(
    unvalidated, monkeypatch, tmp_path
):
    """Memory runs out in the first, second or last of four pieces, before or after its graph."""
    stock = steps.batch_loss
    pieces = {"context": "full", "max_batch_seconds": 60.0, "global_batch_size": 7}
    pieces |= {"nospeech_share": 0.0}
    plain = unvalidated | pieces | {"lora_dropout": 0.5, "max_steps": 2}
    train(plain)
    for failing, computed in [(0, True), (1, True), (3, True), (3, False)]:
        calls = itertools.count()

        def fails_once(model, inputs, failing=failing, computed=computed, calls=calls):
            if model.training and next(calls) == failing:
                if computed:
                    stock(model, inputs)
                raise torch.OutOfMemoryError("CUDA out of memory")
            return stock(model, inputs)

        monkeypatch.setattr(steps, "batch_loss", fails_once)
        again = plain | {"output_dir": str(tmp_path / f"{failing}_{computed}")}
        train(again)
        assert next(calls) == failing + 1 + 2 * 7, "two steps of a clip a piece"
        for key in ("grad_norm", "loss"):
            expected, got = records(plain, key), records(again, key)
            assert np.allclose(list(expected.values()), list(got.values()), rtol=1e-5), (key, got)


def test_memory_that_cannot_hold_one_clip_is_a_user_error(options, monkeypatch):
    def fails(model, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(steps, "batch_loss", fails)
    with pytest.raises(cli.UserError, match=r"--max_batch_seconds .* step 1 does not fit"):
        train(options)


def test_the_memory_plan_is_said_and_a_size_given_by_hand_is_obeyed(options, capsys):
    train(options | {"max_steps": 1})
    assert "micro-batches of 30 s of window" in capsys.readouterr().out
    train(options | {"max_steps": 1, "max_batch_seconds": 77.0, "resume": "never"})
    assert "micro-batches of 77 s of window" in capsys.readouterr().out
    with pytest.raises(cli.UserError, match=r"--memory_gib 0\.1: one clip takes"):
        train(options | {"memory_gib": 0.1, "resume": "never"})


@pytest.mark.parametrize("scope", ["decoder", "top_1"])
def test_an_adapter_of_a_part_of_the_model_trains_and_is_scored(options, scope, tmp_path):
    train(options | {"lora_scope": scope, "learning_rate": 1e-2})
    losses = list(records(options, "loss").values())
    assert losses[-1] < losses[0], losses
    eval_wer.main(
        eval_wer.Config(
            model=options["model"], adapter=options["output_dir"] + "/adapter",
            data_dir=options["data_dir"], output_dir=str(tmp_path / "wer"), num_workers=0,
            panels=False,
        )
    )  # fmt: skip
    scored = json.loads((tmp_path / "wer" / "wer.json").read_text(encoding="utf-8"))
    assert scored["adapter"]["normalisers"]["raw"]["wer"] > 0


def test_a_run_goes_on_from_a_saved_adapter_with_its_own_rank(finished, checkpoint, tmp_path):
    first = str(launch.Path(finished["output_dir"], "adapter"))
    more = {"init_adapter": first, "max_steps": 1, "output_dir": str(tmp_path / "more")}
    own = {name: value for name, value in finished.items() if not name.startswith("lora_")}
    train(own | more | {"learning_rate": 1e-9})
    before, after = (load_file(launch.Path(run, "adapter_model.safetensors")) for run in (
        first, tmp_path / "more" / "adapter"))  # fmt: skip
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-8)
    used = read_json(own | more, "adapter/recipe.json")["config"]
    assert (used["lora_rank"], used["lora_alpha"]) == (4, 8), "of the adapter, not the defaults"
    assert used["init_adapter"] == first

    other = shutil.copytree(checkpoint, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: -value for name, value in weights.items()}, other / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(cli.UserError, match=r"--init_adapter .* whose weights are not those of"):
        train(own | more | {"model": str(other), "output_dir": str(tmp_path / "wrong")})
    with pytest.raises(cli.UserError, match=r"--init_adapter .*: no LoRA adapter there"):
        train(own | more | {"init_adapter": str(checkpoint), "output_dir": str(tmp_path / "no")})
    with pytest.raises(cli.UserError, match=r"--init_adapter .* leave out --lora_scope decoder"):
        train(own | more | {"lora_scope": "decoder", "output_dir": str(tmp_path / "no")})


def test_a_scope_without_meaning_is_refused(options):
    with pytest.raises(cli.UserError, match="--lora_scope top_: give all, decoder"):
        train(options | {"lora_scope": "top_"})


# ------ resume


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_losses_and_the_same_adapter(options, tmp_path):
    more = {"max_steps": 40, "log_every": 3, "eval_every": 10, "save_every": 7}
    whole = options | AUGMENTED | more
    train(whole)
    cut = whole | {"output_dir": str(tmp_path / "cut")}
    process = launch.start(launch.command("train_lora.py", cut))
    checkpoints = launch.Path(cut["output_dir"]) / "checkpoints"
    launch.wait_for(lambda: list(checkpoints.glob("step-*/state.json")), process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"

    train(cut)
    for key in ("loss", "grad_norm", "eval_loss", "wer_raw"):
        assert records(cut, key) == records(whole, key), key
    for name in ("adapter", "adapter_best"):
        expected, got = adapter(whole, name), adapter(cut, name)
        assert all(torch.equal(expected[key], got[key]) for key in expected), name


def test_a_checkpoint_is_there_before_an_evaluation_that_fails_and_a_resume_makes_up_for_it(
    options, monkeypatch, tmp_path
):
    whole = options | {"wer_every": 2, "output_dir": str(tmp_path / "whole")}
    train(whole)
    stock = validation.word_error_rates

    def fails(*given):
        assert next(calls) != 0, "evaluated too early"
        return stock(*given)

    monkeypatch.setattr(validation, "word_error_rates", fails)
    for failing, step in ((0, 2), (2, 6)):  # resumed, it evaluates after steps 2, 4 and 6
        calls = itertools.count(-failing)
        with pytest.raises(AssertionError, match="evaluated too early"):
            train(options | {"wer_every": 2})
        folder = launch.Path(options["output_dir"], "checkpoints", f"step-{step:08d}")
        assert not checkpoint_files.read_state(folder)["evaluated"]
    assert set(adapter(options)) == set(adapter(whole)), "the trained adapter is kept"
    monkeypatch.setattr(validation, "word_error_rates", stock)
    train(options | {"wer_every": 2})
    assert checkpoint_files.read_state(folder)["evaluated"]
    for key in ("loss", "eval_loss", "wer_raw"):
        assert records(options, key) == records(whole, key)
    assert read_json(options, "train.json")["best"] == read_json(whole, "train.json")["best"]


def test_validation_clips_are_decoded_in_batches_that_fit_the_free_memory_in_the_runs_precision(
    options, monkeypatch
):
    """Planned as eval_wer.py does, whatever seconds are trained on at once."""
    stock, planned, autocast = predictions.transcribe, [], []

    def transcribe(model, tokenizer, dataset, batches, options):
        planned.append(len(batches))
        autocast.append(torch.is_autocast_enabled("cpu"))
        return stock(model, tokenizer, dataset, batches, options)

    monkeypatch.setattr(predictions, "transcribe", transcribe)
    full = {"tune": "full", "learning_rate": 1e-4, "precision": "bf16", "max_batch_seconds": 1e4}
    counts = []
    for free_gib in (100.0, 1e-3):
        monkeypatch.setattr(predictions, "device_memory_gib", lambda *_, gib=free_gib: gib)
        train(options | full | {"max_steps": 1, "resume": "never"})
        counts.append(planned[-1])
    assert counts[0] == 1 and counts[1] > 1, counts
    assert all(autocast), "weights held in float32 are decoded in bf16, too"


def test_a_resumed_run_takes_up_losses_since_the_last_log_line(unvalidated, tmp_path):
    whole = unvalidated | AUGMENTED | {"log_every": 3}
    train(whole)
    cut = whole | {"output_dir": str(tmp_path / "cut")}
    train(cut)
    folder = launch.Path(cut["output_dir"])
    shutil.rmtree(folder / "checkpoints" / "step-00000006")  # as if killed after step 4
    train(cut)
    assert records(cut, "loss") == records(whole, "loss")
    assert all(torch.equal(adapter(whole)[key], value) for key, value in adapter(cut).items())


def test_other_options_are_refused_by_name_and_never_starts_anew(ended):
    with pytest.raises(cli.UserError, match=r"--learning_rate 0\.5 \(was 0\.001\)"):
        train(ended | {"learning_rate": 0.5})
    train(ended | {"learning_rate": 0.5, "resume": "never"})
    assert max(records(ended, "learning_rate").values()) == 0.5


# ------ errors


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"data_dir": "nowhere"}, "--data_dir nowhere"),
        ({"model": "nowhere/at-all"}, "--model nowhere/at-all"),
        ({"lora_targets": "q_proj,zz"}, "--lora_targets q_proj,zz: zz is not in Whisper"),
        ({"num_epochs": 0}, "--num_epochs 0: give a positive number"),
        ({"warmup_ratio": 1.5}, "--warmup_ratio 1.5: give a share"),
        ({"precision": "fp16"}, "--precision fp16: needs a GPU"),
        ({"speed": 0.9}, "--speed 0.9: plays clips up to"),
        (
            {"lora_scope": "decoder", "cache_encoder": True, "speed": 0.1, "spec_augment": True},
            "--speed and --spec_augment would change in every epoch",
        ),
    ],
)
def test_each_mistake_names_option_value_and_remedy(options, wrong, message):
    with pytest.raises(cli.UserError) as error:
        train(options | wrong)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not launch.Path(options["output_dir"]).exists(), "nothing half-written"


def test_labels_of_another_tokenizer_are_refused(options, prepared, tmp_path):
    copy = shutil.copytree(prepared, tmp_path / "copy")
    made = json.loads((copy / "preprocess.json").read_text())
    made["tokenizer_fingerprint"] = "0" * 16
    (copy / "preprocess.json").write_text(json.dumps(made))
    with pytest.raises(cli.UserError, match=r"labels were made by the tokenizer of .* preprocess"):
        train(options | {"data_dir": str(copy)})


def test_a_gradient_that_is_not_finite_stops_before_the_step_and_names_the_clips(
    options, monkeypatch
):
    stock = steps.batch_loss
    monkeypatch.setattr(steps, "batch_loss", lambda *a: stock(*a) * math.inf)
    with pytest.raises(cli.UserError, match=r"norm is nan in step 1 \(clips .*train_0"):
        train(options | {"eval_every": 1000})


def test_a_gradient_that_is_not_finite_between_log_lines_keeps_nothing_of_it(options, monkeypatch):
    stock, calls = steps.batch_loss, itertools.count()

    def spoilt(model, inputs):
        loss = stock(model, inputs)
        return loss * (math.nan if model.training and next(calls) == 2 else 1.0)

    monkeypatch.setattr(steps, "batch_loss", spoilt)
    more = {"max_batch_seconds": 1000.0, "log_every": 5, "save_every": 2, "eval_every": 1000}
    with pytest.raises(cli.UserError, match=r"norm is nan in step 3 \(clips "):
        train(options | more)
    saved = launch.Path(options["output_dir"], "checkpoints")
    assert [folder.name for folder in saved.iterdir()] == ["step-00000002"]


@pytest.mark.root
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays_whole(options, tmp_path):
    with launch.small_disk(tmp_path / "disk", "400k") as disk:
        small = options | {"output_dir": str(disk / "run"), "keep_checkpoints": 50, "save_every": 1}
        done = launch.run("train_lora.py", small | {"max_steps": 30})
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: the disk is full"), done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        saved = sorted((disk / "run" / "checkpoints").iterdir())
        assert saved
        for folder in saved:
            assert not folder.suffix, f"{folder} is half-written"
            assert not checkpoint_files._damage(folder)


# ------ the best model, and patience


@pytest.fixture
def scripted(monkeypatch):
    """Let validation have given losses and error rates, in turn."""

    def script(losses, rates):
        monkeypatch.setattr(validation, "validation_loss", lambda *given: next(losses))
        monkeypatch.setattr(
            validation, "word_error_rates", lambda *given: ({"wer_raw": next(rates)}, {})
        )
        monkeypatch.setattr(validation, "shown_texts", lambda *given: "")
        monkeypatch.setattr("training.run.rehearse", lambda *given: None)

    return script


def test_the_best_adapter_is_chosen_by_error_rate_where_it_is_computed_twice(options, scripted):
    scripted(iter([1.0, 2.0, 3.0]), iter([50.0, 40.0, 45.0]))
    train(options | {"eval_every": 2, "wer_every": 2})
    told = read_json(options, "train.json")
    assert (told["criterion"], told["best"]) == ("wer_raw", {"step": 4, "wer_raw": 40.0})
    made = read_json(options, "adapter_best/recipe.json")
    assert (made["step"], made["criterion"]) == (4, "wer_raw")


def test_an_error_rate_at_the_end_alone_chooses_nothing(options, scripted):
    scripted(iter([1.0, 2.0, 3.0]), iter([50.0]))
    train(options | {"eval_every": 2, "wer_every": 6})
    told = read_json(options, "train.json")
    assert (told["criterion"], told["best"]) == ("eval_loss", {"step": 2, "eval_loss": 1.0})


def test_a_best_model_by_loss_does_not_count_where_error_rates_decide(options, scripted):
    scripted(iter([1.0, 2.0, 3.0]), iter([50.0, 50.0]))
    train(options | {"eval_every": 2, "max_steps": 6, "max_minutes": 1e-9})
    train(options | {"eval_every": 2, "wer_every": 4})
    assert read_json(options, "train.json")["best"] == {"step": 4, "wer_raw": 50.0}


def test_patience_ends_a_run_and_the_same_command_does_not_continue_it(options, scripted):
    patient = options | {"eval_every": 1, "patience": 2, "save_every": 100}
    scripted(iter([3.0, 2.0, 2.5, 2.0, 1.0]), iter([50.0]))
    train(patient)
    told = read_json(patient, "train.json")
    assert (told["steps"], told["ended_by"]) == (4, "--patience 2")
    assert told["best"] == {"step": 2, "eval_loss": 2.0}
    assert read_json(patient, "adapter/recipe.json")["step"] == 4
    assert records(patient, "wer_raw") == {4: 50.0}, "a run ends with an error rate"
    metrics = read_json_lines(patient)
    scripted(iter([]), iter([]))
    train(patient)
    assert read_json(patient, "train.json")["steps"] == 4
    assert read_json_lines(patient) == metrics
    scripted(iter([1.0, 0.5]), iter([40.0]))
    train(patient | {"patience": 3})
    told = read_json(patient, "train.json")
    assert (told["steps"], told["ended_by"], told["best"]["step"]) == (6, "", 6)


@pytest.mark.slow
def test_patience_ends_both_of_two_processes_at_the_same_step(options):
    high = options | {"patience": 1, "eval_every": 1, "max_steps": 12, "learning_rate": 1.0}
    done = launch.run("train_lora.py", high, processes=2)
    assert done.returncode == 0, done.stderr
    figures = read_json(high, "train.json")
    assert figures["ended_by"] == "--patience 1" and figures["steps"] < 12, figures
    assert list(records(high, "eval_loss")) == list(range(1, figures["steps"] + 1))
    assert list(records(high, "wer_raw")) == [figures["steps"]]


def read_json_lines(options):
    return launch.Path(options["output_dir"], "metrics.jsonl").read_text(encoding="utf-8")


def test_evaluations_without_a_better_model_are_counted_across_a_resume(options, scripted):
    patient = options | {"eval_every": 1, "patience": 3, "save_every": 1}
    losses = [3.0, 4.0, 4.0]
    scripted(iter([*losses, None]), iter([]))
    with pytest.raises(TypeError):  # the fourth evaluation fails
        train(patient)
    scripted(iter([4.0]), iter([50.0]))
    train(patient)
    told = read_json(patient, "train.json")
    assert (told["steps"], told["ended_by"]) == (4, "--patience 3")
    assert read_json(patient, "adapter/recipe.json")["step"] == 4


def test_a_validation_error_rate_is_logged_with_its_interval(finished):
    (rate,), (low,), (high,) = (
        list(records(finished, key).values()) for key in ("wer_raw", "wer_raw_low", "wer_raw_high")
    )
    assert low <= rate <= high
    events = EventAccumulator(str(launch.Path(finished["output_dir"], "tensorboard")))
    events.Reload()
    assert [own.value for own in events.Scalars("wer_raw_low")] == [pytest.approx(low)]
