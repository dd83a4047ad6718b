"""The benchmarks: formulas against counted operations, and a whole run on a tiny corpus."""

import csv
import json
import re

import launch
import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import WhisperConfig

from benchmarks import flops, process, versus_recipe
from common import cli, whisper


def common_voice(folder, clips=(16, 4, 4)):
    """A manifest of tones turned into a Common Voice folder."""
    splits = dict(zip(("train", "validation", "test"), clips, strict=True))
    manifest = tiny.make_corpus(folder / "clips", clips=splits)
    with manifest.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for split, name in (("train", "train"), ("validation", "dev"), ("test", "test")):
        lines = ["client_id\tpath\tsentence\tup_votes\tdown_votes\tlocale"]
        lines += [
            f"{row['speaker']}\t{row['path']}\t{row['text']}\t2\t0\tmr"
            for row in rows
            if row["split"] == split
        ]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("positions", [200, 1500])
def test_the_formula_counts_what_torch_counts(checkpoint, positions):
    model, tokens = whisper.load_base(str(checkpoint), dtype=torch.float32).eval(), 40
    work = flops.forward(model.config, positions, tokens)
    counted = {}
    for attention in ("sdpa", "eager"):  # torch counts only the eager one's products on a CPU
        model.set_attn_implementation(attention)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(
                input_features=torch.randn(1, 80, 2 * positions),
                decoder_input_ids=torch.zeros(1, tokens, dtype=torch.long),
                use_cache=False,
            )
        counted[attention] = counter.get_total_flops()
    assert counted == {"sdpa": work.linear, "eager": work.linear + work.attention}


def test_large_costs_what_the_literature_of_the_formula_says():
    large = WhisperConfig(
        d_model=1280, encoder_layers=32, decoder_layers=32, encoder_ffn_dim=5120,
        decoder_ffn_dim=5120, vocab_size=51_865,
    )  # fmt: skip
    work = flops.forward(large, 1500, 64)
    assert (work.linear + work.attention) / 1e9 == pytest.approx(2706, rel=0.02)


def test_a_failed_command_says_its_last_lines(tmp_path):
    with pytest.raises(RuntimeError, match="boom"):
        process.run(["-c", "raise SystemExit('boom')"], tmp_path / "log")


def test_memory_is_that_of_the_whole_tree(tmp_path):
    held = "x = bytearray(300_000_000); import time; time.sleep(1.5)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {held!r}])"
    cost = process.run(["-c", child], tmp_path / "log")
    assert cost.peak_memory_gib > 0.27, cost
    assert cost.seconds > 1.5


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md"])
def test_the_command_that_a_readme_shows_parses(page):
    text = (launch.ROOT / page).read_text(encoding="utf-8")
    shown = re.findall(r"^python -m benchmarks\.versus_recipe (.*)$", text, flags=re.M)
    assert shown
    for options in shown:
        cli.parse(versus_recipe.Config, options.split())


@pytest.mark.slow
def test_both_sides_run_and_every_figure_is_written(checkpoint, tmp_path):
    source, output = common_voice(tmp_path / "source"), tmp_path / "versus"
    options = {"data_dir": str(source), "model": str(checkpoint), "output_dir": str(output)}
    config = versus_recipe.Config(
        **options, language="mr", repeats=1, max_steps=2, precision="fp32"
    )
    versus_recipe.main(config)
    found = json.loads((output / "versus_recipe.json").read_text(encoding="utf-8"))
    for side in versus_recipe.SIDES:
        run = found["runs"][side][0]
        assert run["train"]["clips"] == 16, side
        assert run["evaluate"]["clips"] == 4, side
        for stage in ("prepare", "train", "evaluate"):
            assert run[stage]["peak_memory_gib"] > 0.1, (side, stage)
    assert found["runs"]["recipe"][0]["prepare"]["clips"] == 20, "training and test clips"
    assert found["summary"]["disk"]["ratio"] > 5
    assert found["work"]["ours"]["bucket_padding_share"] < 0.5
    with pytest.raises(cli.UserError, match=r"--output_dir .* exists"):
        versus_recipe.main(config)
