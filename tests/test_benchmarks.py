"""The benchmarks: formulas against counted operations, and a whole run on a tiny corpus."""

import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import launch
import numpy as np
import pytest
import soundfile
import tiny
import torch
import warm
from torch.utils.flop_counter import FlopCounterMode
from transformers import WhisperConfig

from benchmarks import (
    engines,
    flops,
    kill_resume,
    long_recordings,
    process,
    scaling,
    simulated_memory,
    transcription,
    versus_recipe,
    versus_tables,
    word_times,
)
from common import audio, cli, whisper
from common.prepared import column, label_lengths, load_prepared

BENCHMARKS = {
    "versus_recipe": versus_recipe,
    "scaling": scaling,
    "engines": engines,
    "kill_resume": kill_resume,
    "simulated_memory": simulated_memory,
    "transcription": transcription,
    "long_recordings": long_recordings,
    "word_times": word_times,
}


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


@pytest.fixture
def forked(monkeypatch):
    """The benchmarks' commands without their imports."""
    if not torch.cuda.is_available():
        for module in (process, engines):
            begin = SimpleNamespace(**vars(subprocess) | {"Popen": warm.start})
            monkeypatch.setattr(module, "subprocess", begin)


@pytest.mark.parametrize("positions", [200, 1500])
def test_the_formula_counts_what_torch_counts(checkpoint, positions):
    model, tokens = whisper.load_base(str(checkpoint), dtype=torch.float32).eval(), 40
    work = flops.forward(model.config, positions, tokens)
    counted = {}
    for attention in ("sdpa", "eager"):  # torch counts only the eager one's products on a CPU
        model.set_attn_implementation(attention)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            states = whisper.run_encoder(model.model.encoder, torch.randn(1, 80, 2 * positions))
            model(
                encoder_outputs=(states,),
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


def test_every_benchmark_has_its_command_on_the_page_of_results():
    """That it parses is tested with all commands of the pages."""
    text = (launch.ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    shown = re.findall(r"^python -m benchmarks\.(\w+) ", text, flags=re.M)
    assert set(shown) == set(BENCHMARKS)


@pytest.mark.slow
def test_both_sides_run_and_every_figure_is_written(checkpoint, tmp_path, forked, monkeypatch):
    monkeypatch.setattr(flops, "GEMM_SIZE", 128)  # a CPU without bf16 takes half a minute for 2048
    source, output = common_voice(tmp_path / "source"), tmp_path / "versus"
    options = {"data_dir": str(source), "model": str(checkpoint), "output_dir": str(output)}
    config = versus_recipe.Config(
        **options, language="mr", repeats=1, max_steps=2, precision="fp32", quality_clips="4"
    )
    versus_recipe.main(config)
    found = json.loads((output / "versus_recipe.json").read_text(encoding="utf-8"))
    for side in versus_tables.SIDES:
        run = found["runs"][side][0]
        assert run["train"]["clips"] == 16, side
        assert run["evaluate"]["clips"] == 4, side
        for stage in ("prepare", "train", "evaluate"):
            assert run[stage]["peak_memory_gib"] > 0.1, (side, stage)
    ours = found["runs"]["ours"][0]
    assert ours["cached_train"]["cache_bytes"] > 0
    assert ours["cached_train"]["encoder_cache_seconds"] > 0
    assert 0 < ours["train"]["first_step_seconds"] < ours["train"]["command_seconds"]
    assert found["runs"]["recipe"][0]["prepare"]["clips"] == 20, "training and test clips"
    assert found["summary"]["disk"]["ratio"] > 5
    assert found["work"]["ours"]["bucket_padding_share"] < 0.5
    (quality,) = found["time_to_quality"]
    assert [run["clips"] for run in quality["ours"]] == [4]
    assert all(run["seconds"] > 0 for run in (quality["recipe"], *quality["ours"]))
    assert (output / "time_to_quality.png").stat().st_size > 1000
    with pytest.raises(cli.UserError, match=r"--output_dir .* exists"):
        versus_recipe.main(config)


def test_time_to_quality_is_that_of_the_fewest_clips_that_are_as_good(tmp_path, monkeypatch):
    rates = {40: (50.0, 41.0), 80: (39.0, 40.0), 120: (30.0, 30.0)}  # at both windows, by clips

    def train(model, run, data, precision, options):
        clips = 2 * options[options.index("--max_steps") + 1]
        natural, full = ({"scores": {"wer": rate}} for rate in rates[clips])
        return {
            "train": {"clips": clips, "steps": clips // 2, "seconds": clips / 2},
            "evaluate": natural,
            "evaluate_full": full,
        }

    monkeypatch.setattr(versus_recipe, "our_training", train)
    config = versus_recipe.Config("data", "model", quality_clips="120,40,80")
    recipe = {"train": {"seconds": 400.0}, "evaluate": {"scores": {"wer": 40.0}}}
    found = versus_recipe.time_to_quality(config, tmp_path / "work", tmp_path, "fp32", 1, recipe)
    assert [run["clips"] for run in found["ours"]] == [40, 80, 120], "the whole curve"
    assert (found["seconds"], found["ratio"]) == (40.0, 10.0)
    config = replace(config, quality_clips="40")
    found = versus_recipe.time_to_quality(config, tmp_path / "next", tmp_path, "fp32", 1, recipe)
    assert (found["seconds"], found["ratio"]) == (None, None)


def test_as_good_means_at_both_windows_and_no_ratio_is_given_otherwise():
    def ours(clips: int, *rates: float) -> dict[str, Any]:
        natural, full = ({"wer": rate, "cer": 1.0} for rate in rates)
        return {"clips": clips, "seconds": 2.5 * clips, "natural": natural, "full": full}

    recipe = {"clips": 8, "seconds": 100.0, "scores": {"wer": 50.0, "cer": 1.0}}
    runs = [ours(2, 40.0, 50.1), ours(4, 49.0, 50.0)]
    assert [versus_tables.is_as_good(run, recipe) for run in runs] == [False, True]
    seeds = [
        {"seed": 1, "recipe": recipe, "ours": runs, "ratio": 10.0},
        {"seed": 2, "recipe": recipe, "ours": [ours(2, 43.0, 48.0)], "ratio": 20.0},
        {"seed": 3, "recipe": recipe, "ours": [ours(2, 40.0, 50.4)], "ratio": None},
    ]
    lines = versus_tables.quality_table(seeds).splitlines()
    assert [line.split(" | ")[-1] for line in lines[2:11]] == [
        "|", "not as good |", "10.0 |", "|", "20.0 |", "|", "not as good |", "|", "20.0 |"
    ]  # fmt: skip
    assert lines[10] == "| mean | ours | 2 | 5 | 41.0 / 1.0 | 49.5 / 1.0 | 20.0 |"
    assert lines[-1].startswith("2 of 3 seeds"), lines[-1]


def test_only_clips_of_the_length_asked_for_are_taken(tmp_path):
    source = common_voice(tmp_path / "source")
    lengths = {file.name: soundfile.info(file).duration for file in source.glob("clips/*.wav")}
    most = sorted(lengths.values())[len(lengths) // 2]
    folder = versus_recipe.shorter_clips(source, most, tmp_path / "short")
    kept = {file.name for file in folder.glob("clips/*")}
    assert kept == {name for name, seconds in lengths.items() if seconds <= most}
    rows = [(folder / f"{name}.tsv").read_text().splitlines() for name in ("train", "dev", "test")]
    assert sum(map(len, rows)) == len(kept) + 3, "a heading each"


def test_clips_of_a_length_have_that_length_and_labels_at_the_corpus_rate(prepared):
    split = load_prepared(str(prepared))[0]["train"]
    first = split[0]["labels"]
    shortest = len(scaling.common_prefix(list(split["labels"]))) + 2
    for seconds in (0.5, 7.0):
        for row in scaling.clips_of_length(split, seconds, 3):
            assert len(audio.decode_flac(row["audio"])) == seconds * 16_000
            assert row["labels"][:4] == first[:4] and row["labels"][-1] == first[-1]
            rate = label_lengths(split).sum() / column(split, "seconds").sum()
            assert len(row["labels"]) == pytest.approx(max(seconds * rate, shortest), abs=1)


@pytest.mark.slow
def test_every_axis_is_measured_and_plotted(checkpoint, prepared, tmp_path, forked):
    output = tmp_path / "scaling"
    config = scaling.Config(
        data_dir=str(prepared), model=str(checkpoint), output_dir=str(output), steps=2,
        factors="1,2", prepare_factors="2", lengths="1", batch_seconds="30", processes="2",
        num_workers=1,
    )  # fmt: skip
    scaling.main(config)
    found = json.loads((output / "scaling.json").read_text(encoding="utf-8"))["points"]
    assert {point["axis"] for point in found} == set(scaling.AXES)
    clips = {(point["axis"], point["value"]): point["clips"] for point in found}
    assert clips["corpus, training", "1"] == 21
    assert clips["corpus, training", "2"] == clips["corpus, preparation", "2"] == 42
    for point in found:
        assert point["clips_per_second"] > 0 and point["peak_memory_gib"] > 0.1, point
    assert (output / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert not (output / "work").exists()


def test_rows_of_a_manifest_are_judged_by_the_clips_that_they_overlap(tmp_path):
    clips = [
        long_recordings.Clip("00", start, start + 4.0, text)
        for start, text in ((0.5, "a b"), (6.0, "c d e"), (12.0, "f"), (18.0, "g h"))
    ]
    rows = [  # whole; a word of another clip, and one lacks; half of one; none of the last
        {"start": 0.3, "end": 4.6, "text": "a b", "match": 1.0, "speaker": "00"},
        {"start": 5.9, "end": 10.0, "text": "c d f", "match": 0.7, "speaker": "00"},
        {"start": 12.0, "end": 14.0, "text": "f", "match": 0.9, "speaker": "00"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    figures = long_recordings.judge(file, clips, clips)
    assert (figures["clips"], figures["words"], figures["foreign_words"]) == (1, 6, 1)
    assert figures["lacking_words"] == 1 and figures["lowest_match"] == 0.7
    assert figures["seconds"] == pytest.approx(4 + 4 + 2)
    assert figures["most_cut_off"] == pytest.approx(2.0)


@pytest.mark.slow
def test_long_recordings_are_scored_beside_their_clips(checkpoint, prepared, tmp_path, forked):
    """Tones hold no speech, so nothing is recovered, and nothing is made up."""
    pytest.importorskip("silero_vad", reason="requirements-export.txt")
    config = long_recordings.Config(
        str(prepared), str(checkpoint), minutes=0.2, changed=2, output_dir=str(tmp_path / "long")
    )
    long_recordings.main(config)
    figures = json.loads((tmp_path / "long" / "long_recordings.json").read_text(encoding="utf-8"))
    assert figures["recordings"] >= 2
    assert figures["wer"]["long recordings"]["raw"]["wer"] == 100.0
    assert figures["align"]["of all clips"]["known_clips"] == 7
    assert figures["align"]["changed"]["known_clips"] == 5
    assert {own["rows"] for own in figures["align"].values()} == {0}
    texts = [
        "".join(file.read_text() for file in sorted((tmp_path / "long" / name).glob("*.txt")))
        for name in ("texts", "changed_texts")
    ]
    lines = [text.splitlines() for text in texts]
    assert len(lines[0]) == len(lines[1]) == 7


@pytest.mark.slow
def test_kills_are_counted_and_runs_compared(tmp_path):
    """In a process of its own, because it forks."""
    words = ["-m", "benchmarks.kill_resume", "--kills", "3", "--kills_per_run", "2"]
    words += ["--max_steps", "12", "--output_dir", str(tmp_path / "killed")]
    done = launch.finish([sys.executable, *words])
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "killed" / "kill_resume.json").read_text(encoding="utf-8"))
    assert found["kills"] >= 3
    assert (found["lost"], found["changed"]) == (0, 0)


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """What export.py writes, of a random Whisper whose texts end."""
    converters = pytest.importorskip("ctranslate2.converters", reason="requirements-export.txt")
    pytest.importorskip("silero_vad", reason="requirements-export.txt")
    folder = tmp_path_factory.mktemp("exported")
    shutil.copytree(checkpoint, folder / "hf")
    model = whisper.load_base(str(checkpoint), dtype=torch.float32)
    tiny.end_texts(model, tiny.END, 2.0)
    model.save_pretrained(folder / "hf")
    output = folder / "ct2_float32"
    converters.TransformersConverter(str(folder / "hf")).convert(str(output))
    vocabulary = json.loads((output / "vocabulary.json").read_text())
    vocabulary[0] = ""  # Whisper's multilingual vocabularies are known by this token
    (output / "vocabulary.json").write_text(json.dumps(vocabulary))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / file, output)
    return folder


@pytest.mark.slow
def test_transcripts_of_each_engine_are_measured_and_scored(exported, prepared, tmp_path, forked):
    engines = ["ours_torch", "ours_ct2"]
    if importlib.util.find_spec("faster_whisper"):
        engines.append("fw_batched_greedy")
    output = tmp_path / "transcription"
    config = transcription.Config(
        str(prepared), str(exported), "mr", str(output), max_clips=3, engines=",".join(engines)
    )
    transcription.main(config)
    found = json.loads((output / "transcription.json").read_text(encoding="utf-8"))
    assert len(found["engines"]) == len(engines)
    for name, runs in found["engines"].items():
        assert runs.keys() == {"start", "files", "pauses", "dense", "spoken"}
        for condition, run in runs.items():
            assert run["cpu_seconds"] > 0 and run["peak_memory_gib"] > 0, (name, condition)
            assert run["wer"] > 0, (name, condition)
        assert runs["files"]["clips_without_words"] <= 3
    ours = [runs["spoken"] for name, runs in found["engines"].items() if name.startswith("ours")]
    assert all(run["words"] > 0 for run in ours)
    lines = (output / "transcription.md").read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("| ours") for line in lines) == 4 * len(ours)
    with pytest.raises(cli.UserError, match=r"unknown ours: .*--exported .*: has no ct2_int8"):
        config = replace(config, output_dir="x", engines="ours,ours_ct2_int8")
        transcription.main(config)


def test_clips_and_the_pauses_between_them_are_where_the_benchmark_says(tmp_path):
    clips = [(0.5 * np.ones(16_000 * seconds), str(seconds)) for seconds in (2, 1)]
    own = transcription.join(tmp_path, "a", clips, [1.0, 3.0, 0.5])
    assert [(part.start, part.end, part.text) for part in own.parts] == [(1, 3, "2"), (6, 7, "1")]
    samples, rate = soundfile.read(tmp_path / "a.wav")
    assert (len(samples), rate) == (own.seconds * 16_000, 16_000) and own.seconds == 7.5
    loud = np.abs(samples) > 0.4
    assert loud.sum() == 3 * 16_000 and loud[16_000:48_000].all() and loud[96_000:112_000].all()
    words = [(0.9, 1.2, "2"), (3.4, 3.6, "x"), (4.0, 5.0, "y"), (5.9, 6.0, "z"), (7.4, 7.5, "w")]
    assert transcription.words_in_pauses(own, words) == 2
    assert transcription.clips_without_words(own, words) == 1


@pytest.mark.slow
@pytest.mark.root
def test_an_engine_is_compared_with_one_process_and_its_bytes_are_counted(
    checkpoint, prepared, tmp_path, monkeypatch, forked
):
    if os.geteuid():
        pytest.skip("needs root for network namespaces")
    monkeypatch.setattr(engines, "ENGINES", {"one process": "", "DDP": "multi_node"})
    config = engines.Config(
        str(prepared), str(checkpoint), str(tmp_path / "engines"), tunes="lora", max_steps=16
    )
    engines.main(config)
    found = json.loads((tmp_path / "engines" / "engines.json").read_text(encoding="utf-8"))["lora"]
    assert (found["DDP"]["engine"], found["DDP"]["processes"]) == ("ddp", 2)
    assert found["DDP"]["wer"] == found["one process"]["wer"]
    gradient = 4 * 24_576 * 2  # r=32 on 12 projections of width 64, both ways
    assert gradient < found["DDP"]["bytes_per_step"] < 3 * gradient
    for step, loss in found["one process"]["loss"].items():
        assert found["DDP"]["loss"][step] == pytest.approx(loss, rel=1e-4)
