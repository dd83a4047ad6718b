"""export.py as a user runs it: every format, loaded again by its own engine in another process."""

import json
import re
import shutil
import subprocess
from dataclasses import replace

import launch
import pytest
import tiny
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, WhisperProcessor

import export
from common import cli, ct2, labels, whisper
from common.adapter import load_merged
from common.decoding import decode
from common.predictions import Prediction
from common.systems import load_system
from conversion import ggml, hf, merge, notes, report, scoring
from conversion.scoring import Decoded
from training import lora

pytest.importorskip("ctranslate2", reason="requirements-export.txt")
pytest.importorskip("pywhispercpp", reason="requirements-export.txt")
FOLDERS = ("hf", "ct2_float32", "ct2_int8", "ggml_f16")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random Whisper with a vocabulary of Whisper's size, whose texts end."""
    return tiny.make_full_vocabulary(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    source = tiny.make_corpus(folder / "source", clips={"train": 1, "test": 6})
    return tiny.prepare(source, model, folder / "prepared", validation_fraction=0.0)


def make_adapter(model, folder, std):
    """A random LoRA adapter, with the record that train_lora.py leaves beside it."""
    torch.manual_seed(1)
    base = whisper.load_base(str(model), dtype=torch.float32)
    probe = whisper.base_probe(base)
    own = lora.add_lora(base, rank=4, alpha=8, targets=["q_proj", "v_proj"], dropout=0.0)
    for name, parameter in own.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    own.save_pretrained(folder)
    window = {"context": "auto", "decode_margin": 32, "decode_floor": 0}
    record = {"base_probe": probe, "window": window, "config": {"model": str(model)}}
    (folder / "recipe.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    return make_adapter(model, tmp_path_factory.mktemp("adapter"), std=0.05)


@pytest.fixture(scope="module")
def options(model, adapter, data):
    return {"model": str(model), "adapter": str(adapter), "data_dir": str(data)}


def start_forked(words):
    """In place of `scoring.start`: the process is spared the imports."""
    return launch.start(words, stdout=subprocess.DEVNULL, stderr=None)


@pytest.fixture(scope="module")
def exported(options, tmp_path_factory):
    """The folder of all formats."""
    output = tmp_path_factory.mktemp("exports") / "all"
    config = export.Config(
        **options, output_dir=str(output), formats="hf,ct2,ggml", accept_worse=True
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "start", start_forked)
        export.main(config)
    return output


def read_json(file):
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def scores(exported):
    return read_json(exported / "export.json")["scores"]


# ------ formats


def test_the_folder_has_every_format_its_checksums_and_the_scores(exported):
    names = {path.name for path in exported.iterdir()}
    assert names == {*FOLDERS, "SHA256SUMS", "export.json"}
    done = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=exported, capture_output=True)
    assert done.returncode == 0, done.stdout
    listed = len((exported / "SHA256SUMS").read_text().splitlines())
    assert listed == sum(path.is_file() for path in exported.rglob("*")) - 2
    record = read_json(exported / "export.json")
    assert record["merge"]["clips"] == 6
    assert record["merge"]["difference"] <= merge.TOLERANCE
    assert record["merge"]["effect"] >= merge.EFFECT_FACTOR * merge.TOLERANCE
    assert set(record["megabytes"]) == {*FOLDERS, "ggml_f16_no_flash"}
    assert set(record["scores"]) == {"original", *record["megabytes"]}


@pytest.mark.parametrize("window", ["natural", "full"])
def test_float32_exports_write_the_texts_of_the_original(scores, window):
    assert scores["original"][window]["cer"] > 0
    for name in ("hf", "ct2_float32"):
        row = scores[name][window]
        assert row["identical_texts"] == row["clips"] == 6, name
        assert row["wer_difference"] == row["cer_difference"] == 0.0
        assert row["cpu_seconds"] > 0


@pytest.mark.parametrize("window", ["natural", "full"])
def test_whisper_cpp_reads_weights_and_tokens_as_they_are_meant(scores, window):
    """16 bits may change a token; a tensor in a wrong place would change every text.

    Its flash attention also attends to positions after the window, which changes random weights'
    texts.
    """
    assert scores["ggml_f16_no_flash"][window]["identical_texts"] >= 5
    assert scores["ggml_f16"][window]["clips"] == 6


def test_the_bytes_depend_on_the_inputs_alone(exported, options, tmp_path):
    config = export.Config(**options, formats="hf,ct2,ggml")
    tokenizer = labels.load_tokenizer(config.model)
    system = load_system(
        config.model, config.adapter, tokenizer, Accelerator(cpu=True), window_mode="auto",
        dtype=torch.float32,
    )  # fmt: skip
    export.write_exports(tmp_path, config, system)
    assert export.checksums(tmp_path) == (exported / "SHA256SUMS").read_text()
    for path in tmp_path.rglob("*.*"):
        content = path.read_bytes()
        names_a_folder = options["model"].encode() in content
        assert not names_a_folder or path.name == "recipe.json", path


def test_each_export_says_at_which_window_it_is_decoded(exported):
    for name in FOLDERS:
        text = (exported / name / "README.md").read_text(encoding="utf-8")
        assert "end 640 ms after the speech" in text
        assert re.search(r"pads? every clip to 30 seconds", text)
    padded = notes.text("hf", "m", "float32", 128, is_natural=False)
    assert "trained on windows of 30 seconds" in padded


def test_the_scripts_decode_an_export_at_the_window_of_its_adapter(exported, options):
    tokenizer = labels.load_tokenizer(str(exported / "hf"))
    assert labels.tokenizer_fingerprint(tokenizer) == labels.tokenizer_fingerprint(
        labels.load_tokenizer(options["model"])
    )
    system = load_system(
        str(exported / "hf"), "", tokenizer, Accelerator(cpu=True), window_mode="auto",
        dtype=torch.float32,
    )  # fmt: skip
    assert system.window_mode == "natural"
    assert (system.margin.margin, system.margin.floor) == (32, 0)
    assert (exported / "ct2_int8" / "recipe.json").is_file()


# ------ readers of the Hugging Face folder


def test_readers_of_old_files_get_the_same_tokenizer(exported):
    """vocab.json and merges.txt for the slow tokenizer, and what transformers 4 asks for."""
    folder = exported / "hf"
    new = Tokenizer.from_file(str(folder / "tokenizer.json"))
    old = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    old.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    old.decoder = decoders.ByteLevel()
    text = " पाणी and water"
    assert old.encode(text).ids == new.encode(text, add_special_tokens=False).ids
    added = read_json(folder / "added_tokens.json")
    vocabulary = read_json(folder / "vocab.json")
    assert sorted([*vocabulary.values(), *added.values()]) == list(range(51_865))
    assert added["<|mr|>"] == new.token_to_id("<|mr|>")
    config = read_json(folder / "tokenizer_config.json")
    assert "extra_special_tokens" not in config, "a list there stops transformers 4"
    assert config["added_tokens_decoder"][str(added["<|mr|>"])]["content"] == "<|mr|>"
    assert all(
        isinstance(pair, str) for pair in read_json(folder / "tokenizer.json")["model"]["merges"]
    )
    special = read_json(folder / "special_tokens_map.json")
    assert special["eos_token"] == "<|endoftext|>"
    assert "<|mr|>" in special["additional_special_tokens"]
    assert "<|0.00|>" not in special["additional_special_tokens"]


def test_merges_are_written_as_pairs_of_words(tmp_path):
    vocabulary = {token: index for index, token in enumerate([*tiny.BYTES, "ab", "abc"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("ab", "c")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(tiny.SPECIALS)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "WhisperTokenizer"}')
    hf.write_tokenizer(tmp_path / "out", labels.load_tokenizer(str(tmp_path)))
    assert (tmp_path / "out" / "merges.txt").read_text() == "#version: 0.2\na b\nab c\n"
    again = labels.load_tokenizer(str(tmp_path / "out"))
    assert again("abc", add_special_tokens=False).input_ids == [vocabulary["abc"]]


def test_the_generation_config_is_complete(exported):
    config = GenerationConfig.from_pretrained(exported / "hf")
    assert config.alignment_heads == [[1, 0], [1, 1]]
    assert len(config.lang_to_id) == 99 and set(config.task_to_id) == {"transcribe", "translate"}
    assert config.no_timestamps_token_id == 50_363
    assert config.suppress_tokens and config.begin_suppress_tokens
    assert config.is_multilingual
    own = read_json(exported / "ct2_int8" / "config.json")
    assert own["alignment_heads"] == config.alignment_heads
    assert own["lang_ids"] == sorted(config.lang_to_id.values())
    assert own["suppress_ids"] == config.suppress_tokens


def test_stock_transformers_loads_it_and_writes_the_same_text(exported):
    processor = WhisperProcessor.from_pretrained(exported / "hf")
    model = whisper.load_base(str(exported / "hf"), dtype=torch.float32).eval()
    [wave] = tiny.waves(1, 1500)
    inputs = processor(wave.numpy() / 32_768, sampling_rate=16_000, return_tensors="pt")
    tokens = model.generate(**inputs, language="mr", task="transcribe", max_new_tokens=60)
    own = {"windows": [1500], "languages": ["mr"], "task": "transcribe", "caps": [60]}
    [text] = decode(model, wave[None], **own)
    assert tokens[0].tolist()[: len(text.tokens)] == text.tokens and text.tokens


# ------ the merge


def no_process(task):
    raise AssertionError("a process was started")


def test_an_adapter_that_changes_nothing_is_refused(options, model, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "score_fresh", no_process)
    own = make_adapter(model, tmp_path / "own", std=0.0)
    config = export.Config(**options | {"adapter": str(own)}, output_dir=str(tmp_path / "out"))
    with pytest.raises(cli.UserError, match=r"--adapter .*: changes no logit .* more than 0 on 6"):
        export.main(config)
    assert {path.name for path in tmp_path.iterdir()} == {"own"}, "nothing half-written"


def test_weights_that_were_merged_in_16_bits_are_refused(options, tmp_path, monkeypatch):
    def load_rounded(*given, **named):
        system = load_system(*given, **named)
        system.model.bfloat16().float()
        return system

    monkeypatch.setattr(scoring, "score_fresh", no_process)
    monkeypatch.setattr(export, "load_system", load_rounded)
    config = export.Config(**options, output_dir=str(tmp_path / "out"))
    with pytest.raises(cli.UserError, match=r"merged into the base it changes logits by up to \d"):
        export.main(config)
    assert not list(tmp_path.iterdir()), "nothing half-written"


def test_a_quantized_base_is_refused(base):
    merge.check_unquantised(base, "m")
    base.quantization_method = "bitsandbytes"
    with pytest.raises(cli.UserError, match="--model m: its weights are quantized"):
        merge.check_unquantised(base, "m")


def test_logits_that_are_not_finite_are_refused():
    whole, broken = [torch.zeros(3, 5)], [torch.full((3, 5), torch.nan)]
    with pytest.raises(cli.UserError, match="changes logits by up to nan"):
        merge.compare("a", whole, whole, broken)


def test_a_full_fine_tune_is_exported_without_a_merge(options, tmp_path, monkeypatch):
    same = {mode: Decoded({}, 1.0) for mode in scoring.MODES}
    monkeypatch.setattr(scoring, "score_fresh", lambda task: same)
    monkeypatch.setattr(scoring, "decode_both", lambda transcribe, clips: same)
    monkeypatch.setattr(report, "score", lambda clips, decoded, original: {})
    config = export.Config(**options | {"adapter": ""}, output_dir=str(tmp_path / "out"))
    export.main(config)
    assert read_json(tmp_path / "out" / "export.json")["merge"] is None
    assert not (tmp_path / "out" / "hf" / "recipe.json").exists()
    with pytest.raises(cli.UserError, match=r"--output_dir .*: holds other files"):
        (tmp_path / "out" / "export.json").unlink()
        export.main(config)


# ------ the verdict


def figures(identical=10, wer=0.0, low=-1.0):
    difference = {"wer_difference": wer, "wer_difference_interval": [low, low + 2]}
    cer = {"cer_difference": 0.0, "cer_difference_interval": [0.0, 0.0]}
    return {"clips": 10, "identical_texts": identical} | difference | cer


@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        ("hf", figures(identical=9), "hf at the full window: 1 of 10 texts are not the original's"),
        ("ct2_float32", figures(identical=0), "ct2_float32 at the full window: 10 of 10 texts"),
        ("ct2_int8", figures(identical=0, wer=1.5, low=0.5), "WER is 1.50 points higher"),
        ("ct2_int8", figures(identical=0, wer=1.5, low=-0.1), ""),
        ("ct2_int8", figures(wer=-1.5, low=-2.5), ""),
        ("ggml_f16", figures(identical=0, wer=5.0, low=4.0), ""),
    ],
)
def test_what_is_worse_than_the_original(name, row, problem):
    problems = report.problems({name: {"full": row}})
    assert len(problems) == bool(problem)
    assert problem in "".join(problems)


def test_an_export_that_writes_other_texts_ends_with_exit_code_1_unless_it_is_accepted(
    options, data, tmp_path, monkeypatch, capsys
):
    clips = scoring.load_clips(str(data), "test", 2)
    texts = {row["id"]: Prediction(row["id"], "other words", hit_cap=False) for row in clips}
    other = {mode: Decoded(texts, 1.0) for mode in scoring.MODES}
    monkeypatch.setattr(scoring, "score_fresh", lambda task: other)
    config = export.Config(**options, output_dir=str(tmp_path / "out"), max_clips=2)
    with pytest.raises(SystemExit) as stop:
        export.main(config)
    assert stop.value.code == 1
    printed = capsys.readouterr()
    assert "worse: hf at the natural window: 2 of 2 texts are not the original's" in printed.err
    assert "| hf | " in printed.out and " | 0 / 2 | 1.0 |" in printed.out
    record = read_json(tmp_path / "out" / "export.json")
    assert len(record["worse"]) == 2
    assert record["scores"]["hf"]["full"]["wer_interval"]
    export.main(replace(config, accept_worse=True))  # and replaces an earlier export


def test_an_export_that_cannot_be_loaded_is_named(exported, data, tmp_path, monkeypatch):
    shutil.copytree(exported / "ct2_int8", tmp_path / "ct2_int8")
    (tmp_path / "ct2_int8" / "model.bin").write_bytes(b"damaged")
    monkeypatch.setattr(scoring, "start", start_forked)
    task = scoring.Task(str(data), "test", 1, "transcribe", 10.0, (32, 0), "ct2")
    with pytest.raises(cli.UserError, match=r"--formats ct2: ct2_int8 cannot be loaded"):
        scoring.score_fresh(replace(task, path=str(tmp_path / "ct2_int8")))


# ------ options


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"formats": "hf,onnx"}, r"--formats hf,onnx: 'onnx' is unknown: give some of hf,ct2,ggml"),
        ({"formats": "hf,hf"}, r"--formats hf,hf: names one twice"),
        ({"ct2_types": "int4"}, r"--ct2_types int4: 'int4' is unknown: give some of float32,int8"),
        ({"ggml_type": "f32"}, r"--ggml_type f32: whisper.cpp aborts when it loads such a file"),
        ({"ggml_type": "q5_0"}, r"--ggml_type q5_0: is not written: give f16, and quantize"),
        ({"adapter": "nowhere"}, r"--adapter nowhere: no such folder"),
        ({"max_clips": -1}, r"--max_clips -1"),
    ],
)
def test_impossible_options_are_refused(given, message):
    with pytest.raises(cli.UserError, match=message):
        export.check(export.Config(**given))


@pytest.mark.parametrize("form", ["ct2", "ggml"])
def test_a_missing_engine_is_named_with_its_requirements(monkeypatch, form):
    module = {"ct2": ct2, "ggml": ggml}[form]
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(cli.UserError, match=r"pip install -r requirements-export\.txt"):
        export.check_installed(["hf", form])


# ------ models that whisper.cpp cannot read


def test_models_that_whisper_cpp_reads_wrongly_are_refused(model, base, checkpoint, tmp_path):
    tokenizer = labels.load_tokenizer(str(model))
    own = whisper.load_base(str(model), dtype=torch.float32)
    ggml.check_model(own, tokenizer)
    with pytest.raises(cli.UserError, match="its vocabulary has 363 tokens"):
        ggml.check_model(base, labels.load_tokenizer(str(checkpoint)))
    with pytest.raises(cli.UserError, match="its special tokens have other ids"):
        ggml.check_model(own, labels.load_tokenizer(str(checkpoint)))
    adapted = lora.get_peft_model(own, lora.LoraConfig(r=2, target_modules=["proj_out"]))
    torch.nn.init.normal_(adapted.base_model.model.proj_out.lora_B["default"].weight)
    adapted.save_pretrained(tmp_path)
    merged = load_merged(whisper.load_base(str(model), dtype=torch.float32), str(tmp_path))
    with pytest.raises(cli.UserError, match="its output layer is not its token embedding"):
        ggml.check_model(merged, tokenizer)
    own.config.encoder_ffn_dim = 128
    with pytest.raises(
        cli.UserError, match=r"its feed-forward layers are \[128, 256\] wide, not 256"
    ):
        ggml.check_model(own, tokenizer)
