"""The batch plan: every clip once, the same shapes on all ranks, little padding."""

import numpy as np
import pytest

from common import audio, batching, windows

SECONDS = np.random.default_rng(0).uniform(1.0, 12.0, size=203)
LENGTHS = np.random.default_rng(1).integers(5, 90, size=203)


def plan(epoch=0, **options):
    return batching.plan(SECONDS, global_batch_size=8, seed=3, epoch=epoch, **options)


def test_every_clip_passes_once_an_epoch():
    clips = [clip for batch in plan() for clip in batch.clips]
    assert sorted(clips) == list(range(len(SECONDS)))


def test_the_same_seed_and_epoch_give_the_same_plan_and_others_another():
    assert plan() == plan()
    assert plan(epoch=1) != plan()


def test_a_window_holds_its_longest_clip_and_a_margin():
    for batch in plan():
        longest = windows.positions(SECONDS[list(batch.clips)].max())
        if batch.window == windows.FULL_WINDOW:
            continue
        margin = batch.window - longest
        low, high = windows.TRAIN_MARGIN
        assert low <= margin < high + windows.WINDOW_MULTIPLE


def test_a_few_per_cent_of_batches_have_the_full_window():
    sizes = [batch.window for epoch in range(8) for batch in plan(epoch)]
    share = sizes.count(windows.FULL_WINDOW) / len(sizes)
    assert 0.02 < share < 0.06, f"{share:.3f} of the batches are full"


def test_full_windows_add_no_more_than_a_tenth_however_short_the_clips():
    short = SECONDS / 4
    options = {"global_batch_size": 8, "seed": 3}
    plans = [batching.plan(short, epoch=epoch, **options) for epoch in range(20)]
    sizes = [batch.window for one in plans for batch in one]
    natural = [size for size in sizes if size < windows.FULL_WINDOW]
    assert len(natural) < len(sizes), "no batch has the full window"
    cost = np.mean(sizes) / np.mean(natural)
    assert 1.0 < cost < 1.13, f"full windows multiply the positions by {cost:.3f}"


def test_full_mode_gives_every_batch_the_full_window():
    assert {batch.window for batch in plan(window_mode="full")} == {windows.FULL_WINDOW}


def test_clips_of_a_batch_are_so_alike_that_padding_is_under_five_per_cent():
    used = sum(SECONDS[list(batch.clips)].sum() for batch in plan())
    held = sum(SECONDS[list(batch.clips)].max() * len(batch.clips) for batch in plan())
    assert 1 - used / held < 0.05, f"{1 - used / held:.3f} of the batches' length is padding"


@pytest.mark.parametrize("num_processes", [1, 2, 3, 16])
@pytest.mark.parametrize("max_batch_seconds", [1.0, 30.0, 400.0])
def test_ranks_share_a_batch_without_loss_and_in_equal_shapes(num_processes, max_batch_seconds):
    for batch in plan():
        ranks = [
            batching.micro_batches(
                batch,
                rank=rank,
                num_processes=num_processes,
                max_batch_seconds=max_batch_seconds,
                label_lengths=LENGTHS,
            )
            for rank in range(num_processes)
        ]
        shapes = [[(len(m.clips), m.window, m.label_length) for m in rank] for rank in ranks]
        assert all(shape == shapes[0] for shape in shapes)
        clips = [clip for rank in ranks for micro in rank for clip in micro.clips]
        assert sorted(clip for clip in clips if clip is not None) == sorted(batch.clips)
        assert all(micro.label_length == LENGTHS[list(batch.clips)].max() for micro in ranks[0])


def test_micro_batches_obey_the_seconds_they_may_hold():
    for batch in plan():
        for micro in batching.micro_batches(
            batch, rank=0, num_processes=1, max_batch_seconds=40.0, label_lengths=LENGTHS
        ):
            held = len(micro.clips) * micro.window / windows.POSITIONS_PER_SECOND
            assert held <= 40.0 or len(micro.clips) == 1


def test_positions_hold_every_frame_that_a_clip_reaches_into():
    for samples in (1_600, 16_000, 33_333, 100_001, 480_000):
        held = windows.positions(samples / audio.SAMPLE_RATE) * audio.SAMPLES_PER_POSITION
        needed = min(samples + audio.N_FFT // 2, audio.N_SAMPLES)
        assert needed <= held < needed + 2 * audio.SAMPLES_PER_POSITION


@pytest.mark.parametrize("num_processes", [1, 3])
@pytest.mark.parametrize("batch_seconds", [1.0, 10.0, 300.0])
def test_a_decoding_window_depends_on_the_clip_alone(batch_seconds, num_processes):
    margin = windows.TRAINED
    batches = batching.decode_plan(
        SECONDS, batch_seconds=batch_seconds, window_mode="auto", margin=margin,
        num_processes=num_processes,
    )  # fmt: skip
    clips = [clip for batch in batches for clip in batch.clips]
    assert sorted(clips) == list(range(len(SECONDS)))
    for batch in batches:
        own = tuple(windows.decode_window(SECONDS[clip], "auto", margin) for clip in batch.clips)
        assert own == batch.windows


def test_decoding_batches_are_even_and_as_many_on_each_process():
    batches = batching.decode_plan(
        SECONDS, batch_seconds=300.0, window_mode="auto", margin=windows.TRAINED, num_processes=4
    )
    held = [sum(batch.windows) / windows.POSITIONS_PER_SECOND for batch in batches]
    assert len(batches) % 4 == 0
    assert max(held) < 1.1 * min(held)
    assert max(held) < 300 + batches[0].window / windows.POSITIONS_PER_SECOND


def test_a_loss_plan_has_one_window_a_batch():
    own = windows.cache_windows(SECONDS, "auto")
    plan = batching.window_plan(SECONDS, own, batch_seconds=60.0, label_lengths=LENGTHS)
    assert sorted(clip for batch in plan for clip in batch.clips) == list(range(len(SECONDS)))
    for batch in plan:
        assert {own[clip] for clip in batch.clips} == {batch.window}
        assert batch.label_length == LENGTHS[list(batch.clips)].max()


def test_a_decoding_window_leaves_the_margin_that_keeps_base_models_from_looping():
    margin = windows.UNTRAINED
    for seconds in SECONDS:
        size = windows.decode_window(seconds, "auto", margin)
        assert size >= windows.positions(seconds) + margin.margin
        assert size >= margin.floor
    assert windows.decode_window(29.0, "auto", margin) == windows.FULL_WINDOW


def test_an_adapter_is_decoded_at_the_windows_it_was_trained_for():
    assert windows.decode_margin(windows.window_policy("auto")) == windows.TRAINED
    assert windows.decode_margin(windows.window_policy("full")) == windows.UNTRAINED
    assert windows.decode_margin(None) == windows.UNTRAINED
    assert windows.decode_margin({"context": "auto"}).margin == 64, "an older record"
    policies = (windows.window_policy("auto"), windows.window_policy("full"), None)
    assert [windows.trained_mode(one) for one in policies] == ["natural", "full", "full"]
    low, high = windows.TRAIN_MARGIN
    for seconds in SECONDS:
        margin = windows.decode_window(seconds, "auto", windows.TRAINED)
        margin -= windows.positions(seconds)
        assert low <= windows.TRAINED.margin <= margin < high + windows.DECODE_MULTIPLE
