"""Clips without speech and augmentation: what is drawn, for whom, and what stays as it was."""

import itertools

import numpy as np
import pytest
import tiny
import torch

from common import audio, labels, levels
from common.collator import read_samples
from common.prepared import column, label_lengths, load_prepared
from common.whisper import mel_filters
from common.windows import positions
from evaluation import nonspeech as panel
from training import augment, nonspeech, sounds
from training.clips import EpochClips
from training.plan import TrainPlan

SECONDS = np.random.default_rng(0).uniform(1.0, 12.0, 203)


def plan(**more):
    lengths = np.random.default_rng(1).integers(5, 90, len(SECONDS))
    options = {"speed": 0.1, "nospeech_share": 0.15} | more
    options = {"max_batch_seconds": 30.0} | options
    return TrainPlan(SECONDS, lengths, 8, 3, "auto", **options)


# ------ which clips


@pytest.fixture(scope="module")
def epochs():
    return [plan().epoch(epoch) for epoch in range(8)]


def test_an_epoch_has_every_clip_once_and_the_share_of_clips_without_speech_beside_it(epochs):
    counts = []
    for epoch in epochs:
        assert sorted(clip for step in epoch.steps for clip in step.speech) == list(range(203))
        added = [clip for step in epoch.steps for clip in step.batch.clips[len(step.speech) :]]
        assert added == list(range(203, 203 + len(epoch.nonspeech)))
        counts.append(len(added))
    assert sum(counts) / (203 * len(epochs)) == pytest.approx(0.15, abs=0.02), counts


def test_a_clip_without_speech_has_the_length_of_a_clip_of_its_batch(epochs):
    for step in epochs[1].steps:
        for clip in step.batch.clips[len(step.speech) :]:
            own = epochs[1].nonspeech[clip - 203]
            assert own.partner in step.speech
            assert own.step == step.number
            assert step.seconds[clip] == step.seconds[own.partner]
            assert positions(float(step.seconds[clip])) <= step.batch.window


def test_what_is_drawn_depends_on_no_number_of_processes_and_no_cut(epochs):
    for processes, seconds in ((1, 500.0), (2, 30.0), (3, 60.0)):
        more = {"num_processes": processes, "max_batch_seconds": seconds}
        ranks = [plan(rank=rank, **more).epoch(1) for rank in range(processes)]
        for steps in zip(epochs[1].steps, *(epoch.steps for epoch in ranks), strict=True):
            first, *others = steps
            pieces = [piece for step in others for piece in step.pieces]
            clips = [clip for piece in pieces for clip in piece.clips if clip is not None]
            assert sorted(clips) == sorted(first.batch.clips)
            assert {step.num_tokens for step in steps} == {first.num_tokens}
            shapes = [[(len(p.clips), p.window, p.label_length) for p in s.pieces] for s in others]
            assert all(shape == shapes[0] for shape in shapes)
        for epoch in ranks:
            assert epoch.nonspeech == epochs[1].nonspeech
            assert np.array_equal(epoch.seconds, epochs[1].seconds)


def test_nothing_is_drawn_where_nothing_is_asked_for():
    epoch = plan(speed=0.0, nospeech_share=0.0).epoch(0)
    assert not epoch.nonspeech
    assert np.array_equal(epoch.seconds, SECONDS)
    assert all(step.speech == step.batch.clips for step in epoch.steps)


# ------ rows


@pytest.fixture(scope="module")
def split(prepared):
    return load_prepared(str(prepared))[0]["train"]


def epoch_clips(split, speed, epoch=1):
    own = TrainPlan(
        column(split, "seconds"), label_lengths(split) - 1, 4, 3, "auto", 30.0,
        speed=speed, nospeech_share=0.5,
    )  # fmt: skip
    drawn = own.epoch(epoch)
    clips = (drawn.seconds, drawn.speeds, drawn.nonspeech)
    return drawn, EpochClips(split, *clips, 3, labels.PROMPT_LENGTH)


def test_the_label_of_a_clip_without_speech_is_the_prompt_and_the_end(split, checkpoint):
    tokenizer = labels.load_tokenizer(str(checkpoint), "mr")
    empty = labels.make_labels(tokenizer, "", "mr", "transcribe")
    drawn, rows = epoch_clips(split, 0.0)
    assert len(drawn.nonspeech) > 5
    for step in drawn.steps:
        tokens = sum(len(rows[clip]["labels"]) - 1 for clip in step.batch.clips)
        assert tokens == step.num_tokens
        for clip in step.batch.clips[len(step.speech) :]:
            assert rows[clip]["labels"] == empty
            assert rows[clip]["audio"].dtype == np.int16


def test_clips_without_speech_are_pauses_of_the_corpus_too(split, monkeypatch):
    room = np.random.default_rng(0).integers(-9, 10, 16_000).astype(np.int16)
    clip = np.concatenate([room, np.round(3e4 * np.sin(np.arange(8_000))).astype(np.int16)])
    corpus = [{"audio": clip}] * 3
    monkeypatch.setattr(nonspeech, "PAUSE_SHARE", 1.0)
    drawn = nonspeech.draw_samples(nonspeech.Nonspeech(5, 0, 0), 4.0, corpus, seed=1)
    assert len(drawn) == 64_000
    assert np.array_equal(drawn[: len(room) // 2], room[: len(room) // 2])
    assert np.abs(drawn).max() <= 9


def test_a_clip_is_played_anew_in_each_epoch_and_the_same_in_one(split):
    def lengths(epoch):
        rows = epoch_clips(split, 0.1, epoch)[1]
        return [len(read_samples(rows[clip])) for clip in range(21)]

    assert lengths(1) == lengths(1)
    same = np.mean(np.equal(lengths(1), lengths(2)))
    assert 0 < same < 0.7, "a third by chance"
    assert epoch_clips(split, 0.0)[1][3] == split[3], "stored as it was"


def test_a_played_clip_has_the_length_that_its_window_is_planned_for(split):
    drawn, rows = epoch_clips(split, 0.1)
    assert set(np.round(drawn.speeds, 6)) == {0.9, 1.0, 1.1}
    for clip in range(len(split)):
        length = len(audio.decode_flac(split[clip]["audio"])) / drawn.speeds[clip]
        played = read_samples(rows[clip])
        assert len(played) == pytest.approx(length, abs=1)
        assert len(played) / 16_000 == pytest.approx(drawn.seconds[clip], abs=2 / 16_000)
    long = np.array([29.0, 30.0])
    for epoch in range(10):
        slowed = long / augment.speeds(long, 0.1, seed=0, epoch=epoch)
        assert slowed.max() <= 30.0


def test_speed_changes_pitch_and_tempo_together_and_leaves_silence_silent():
    assert not augment.play(np.zeros(16_000, np.int16), 0.9).any()
    wave = audio.to_pcm(tiny.tone(2.0, pitch=400.0))
    played = augment.play(wave, 1.1)
    spectrum = np.abs(np.fft.rfft(played))
    assert np.argmax(spectrum) * 16_000 / len(played) == pytest.approx(440.0, abs=1)


# ------ masks of features


@pytest.fixture(scope="module")
def features():
    """Of clips of 1, 2 and 6 seconds in a window of 6, and of their silence (B)."""
    waves = torch.zeros(3, 96_000)
    for i, seconds in enumerate((1.0, 2.0, 6.0)):
        wave = torch.from_numpy(tiny.tone(seconds, pitch=200.0 * (i + 1), seed=i))
        waves[i, : len(wave)] = wave * (1e-3 if i == 1 else 1.0)
    mel = audio.log_mel(waves, mel_filters(80, torch.device("cpu")))
    return mel, mel[:2, 0, -1]


def test_masks_hold_silence_and_touch_the_frames_of_the_clip_alone(features):
    mel, silence = features
    seconds = np.array([1.0, 2.0, 6.0])
    shares = []
    for step in range(50):
        masks = augment.spec_masks([0, 1, 2], seconds, seed=1, step=step)
        assert torch.equal(masks[1:2], augment.spec_masks([1], seconds, seed=1, step=step))
        masked = augment.mask_features(mel, masks)
        changed = masked != mel
        for clip in range(3):
            frames = changed[clip].any(dim=0).nonzero()[:, 0]
            assert frames.max() < seconds[clip] * 100 + 3, "frames reach 25 ms around the clip"
        assert torch.equal(
            masks[:, 0, :, 1] <= torch.tensor(seconds)[:, None] / 30, torch.ones(3, 2) > 0
        )
        shares.append(changed[2].float().mean().item())
        for clip in range(2):
            assert torch.allclose(masked[clip][changed[clip]], silence[clip])
    assert 0.2 < np.mean(shares) < 0.5, "of 6 seconds of sound"
    assert not augment.spec_masks([None], seconds, seed=1, step=0).any()


def test_masks_do_not_depend_on_the_window(features):
    mel, _ = features
    masks = augment.spec_masks([0, 1, 2], np.array([1.0, 2.0, 6.0]), seed=1, step=0)
    shorter = augment.mask_features(mel[:2, :, :240], masks[:2])
    assert torch.equal(shorter, augment.mask_features(mel, masks)[:2, :, :240])


# ------ trained and judged sounds


def fingerprint(samples):
    """In dB: the mel spectrum (80) below its maximum, 40 at most; how much frames differ."""
    filters = mel_filters(80, torch.device("cpu"))
    power = torch.stft(
        torch.from_numpy(samples / max(np.abs(samples).max(), 1e-9)), 400, 160,
        window=torch.hann_window(400), return_complex=True,
    ).abs()  # fmt: skip
    mel = (filters @ power**2).mean(dim=1)
    shape = 10 * (mel / mel.max()).clamp(min=1e-4).log10()
    return torch.cat([shape, torch.tensor([np.std(levels.frame_levels(samples))])])


def test_sounds_that_are_judged_by_are_not_trained_on():
    assert not set(sounds.KINDS) & set(panel.SOUNDS)
    assert not {make.__code__ for make in sounds.KINDS.values()} & {
        getattr(make, "func", make).__code__ for make in panel.SOUNDS.values()
    }
    for (low, high), judged in itertools.product(sounds.LEVELS, panel.NOISE_LEVELS):
        assert not low - 4 < judged < high + 4
    trained = {
        name: [fingerprint(make(np.random.default_rng(seed), 5.0)) for seed in range(12)]
        for name, make in sounds.KINDS.items()
    }
    for name, make in panel.SOUNDS.items():
        if name == "silence":  # digital zeros; dither is never that
            continue
        own, other = (fingerprint(make(np.random.default_rng(seed), 5.0)) for seed in (1, 2))
        assert name == "music" or (own - other).abs().mean() < 2.0, f"{name} is not like itself"
        for kind, prints in trained.items():
            nearest = min((own - drawn).abs().mean() for drawn in prints)
            assert nearest > 3.0, f"{kind} is like {name}: {nearest:.1f} dB"


@pytest.mark.parametrize("name", sounds.KINDS)
def test_a_trained_sound_has_its_duration_and_differs_with_its_generator(name):
    make = sounds.KINDS[name]
    first, again, other = (make(np.random.default_rng(seed), 1.25) for seed in (0, 0, 1))
    assert first.shape == (20_000,)
    assert first.dtype == np.float32
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert 0 < np.abs(first).max() <= 1
