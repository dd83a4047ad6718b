"""The model: stock results at 30 seconds, short windows, LoRA, merging."""

import json
import shutil

import peft
import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import features
from transformers import WhisperForConditionalGeneration

from common import adapter as adapter_files
from common import cli, decoding, whisper
from training import lora


def logits(model, inputs):
    tokens = torch.tensor([[257, 300, 5, 9]]).expand(len(inputs), -1)
    with torch.no_grad():
        return model(input_features=inputs, decoder_input_ids=tokens).logits


def test_the_encoder_is_bit_identical_to_stock_at_the_full_window(base, checkpoint):
    stock = WhisperForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    inputs = features(2, 3000)
    assert torch.equal(logits(base, inputs), logits(stock, inputs))
    assert base.state_dict().keys() == stock.state_dict().keys()


def test_a_short_window_is_the_stock_encoder_with_a_shorter_position_table(base, checkpoint):
    stock = WhisperForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    encoder = stock.model.encoder
    encoder.config.max_source_positions = 300
    encoder.embed_positions = torch.nn.Embedding.from_pretrained(
        encoder.embed_positions.weight[:300]
    )
    inputs = features(2, 600)
    with torch.no_grad():
        expected = encoder(inputs).last_hidden_state
        got = whisper.run_encoder(base.model.encoder, inputs)
    assert got.shape == (2, 300, 64)
    assert torch.equal(got, expected)


def test_merging_for_a_while_gives_the_weights_back_bit_for_bit(adapted):
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    with adapter_files.merged(adapted):
        pass
    after = adapted.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_saved_adapter_gives_the_same_logits_in_plain_peft(adapted, checkpoint, tmp_path):
    adapted.save_pretrained(tmp_path)
    stock = WhisperForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    plain = PeftModel.from_pretrained(stock, tmp_path).eval()
    inputs = features(2, 3000)
    assert torch.equal(logits(plain, inputs), logits(adapted, inputs))


def test_only_lora_parameters_are_trainable(adapted):
    trainable = [name for name, one in adapted.named_parameters() if one.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)


@pytest.mark.parametrize(("scope", "encoder_layers"), [("decoder", []), ("top_1", [1])])
def test_a_scope_adapts_the_decoder_and_the_last_encoder_layers(base, scope, encoder_layers):
    model = lora.add_lora(
        base, rank=4, alpha=8, targets=["q_proj", "v_proj"], dropout=0.0, scope=scope
    )
    adapted = [name for name, one in model.named_parameters() if one.requires_grad]
    of_encoder = {int(name.split(".")[5]) for name in adapted if ".encoder." in name}
    assert sorted(of_encoder) == encoder_layers
    of_decoder = {name.split(".")[5] for name in adapted if ".decoder." in name}
    assert of_decoder == {"0", "1"}


def test_a_frozen_encoder_keeps_no_graph(base):
    model = lora.add_lora(base, rank=4, alpha=8, targets=["q_proj"], dropout=0.0, scope="decoder")
    assert not whisper.run_encoder(base.model.encoder, features(1)).requires_grad
    tokens = torch.tensor([[257, 300, 5, 9]])
    assert model(input_features=features(1, 3000), decoder_input_ids=tokens).logits.requires_grad


@pytest.mark.parametrize("half", [torch.bfloat16, None])
def test_under_autocast_an_adapter_reads_half_precision_without_a_copy(base, half):
    """PEFT would cast its input to float32, dropout copy that, and autocast cast it back."""
    model = lora.add_lora(base, rank=4, alpha=8, targets=lora.LORA_TARGETS, dropout=0.1)
    read, wanted = {}, half or torch.float32
    for name, module in model.named_modules():
        if name.endswith(("lora_A.default", "proj_out")):
            module.register_forward_pre_hook(
                lambda module, given, name=name: read.update({name: given[0].dtype})
            )
    with torch.autocast("cpu", dtype=half or torch.bfloat16, enabled=half is not None):
        lora.DropoutMasks(model).draw(torch.tensor([5]))
        tokens = torch.tensor([[257, 300, 5, 9]])
        model.train()(input_features=features(1, 3000), decoder_input_ids=tokens)
    head = {name: dtype for name, dtype in read.items() if name.endswith("proj_out")}
    adapted = {name: dtype for name, dtype in read.items() if name not in head}
    assert len(adapted) > 20 and set(adapted.values()) == {wanted}
    assert set(head.values()) == {torch.float32}, "the loss is computed in float32"


def drawn(p, widths, seeds):
    """The dropouts of adapters of these widths, with their masks for clips of these seeds."""
    dropouts = [lora.FeatureDropout(p, width) for width in widths]
    lora.DropoutMasks(torch.nn.ModuleList(dropouts)).draw(torch.tensor(seeds))
    return dropouts


def test_feature_dropout_drops_whole_features_of_a_clip_and_keeps_the_mean():
    (dropout,) = drawn(0.25, [64], [17 * clip for clip in range(200)])
    dropped = dropout(torch.ones(200, 7, 64))
    assert (dropped == dropped[:, :1]).all()
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)
    assert dropped.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    plain = torch.ones(2, 3, 4)
    assert dropout.eval()(plain) is plain


def test_a_clips_dropout_is_its_own_in_any_batch_and_differs_between_clips_and_modules():
    seeds, ones = [5, 6, 2**32 - 1], torch.ones(3, 2, 1000)
    masks, others = (dropout(ones) for dropout in drawn(0.5, [1000, 1000], seeds))
    (alone, _) = drawn(0.5, [1000, 1000], seeds[2:])
    assert torch.equal(alone(ones[:1]), masks[2:])
    pairs = [(masks[0], masks[1]), (masks[1], masks[2]), (masks[0], others[0])]
    for one, other in pairs:
        assert 0.4 < (one == other).float().mean() < 0.6


def test_masks_drawn_together_are_those_drawn_one_by_one(monkeypatch):
    """However many adapters are drawn at once, and whatever their widths."""

    def mask(number, width, seeds):  # Mulligan's hash, adapter by adapter in plain integers
        def scatter(x):
            for _ in range(2):
                x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
            return (x >> 16) ^ x

        rows = [scatter(seed + number * lora.FEATURE_ROOM) for seed in seeds]
        kept = [[scatter(row + at) >= 0.05 * 2**32 for at in range(width)] for row in rows]
        return torch.tensor(kept) / 0.95

    widths, seeds = [8, 32, 8, 8, 32], [3, 2**32 - 1]
    for at_once in (1, 40, 2**23):
        monkeypatch.setattr(lora, "MASKED_AT_ONCE", at_once)
        for number, dropout in enumerate(drawn(0.05, widths, seeds)):
            assert torch.equal(dropout.mask[:, 0], mask(number, widths[number], seeds))


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_a_quantised_base_trains_its_adapter_in_float32(checkpoint, quantize):
    base = whisper.load_base(str(checkpoint), dtype=torch.float32, quantize=quantize)
    model = lora.add_lora(base, rank=4, alpha=8, targets=["q_proj"], dropout=0.0)
    kinds = {type(m).__name__ for m in base.modules() if "Linear" in type(m).__name__}
    assert any(kind in kinds for kind in ("Linear8bitLt", "Linear4bit")), kinds

    tokens = torch.tensor([[257, 300, 5, 9]]).expand(2, -1)
    model(
        input_features=features(2, 3000), decoder_input_ids=tokens
    ).logits.float().sum().backward()
    grads = [one.grad for name, one in model.named_parameters() if "lora_B" in name]
    assert all(grad.dtype == torch.float32 and grad.abs().sum() > 0 for grad in grads)
    decoding.decode(
        base.eval(), tiny.waves(1), windows=[300], languages=["mr"], task="transcribe", caps=[3]
    )


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_quantised_layers_compute_in_the_dtype_of_autocast(checkpoint, quantize):
    """They keep and multiply what they are given; autocast's LayerNorm would give float32."""
    base = whisper.load_base(str(checkpoint), dtype=torch.float32, quantize=quantize)
    model = lora.add_lora(base, rank=4, alpha=8, targets=["q_proj"], dropout=0.0)
    given = {}

    def note(name):
        return lambda module, inputs, out: given.update({name: (inputs[0].dtype, out.dtype)})

    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear8bitLt", "Linear4bit") and not hasattr(module, "r"):
            module.register_forward_hook(note(name))
    tokens = torch.tensor([[257, 300, 5, 9]])
    with torch.autocast("cpu", torch.bfloat16):
        model(input_features=features(1, 3000), decoder_input_ids=tokens)
    assert len(given) == 2 * 6 + 2 * 10
    assert set(given.values()) == {(torch.bfloat16, torch.bfloat16)}
    model(input_features=features(1, 3000), decoder_input_ids=tokens)
    assert set(given.values()) == {(torch.float32, torch.float32)}, "as is without autocast"


def test_a_model_that_is_not_there_is_a_user_error_naming_the_option(tmp_path):
    with pytest.raises(cli.UserError, match=r"--model nobody/nothing: .*spelling"):
        whisper.load_base("nobody/nothing", dtype=torch.float32)
    with pytest.raises(cli.UserError, match=r"no config\.json"):
        whisper.load_base(str(tmp_path), dtype=torch.float32)


def test_an_adapter_that_does_not_fit_is_a_user_error(adapted, tmp_path, tmp_path_factory):
    adapted.save_pretrained(tmp_path / "adapter")
    wider = tiny.make_checkpoint(tmp_path_factory.mktemp("wider"), width=96)
    base = whisper.load_base(str(wider), dtype=torch.float32)
    with pytest.raises(cli.UserError, match=r"--adapter .* does not fit --model"):
        adapter_files.load_adapter(base, str(tmp_path / "adapter"))
    with pytest.raises(cli.UserError, match="no LoRA adapter there"):
        adapter_files.load_adapter(base, str(tmp_path))


WEIGHTS = {  # what was done to a checkpoint's 89 tensors: missing, foreign, of other shapes
    "compiled": (lambda w: {f"_orig_mod.{name}": one for name, one in w.items()}, 89, 89, 0),
    "DDP": (lambda w: {f"module.{name}": one for name, one in w.items()}, 89, 89, 0),
    "half": (lambda w: {name: one for name, one in w.items() if ".encoder." in name}, 53, 0, 0),
    "deeper": (lambda w: w | {"model.decoder.layers.7.fc1.bias": torch.ones(128)}, 0, 1, 0),
    "longer": (lambda w: w | {"model.decoder.embed_tokens.weight": torch.ones(366, 64)}, 0, 0, 1),
}


@pytest.mark.parametrize(("change", "missing", "foreign", "misfits"), WEIGHTS.values(), ids=WEIGHTS)
def test_a_checkpoint_whose_tensors_are_not_those_of_its_config_is_refused(
    checkpoint, tmp_path, change, missing, foreign, misfits
):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    tensors = change(load_file(copy / "model.safetensors"))
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    counts = (
        f"{missing} tensors that its config.json asks for are missing, {foreign} do not belong "
        f"to it and {misfits} have other shapes"
    )
    with pytest.raises(cli.UserError, match=counts):
        whisper.load_base(str(copy), dtype=torch.float32)


def test_sinusoids_that_a_checkpoint_leaves_out_are_computed(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.encoder.embed_positions.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    model = whisper.load_base(str(copy), dtype=torch.float32).eval()
    whole = whisper.load_base(str(checkpoint), dtype=torch.float32).eval()
    inputs = features(2, 3000)
    assert torch.equal(logits(model, inputs), logits(whole, inputs))


def test_a_checkpoint_of_flags_that_are_not_used_is_saved_without_them(base, tmp_path):
    flags = {"temperature": [0.0, 0.2], "top_p": 0.9, "length_penalty": 2.0, "early_stopping": True}
    base.generation_config.update(**flags)
    with pytest.raises(ValueError, match="temperature"):
        base.save_pretrained(tmp_path)
    whisper.drop_unused_flags(base)
    base.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert not flags.keys() & saved.keys() and saved["max_length"] == 448
    base.generation_config.update(do_sample=True, temperature=0.5)
    whisper.drop_unused_flags(base)
    assert base.generation_config.temperature == 0.5


def test_an_adapter_whose_alpha_is_zero_changes_nothing(adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    assert not adapter_files.changes_nothing(str(tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 0}))
    assert adapter_files.changes_nothing(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", {"decoder_start_token_id": None}),
        ("config.json", "{"),
        ("generation_config.json", "{"),
    ],
)
def test_a_damaged_configuration_is_a_user_error(checkpoint, tmp_path, name, content):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    if isinstance(content, dict):
        content = json.dumps(json.loads((copy / name).read_text()) | content)
    (copy / name).write_text(content)
    with pytest.raises(cli.UserError, match=r"its configuration cannot be used \(") as error:
        whisper.load_base(str(copy), dtype=torch.float32)
    assert "\n" not in str(error.value)


QUERIES = ["q_proj", "v_proj"]
BASE = "base_model.model."
RENAMED = {  # what was done to the names of an adapter's 24 tensors: counts of foreign and missing
    "compiled": (lambda name: name.replace(BASE, f"{BASE}_orig_mod."), 24, 24),
    "DDP": (lambda name: name.replace(BASE, f"{BASE}module."), 24, 24),
    "no prefix": (lambda name: name.removeprefix(BASE), 24, 24),
    "WhisperModel": (lambda name: name.replace(f"{BASE}model.", BASE), 24, 24),
    "half": (lambda name: name if ".decoder." in name else "", 0, 8),
    "only A": (lambda name: name if "lora_A" in name else "", 0, 12),
    "empty": (lambda _name: "", 0, 24),
    "deeper": (lambda name: name.replace("layers.1.", "layers.7."), 12, 12),
}


def stock(checkpoint):
    return WhisperForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()


def save_adapter(folder, model, config):
    """Save an adapter with random weights by PEFT alone; the logits that it has there."""
    adapted = get_peft_model(model, config)
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return logits(adapted.eval(), features(2, 3000))


def lora_config(targets=QUERIES, **options):
    return LoraConfig(r=4, lora_alpha=8, target_modules=[*targets], **options)


def refusal(checkpoint, folder):
    base = whisper.load_base(str(checkpoint), dtype=torch.float32)
    with pytest.raises(cli.UserError) as error:
        adapter_files.load_merged(base, str(folder))
    assert str(error.value).startswith(f"--adapter {folder}: ")
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"--adapter {folder}: ")


@pytest.mark.parametrize(("rename", "foreign", "missing"), RENAMED.values(), ids=RENAMED)
def test_an_adapter_whose_tensors_are_not_the_models_is_refused_with_their_number(
    checkpoint, tmp_path, rename, foreign, missing
):
    save_adapter(tmp_path, stock(checkpoint), lora_config())
    file = tmp_path / "adapter_model.safetensors"
    tensors = {rename(name): one for name, one in load_file(file).items()}
    tensors.pop("", None)
    save_file(tensors, file)
    told = refusal(checkpoint, tmp_path)
    assert f"{foreign} of its {len(tensors)} tensors do not belong to --model" in told
    assert f"and {missing} that it should have are missing" in told


def test_an_adapter_of_a_deeper_model_is_refused(checkpoint, tmp_path):
    deeper = tiny.make_checkpoint(tmp_path / "deeper", layers=3)
    save_adapter(tmp_path / "adapter", stock(deeper), lora_config())
    told = refusal(checkpoint, tmp_path / "adapter")
    assert "12 of its 36 tensors do not belong to --model" in told


KINDS = {
    "LoRA": lora_config(),
    "DoRA": lora_config(use_dora=True),
    "on the output layer": lora_config([*QUERIES, "proj_out"]),
    "on the token embedding": lora_config([*QUERIES, "embed_tokens"]),
    "on both": lora_config([*QUERIES, "embed_tokens", "proj_out"]),
    "on both, kept tied": lora_config(
        [*QUERIES, "embed_tokens", "proj_out"], ensure_weight_tying=True
    ),
    "a trained output layer": lora_config(modules_to_save=["proj_out"]),
    "trained biases": lora_config(bias="all"),
    "trained tokens": lora_config(trainable_token_indices={"embed_tokens": [3, 5, 9]}),
    "IA3": peft.IA3Config(target_modules=[*QUERIES, "fc2"], feedforward_modules=["fc2"]),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_a_merged_adapter_has_the_logits_that_plain_peft_has_unmerged(checkpoint, tmp_path, config):
    expected = save_adapter(tmp_path, stock(checkpoint), config)
    base = whisper.load_base(str(checkpoint), dtype=torch.float32)
    before = logits(base.eval(), features(2, 3000))
    got = logits(adapter_files.load_merged(base, str(tmp_path)).eval(), features(2, 3000))
    assert (got - expected).abs().max() < 1e-3
    assert (got - before).abs().max() > 1


def test_an_adapter_that_is_not_in_the_weights_is_refused_by_its_kind(checkpoint, tmp_path):
    prefix = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4)
    get_peft_model(stock(checkpoint), prefix).save_pretrained(tmp_path / "prefix")
    assert "is of the kind PREFIX_TUNING" in refusal(checkpoint, tmp_path / "prefix")
    save_adapter(tmp_path / "a", stock(checkpoint), lora_config(alora_invocation_tokens=[3, 4]))
    assert "cannot be added into the weights" in refusal(checkpoint, tmp_path / "a")


def test_the_reason_why_an_adapter_does_not_fit_is_told(checkpoint, tmp_path):
    longer = stock(checkpoint)
    longer.resize_token_embeddings(longer.config.vocab_size + 3, mean_resizing=False)
    save_adapter(tmp_path / "longer", longer, lora_config())
    told = refusal(checkpoint, tmp_path / "longer")
    assert "decoder.embed_tokens.weight: 366 x 64 there, 363 x 64 here" in told
    assert "its run changed the vocabulary" in told

    wider = tiny.make_checkpoint(tmp_path / "wider", width=96)
    save_adapter(tmp_path / "wide", stock(wider), lora_config())
    told = refusal(checkpoint, tmp_path / "wide")
    assert "24 of its tensors have other shapes" in told
    assert f"give what it was trained on, {wider}" in told

    save_adapter(tmp_path / "norm", stock(checkpoint), lora_config(modules_to_save=["layer_norm"]))
    file = tmp_path / "norm" / "adapter_model.safetensors"
    save_file({name: one for name, one in load_file(file).items() if "lora" in name}, file)
    assert "its file lacks base_model.model.model." in refusal(checkpoint, tmp_path / "norm")


def test_an_adapters_file_that_is_damaged_or_not_finite_is_refused(checkpoint, tmp_path):
    save_adapter(tmp_path / "whole", stock(checkpoint), lora_config())
    whole = (tmp_path / "whole" / "adapter_model.safetensors").read_bytes()
    for content in (whole[:3000], b"version https://git-lfs.github.com/spec/v1\n"):
        copy = shutil.copytree(tmp_path / "whole", tmp_path / "copy", dirs_exist_ok=True)
        (copy / "adapter_model.safetensors").write_bytes(content)
        assert "its adapter_model.safetensors is damaged" in refusal(checkpoint, copy)
    tensors = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    tensors[next(iter(tensors))][0, 0] = float("nan")
    save_file(tensors, copy / "adapter_model.safetensors")
    assert "1 of its 24 tensors hold values that are not finite" in refusal(checkpoint, copy)
    for content in ({}, {"peft_type": "LATER"}):
        (copy / "adapter_config.json").write_text(json.dumps(content))
        assert "no LoRA adapter there" in refusal(checkpoint, copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_base_with_weights_that_are_not_finite_is_refused(checkpoint, tmp_path, value):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    weights["model.decoder.layers.1.fc1.weight"][3, 5] = value
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(cli.UserError, match=r"--model .* 1 of its \d+ tensors .* not finite"):
            whisper.load_base(str(copy), dtype=dtype)


@pytest.mark.parametrize("side", ["A", "B"])
def test_an_adapter_whose_products_are_zero_changes_nothing(checkpoint, tmp_path, side):
    save_adapter(tmp_path, stock(checkpoint), lora_config())
    assert not adapter_files.changes_nothing(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    tensors = {
        name: torch.zeros_like(tensor) if f"lora_{side}" in name else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file)
    assert adapter_files.changes_nothing(str(tmp_path))
    save_file(tensors | {"base_model.model.other": torch.ones(1)}, file)
    assert not adapter_files.changes_nothing(str(tmp_path)), "something else is adapted"


def test_probes_tell_bases_apart_but_not_precisions(base, tmp_path_factory):

    probe = whisper.base_probe(base)
    assert whisper.same_base(probe, whisper.base_probe(base.to(torch.bfloat16)))
    assert not whisper.same_base(probe, [value + 0.3 for value in probe])
