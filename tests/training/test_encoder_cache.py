"""Cached outputs of a frozen encoder: the same losses, computed once, refused without room."""

import json
import shutil
from collections import namedtuple

import launch
import numpy as np
import pytest
import torch
from short_run import records, small_options, train

from common import batching, cli, predictions, whisper
from common.batching import MicroBatch
from common.collator import load_batches
from common.prepared import column, label_lengths, load_prepared
from common.windows import cache_windows
from training import plan
from training.encoder_cache import EncoderCache
from training.loss import SpeechLoss
from training.step import batch_loss


@pytest.fixture
def options(checkpoint, prepared, tmp_path):
    extra = {"eval_every": 100, "lora_scope": "decoder", "cache_encoder": True}
    return small_options(checkpoint, prepared, tmp_path, **extra)


def losses(options):
    return list(records(options, "loss").values())


def test_a_batch_of_cached_states_has_the_loss_of_its_audio(checkpoint, prepared, tmp_path):
    split = load_prepared(str(prepared))[0]["train"]
    model = whisper.load_base(str(checkpoint), dtype=torch.float32).eval()
    windows = cache_windows(column(split, "seconds"), "auto")
    cache = EncoderCache(tmp_path, windows, model.config.d_model, torch.float32)
    same = np.flatnonzero(windows == windows[0])[:3].tolist()
    batch = MicroBatch((*same, None), int(windows[0]), int(label_lengths(split)[same].max()) - 1)
    collate = predictions.collator_for(model)
    with torch.no_grad():
        (heard,) = load_batches(split, [batch], collate, num_workers=0)
        states = whisper.encode(model, heard["waves"])
        cache.fill(MicroBatch(tuple(same), batch.window, 0), states)
        (read,) = load_batches(split, [batch], collate, num_workers=0, cache=cache)
        assert "waves" not in read
        speech_loss = SpeechLoss(model)
        expected = batch_loss(speech_loss, heard)
        assert batch_loss(speech_loss, read).item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_run_with_cached_states_has_the_losses_of_one_that_encodes(
    options, monkeypatch, tmp_path
):
    train(options)
    encoded = lambda *given, cache=None, **more: load_batches(*given, **more)  # noqa: E731
    monkeypatch.setattr(plan, "load_batches", encoded)
    encoding = options | {"output_dir": str(tmp_path / "encoding")}
    train(encoding)
    assert np.allclose(losses(options), losses(encoding), rtol=1e-5)


def test_a_complete_cache_is_found_again_and_a_cut_one_is_made_anew(options, capsys):
    train(options)
    first = losses(options)
    train(options | {"resume": "never"})
    assert "found complete" in capsys.readouterr().out
    assert losses(options) == first

    states = launch.Path(options["output_dir"], "encoder_cache", "states.bin")
    states.write_bytes(states.read_bytes()[:-4])
    train(options | {"resume": "never"})
    assert "found complete" not in capsys.readouterr().out
    assert losses(options) == first


@pytest.mark.slow
def test_two_processes_fill_one_cache_and_train_the_same(options, tmp_path):
    one = options | {"lora_dropout": 0.0}
    train(one)
    two = one | {"output_dir": str(tmp_path / "two")}
    done = launch.run("train_lora.py", two, processes=2)
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "two" / "train.json").read_text(encoding="utf-8"))
    assert made["processes"] == 2
    assert np.allclose(losses(one), losses(two), atol=1e-4)


def test_the_cache_lies_where_it_is_told_to(options, tmp_path):
    elsewhere = tmp_path / "fast_disk" / "cache"
    train(options | {"cache_dir": str(elsewhere), "max_steps": 1})
    assert (elsewhere / "states.bin").is_file()
    assert not launch.Path(options["output_dir"], "encoder_cache").exists()


def test_a_disk_too_small_is_refused_with_the_forecast(options, monkeypatch):
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 0, 10**5))
    with pytest.raises(cli.UserError, match=r"--cache_encoder true: takes .* GB .* to spare"):
        train(options)
    assert not launch.Path(options["output_dir"], "encoder_cache").exists()


def test_an_encoder_that_is_trained_cannot_be_cached(options):
    with pytest.raises(cli.UserError, match="give --lora_scope decoder"):
        train(options | {"lora_scope": "all"})


def test_clips_of_one_window_meet_and_every_clip_passes_once():
    seconds = np.random.default_rng(0).uniform(1, 12, size=203)
    windows = cache_windows(seconds, "auto")
    plan = batching.plan(seconds, global_batch_size=8, seed=1, epoch=0, windows=windows)
    assert sorted(clip for batch in plan for clip in batch.clips) == list(range(203))
    own = sum(windows[clip] == batch.window for batch in plan for clip in batch.clips)
    assert own > 0.8 * 203, f"only {own} clips have their own window"
    mixed = sum(len(set(windows[list(batch.clips)])) > 1 for batch in plan)
    assert 0 < mixed < 0.4 * len(plan), f"{mixed} of {len(plan)} batches mix windows"


@pytest.mark.parametrize("num_processes", [1, 3])
def test_a_piece_has_one_window_and_ranks_get_the_same_shapes(num_processes):
    random = np.random.default_rng(0)
    seconds, lengths = random.uniform(1, 12, size=203), random.integers(5, 90, size=203)
    windows = cache_windows(seconds, "auto")
    plan = batching.plan(seconds, global_batch_size=8, seed=1, epoch=0, windows=windows)
    for batch in plan:
        ranks = [
            batching.micro_batches(
                batch, rank=rank, num_processes=num_processes, max_batch_seconds=30.0,
                label_lengths=lengths, windows=windows,
            )
            for rank in range(num_processes)
        ]  # fmt: skip
        shapes = [[(len(m.clips), m.window, m.label_length) for m in rank] for rank in ranks]
        assert all(shape == shapes[0] for shape in shapes)
        pieces = [piece for rank in ranks for piece in rank]
        clips = [clip for piece in pieces for clip in piece.clips if clip is not None]
        assert sorted(clips) == sorted(batch.clips)
        for piece in pieces:
            assert {windows[clip] for clip in piece.clips if clip is not None} <= {piece.window}
