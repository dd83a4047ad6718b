"""The panel of clips without speech: what is in it, and what is counted as made up."""

import itertools
import json

import launch
import numpy as np
import pytest
from datasets import Dataset
from few_sounds import FEW

import eval_wer
from common import levels
from common.audio import SAMPLE_RATE, decode_flac, encode_flac
from common.predictions import Prediction
from evaluation import nonspeech, sounds

SPEECH = slice(16_000, 32_000)  # of `recording`


def rng(seed=0):
    return np.random.default_rng(seed)


def recording(noise=1e-3, seed=0):
    """Three seconds: the noise of a room, and from 1 s to 2 s something loud as speech."""
    samples = noise * rng(seed).standard_normal(3 * SAMPLE_RATE)
    samples[SPEECH] += 0.3 * np.sin(np.arange(SAMPLE_RATE) * 0.1)
    return samples.astype(np.float32)


def corpus(clips, languages=("mr", "hi", "hi"), text="एक दोन तीन"):
    return Dataset.from_dict(
        {
            "id": [f"clip {number}" for number in range(len(clips))],
            "audio": [encode_flac(samples) for samples in clips],
            "seconds": [len(samples) / SAMPLE_RATE for samples in clips],
            "text": [text] * len(clips),
            "language": list(languages)[: len(clips)],
        }
    )


@pytest.fixture(scope="module")
def panel():
    return nonspeech.draw_panel(corpus([recording(seed=seed) for seed in range(3)]))


def samples(panel, kind):
    return [
        decode_flac(row["audio"]).astype(np.float32) / 32768
        for row in panel.clips
        if row["kind"] == kind
    ]


# ------ sounds


@pytest.mark.parametrize("dbfs", nonspeech.NOISE_LEVELS)
def test_noise_in_the_panel_has_the_level_of_its_name(panel, dbfs):
    for color in ("white", "pink"):
        clips = samples(panel, f"{color} noise {dbfs} dBFS")
        assert len(clips) == nonspeech.CLIPS
        for clip in clips:
            assert levels.level(clip) == pytest.approx(dbfs, abs=0.1), color


@pytest.mark.parametrize(
    ("make", "slope"), [(sounds.white_noise, 0.0), (sounds.pink_noise, -1.0)], ids=["white", "pink"]
)
def test_the_power_of_pink_noise_falls_by_3_db_an_octave_and_that_of_white_noise_is_flat(
    make, slope
):
    power = np.abs(np.fft.rfft(make(rng(), 5.0, dbfs=-20))) ** 2
    edges = 2 ** np.arange(5, 15)  # octaves of bins
    density = [power[low:high].mean() for low, high in itertools.pairwise(edges)]
    assert np.polyfit(range(len(density)), np.log2(density), 1)[0] == pytest.approx(slope, abs=0.1)


def test_hum_has_no_power_but_at_multiples_of_50_hz():
    power = np.abs(np.fft.rfft(sounds.hum(rng(), 5.0))) ** 2
    harmonics = np.arange(1, sounds.HARMONICS + 1) * 250  # bins of 0.2 Hz
    assert power[harmonics].sum() == pytest.approx(power.sum(), rel=1e-6)


def test_clicks_are_short_and_music_never_stops():
    clicks, music = sounds.clicks(rng(), 5.0), sounds.music(rng(), 5.0)
    assert (levels.frame_levels(clicks) == levels.INAUDIBLE).mean() > 0.5
    assert np.abs(clicks).max() == pytest.approx(0.3)
    assert levels.frame_levels(music).min() > -60
    assert np.abs(music).max() < 1


@pytest.mark.parametrize("kind", nonspeech.SOUNDS)
def test_a_sound_is_a_function_of_its_generator_and_has_its_duration(kind):
    make = nonspeech.SOUNDS[kind]
    first, second, other = make(rng(1), 1.5), make(rng(1), 1.5), make(rng(2), 1.5)
    assert (first.dtype, first.shape) == (np.float32, (24_000,))
    assert np.array_equal(first, second)
    assert np.array_equal(first, other) == (kind == "silence")


# ------ cut from the corpus


def test_a_pause_is_the_longest_stretch_without_speech():
    clip = recording()
    pause = levels.longest_pause(np.concatenate([clip, clip[:8_000]]))  # 1.5 s of noise at its end
    assert 0.9 * 24_000 <= len(pause) <= 24_000
    assert levels.level(pause) == pytest.approx(-60, abs=1)


def test_pauses_in_the_panel_come_from_the_corpus_and_hold_no_speech(panel):
    pauses = samples(panel, nonspeech.PAUSES)
    assert len(pauses) == nonspeech.CLIPS
    rooms = [np.round(recording(seed=seed) * 32768).astype(int) for seed in range(3)]
    for pause in pauses:
        assert len(pause) == 5 * SAMPLE_RATE
        assert levels.frame_levels(pause).max() < -55
        start = np.round(pause[:200] * 32768).astype(int).tobytes()
        assert any(start in room.tobytes() for room in rooms)


def test_a_pause_is_lengthened_without_a_jump():
    pause = np.linspace(-0.1, 0.1, 5_000, dtype=np.float32)
    longer = levels.lengthen(pause, 5.0)
    assert len(longer) == 80_000
    assert np.abs(np.diff(longer)).max() <= np.diff(pause).max() * 1.01


def test_what_the_corpus_does_not_hold_is_left_out_and_counted():
    loud = 0.3 * np.sin(np.arange(SAMPLE_RATE) * 0.1)  # a second without any pause
    gated = recording(noise=0.0)  # its pauses are digital zeros
    short = nonspeech.draw_panel(corpus([loud, gated[8_000:]]))
    left_out = {kind: number for kind, number in short.left_out.items() if number}
    assert left_out == {nonspeech.PAUSES: 2, nonspeech.CUT: 1, nonspeech.PADDED: 1}
    rows = nonspeech.describe(short, texts(short, ""), ["hi"] * len(short.clips))["kinds"]
    assert {row["kind"]: row["left_out"] for row in rows if row["left_out"]} == left_out
    assert "left out: 2 clips of pauses of the corpus" in table(short, "")


def test_speech_is_cut_off_a_second_after_it_begins_or_padded_to_30_seconds(panel):
    for clip in samples(panel, nonspeech.CUT):
        assert len(clip) == SPEECH.stop
    for clip in samples(panel, nonspeech.PADDED):
        assert len(clip) == 30 * SAMPLE_RATE
        assert not clip[3 * SAMPLE_RATE :].any()
        assert clip[SPEECH].any()


def test_the_panel_is_a_function_of_the_seed_and_the_scored_clips(panel):
    clips = corpus([recording(seed=seed) for seed in range(3)])
    again, other = nonspeech.draw_panel(clips), nonspeech.draw_panel(clips, seed=1)
    assert again.clips.to_list() == panel.clips.to_list()
    assert again.clips["id"] == other.clips["id"]
    assert again.clips["audio"] != other.clips["audio"]
    sounds_of = {row["kind"]: row["language"] for row in panel.clips}
    assert {sounds_of[kind] for kind in nonspeech.SOUNDS} == {"hi"}, "the most frequent"


# ------ counts


def texts(panel, text, loops=False):
    return {name: Prediction(name, text, False, loops=loops) for name in panel.clips["id"]}


def table(panel, text):
    rates = nonspeech.describe(panel, texts(panel, text), ["hi"] * len(panel.clips))
    return nonspeech.table({"base": {"nonspeech": {"natural": rates, "full": rates}}})


def test_a_model_that_writes_nothing_makes_nothing_up(panel):
    for text in ("", "... ♪ !"):
        rates = nonspeech.describe(panel, texts(panel, text), ["hi"] * len(panel.clips))
        assert rates["clips"] == len(panel.clips) - 2 * nonspeech.CLIPS
        assert (rates["clips_with_words"], rates["words"], rates["repeated_ngrams"]) == (0, 0, 0)
        assert rates["words_per_minute"] == 0
    assert "1 of 1" not in table(panel, "")


def test_words_repeats_and_compression_are_counted_by_kind_and_together(panel):
    text = "एक दोन " * 20
    rates = nonspeech.describe(panel, texts(panel, text, loops=True), ["hi"] * len(panel.clips))
    assert rates["clips_with_words"] == rates["repeated_ngrams"] == rates["clips"]
    assert rates["words_per_minute"] == pytest.approx(40 * 12)
    assert rates["compression_ratio"] > 10
    kinds = {row["kind"]: row for row in rates["kinds"]}
    assert sum(row["words"] for row in kinds.values() if not row["speech"]) == rates["words"]
    assert kinds["silence"]["clips"] == 1
    assert "reference_words_per_minute" not in kinds["silence"]
    assert kinds[nonspeech.CUT]["reference_words_per_minute"] == pytest.approx(3 * 20)
    assert kinds[nonspeech.PADDED]["reference_words_per_minute"] == pytest.approx(3 * 2)
    shown = {line[:26].strip(): line[26:].split() for line in table(panel, text).splitlines()}
    assert shown["silence"] == ["1", "of", "1,", "480", "1", "of", "1,", "480"]
    assert shown[nonspeech.PADDED] == ["2", "of", "2,", "80", "(6)", "2", "of", "2,", "80", "(6)"]


def test_a_text_is_invented_if_it_repeats_or_has_far_more_words_than_were_spoken(panel):
    def kinds(text, loops=False):
        panel.texts = {"base": {"full": texts(panel, text, loops)}}
        return {row["kind"] for row in nonspeech.rows(panel) if row["base_full_invented"]}

    assert kinds("") == kinds("...") == set()
    assert kinds("एक दोन") == set(nonspeech.KINDS) - set(nonspeech.WITH_SPEECH)
    assert kinds("एक दो न तीन") == kinds("एक दोन") | {nonspeech.CUT}, "an error of spacing"
    assert kinds("एक दोन तीन चार पाच") == kinds("", loops=True) == set(nonspeech.KINDS)


# ------ in an evaluation


def evaluate(options):
    """Evaluate with a panel of few clips."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nonspeech, "KINDS", FEW)
        eval_wer.main(eval_wer.Config(**options))


@pytest.fixture(scope="module")
def evaluated(checkpoint, prepared, tmp_path_factory):
    """Options of an evaluation with the panel, and its folder."""
    options = {
        "model": str(checkpoint), "data_dir": str(prepared), "num_workers": 0, "max_clips": 4,
        "output_dir": str(tmp_path_factory.mktemp("wer")), "panels": True,
    }  # fmt: skip
    evaluate(options)
    return options, launch.Path(options["output_dir"])


def results(folder):
    wer = json.loads((folder / "wer.json").read_text(encoding="utf-8"))
    return wer["base"]["nonspeech"], (folder / "nonspeech.jsonl").read_text(encoding="utf-8")


def test_wer_json_counts_what_nonspeech_jsonl_holds_at_both_windows(evaluated):
    rates, content = results(evaluated[1])
    rows = [json.loads(line) for line in content.splitlines()]
    assert set(rates) == {"natural", "full"}
    for window, own in rates.items():
        assert [row["kind"] for row in own["kinds"]] == list(nonspeech.KINDS)
        repeats = [row[f"base_{window}_loops"] for row in rows]
        assert sum(kind["repeated_ngrams"] for kind in own["kinds"]) == sum(repeats)
    assert all(row["seconds"] == 5.0 for row in rows if row["kind"] in nonspeech.SOUNDS)
    written = {window: [row[f"base_{window}"] for row in rows] for window in rates}
    assert written["natural"] != written["full"], "each window is decoded as it is"


def test_the_panel_does_not_depend_on_the_batch(evaluated, tmp_path):
    evaluate(evaluated[0] | {"output_dir": str(tmp_path), "batch_seconds": 1.0})
    assert results(tmp_path) == results(evaluated[1])


@pytest.mark.slow
def test_the_panel_does_not_depend_on_the_number_of_processes(evaluated, tmp_path):
    options = evaluated[0] | {"output_dir": str(tmp_path)}
    done = launch.run("tests/few_sounds.py", options, processes=2)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    assert results(tmp_path) == results(evaluated[1])


def test_without_panels_no_texts_of_an_earlier_panel_are_left(evaluated, tmp_path):
    (tmp_path / "nonspeech.jsonl").write_text("{}\n")
    evaluate(evaluated[0] | {"output_dir": str(tmp_path), "panels": False})
    wer = json.loads((tmp_path / "wer.json").read_text(encoding="utf-8"))
    assert "nonspeech" not in wer["base"]
    assert not (tmp_path / "nonspeech.jsonl").exists()
