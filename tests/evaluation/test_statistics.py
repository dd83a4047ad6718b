"""Intervals and comparisons: right as often as they say, and the same whatever the order."""

import time

import numpy as np
import pytest

from common.bootstrap import difference_interval, rate_interval
from common.metrics import ClipCounts, ErrorCounts
from evaluation import report, statistics


def clip_counts(errors, lengths):
    words = [
        ErrorCounts(int(own), reference_length=int(length))
        for own, length in zip(errors, lengths, strict=True)
    ]
    return {"raw": ClipCounts("word", words, words)}


def corpus(clips, speakers, seed=0, gain=0.8):
    """Ids, speakers and counts of two systems; the second makes `gain` of the first's errors."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(4, 16, clips)
    speaker = np.arange(clips) % speakers
    rates = generator.beta(2, 6, speakers)[speaker]
    counts = {
        "base": clip_counts(generator.binomial(lengths, rates), lengths),
        "adapter": clip_counts(generator.binomial(lengths, rates * gain), lengths),
    }
    return [f"clip_{index}" for index in range(clips)], [f"s{own}" for own in speaker], counts


def draw_speakers(generator, speakers):
    """Sums of some speakers, (speakers, 3): errors of two systems, words.

    Two to eleven clips a speaker, four to fifteen words a clip, a rate of each speaker's own.
    """
    clips = np.arange(11) < generator.integers(2, 12, speakers)[:, None]
    words = (generator.integers(4, 16, clips.shape) * clips).sum(axis=1)
    rates = generator.beta(2, 6, speakers)
    errors = generator.binomial(words, rates), generator.binomial(words, rates * 0.8)
    return np.stack([*errors, words], axis=1).astype(np.float64)


@pytest.mark.parametrize("speakers", [40, 80])
def test_95_percent_intervals_hold_the_truth_in_93_to_97_percent_of_1000_corpora(
    speakers,
):
    generator = np.random.default_rng(5)
    first, second, words = draw_speakers(generator, 400_000).sum(axis=0)
    truths = 100 * first / words, 100 * (second - first) / words
    held = np.zeros(2)
    for _ in range(1000):
        counts = draw_speakers(generator, speakers)
        sums = statistics.resample(counts, np.arange(speakers), replicas=1000)
        rates = [statistics.percent(sums[:, own], sums[:, 2]) for own in (0, 1)]
        for index, values in enumerate((rates[0], rates[1] - rates[0])):
            low, high = statistics.interval(values, speakers)
            held[index] += low <= truths[index] <= high
    print(f"{speakers} speakers: rate {held[0] / 10:.1f} %, difference {held[1] / 10:.1f} %")
    assert all(930 <= count <= 970 for count in held), held


def test_the_result_does_not_depend_on_the_order_of_the_clips():
    ids, speakers, counts = corpus(200, 30)
    expected = statistics.significance(ids, speakers, counts)
    order = np.random.default_rng(1).permutation(len(ids))
    shuffled = {
        system: {
            name: ClipCounts("word", *([own[i] for i in order] for own in (c.words, c.characters)))
            for name, c in by_name.items()
        }
        for system, by_name in counts.items()
    }
    for known in (True, False):
        names = speakers if known else [""] * len(ids)
        expected = statistics.significance(ids, names, counts)
        assert expected.bootstrap["unit"] == ("speaker" if known else "clip")
        found = statistics.significance(
            [ids[index] for index in order], [names[index] for index in order], shuffled
        )
        assert found == expected


def test_clips_of_a_speaker_are_drawn_together():
    """Ten clips of a speaker that are alike tell as much as one of them."""
    ids, speakers, counts = corpus(40, 40)
    alone = statistics.significance(ids, speakers, counts)
    tenfold = {
        system: {"raw": ClipCounts("word", own["raw"].words * 10, own["raw"].characters * 10)}
        for system, own in counts.items()
    }
    copies = [f"{clip}_{copy}" for copy in range(10) for clip in ids]
    assert statistics.significance(copies, speakers * 10, tenfold).intervals == alone.intervals
    low, high = alone.intervals["base"]["raw"]["wer_interval"]
    by_clip = statistics.significance(copies, [""] * 400, tenfold)
    narrow = by_clip.intervals["base"]["raw"]["wer_interval"]
    assert narrow[1] - narrow[0] < 0.5 * (high - low)


def test_a_difference_is_of_the_same_draws_so_equal_systems_differ_by_exactly_nothing():
    ids, speakers, counts = corpus(100, 25)
    found = statistics.significance(ids, speakers, {"a": counts["base"], "b": counts["base"]})
    own = found.comparisons[0]
    assert own["systems"] == ["a", "b"]
    assert (own["difference"], own["interval"], own["p"]) == (0.0, [0.0, 0.0], 1.0)
    assert not own["distinguishable"]
    shown = report.difference_shown(own, 100, alone=True)
    assert shown == "difference +0.0 [0.0, 0.0], p = 1.0000: not distinguishable on 100 clips"


def test_a_clear_difference_has_the_least_p_that_the_replicas_allow():
    ids, speakers, counts = corpus(300, 30, gain=0.3)
    wer = statistics.significance(ids, speakers, counts).comparisons[0]
    assert wer["p"] == 2 / 10_001
    assert wer["distinguishable"] and wer["interval"][1] < 0
    shown = report.difference_shown(wer, 300, alone=False)
    assert shown.startswith("adapter - base -")
    assert shown.endswith(", p <= 0.0002")


@pytest.mark.parametrize(
    ("values", "p"), [([-1.0] * 9, 0.2), ([-1.0] * 8 + [1.0], 0.4), ([-1.0, 1.0, 0.0], 1.0)]
)
def test_p_counts_the_observed_difference_as_a_replica(values, p):
    assert statistics.p_value(np.array(values)) == p


def test_below_20_speakers_a_warning_is_given_and_intervals_over_clips_stand_beside():
    found = statistics.significance(*corpus(100, 19))
    assert found.bootstrap["units"] == 19
    assert found.bootstrap["warning"].startswith("19 speakers, fewer than 20: ")
    rates = found.intervals["base"]["raw"]
    assert rates["wer_interval_clips"] != rates["wer_interval"]
    assert {"interval_clips", "p_clips"} <= found.comparisons[0].keys()
    enough = statistics.significance(*corpus(100, 20))
    assert enough.bootstrap["warning"] is None
    assert "wer_interval_clips" not in enough.intervals["base"]["raw"]


def test_clips_are_drawn_where_speakers_are_unknown_or_only_one():
    ids, _, counts = corpus(30, 30)
    for speakers, warning in (([""] * 30, "no clip names"), (["s"] * 30, "1 speaker: ")):
        record = statistics.significance(ids, speakers, counts).bootstrap
        assert (record["unit"], record["units"]) == ("clip", 30)
        assert record["warning"].startswith(warning)
    some = statistics.significance(ids, ["a"] * 5 + ["b"] * 5 + [""] * 20, counts).bootstrap
    assert (some["unit"], some["units"]) == ("speaker", 22)
    assert some["warning"] == "20 of 30 clips name no speaker: each counts as one"


def test_a_single_clip_has_no_interval_and_nothing_is_distinguishable_on_it():
    found = statistics.significance(*corpus(1, 1, gain=0.0))
    assert found.intervals["base"]["raw"] == {"wer_interval": None, "cer_interval": None}
    assert (found.comparisons[0]["p"], found.comparisons[0]["distinguishable"]) == (1.0, False)


def test_10_000_clips_of_two_systems_take_less_than_5_seconds():
    ids, _, counts = corpus(10_000, 10_000)
    counts = {system: dict.fromkeys("abc", own["raw"]) for system, own in counts.items()}
    start = time.process_time()
    statistics.significance(ids, [""] * 10_000, counts)
    assert time.process_time() - start < 5.0, "1.8 s on one core"


def test_log_probabilities_that_rank_the_clips_by_errors_correlate_perfectly():
    words = [ErrorCounts(errors, reference_length=10) for errors in (0, 3, 9)]
    assert statistics.confidence_correlation([-0.1, -0.4, -2.0], words) == 1.0
    assert statistics.confidence_correlation([-2.0, -0.4, -0.1], words) == -1.0
    assert statistics.confidence_correlation([-0.1, None, -2.0], words) is None
    assert statistics.rank_correlation([1, 1, 2, 3], [1, 2, 2, 3]) == pytest.approx(0.833333), (
        "equal values share their mean rank: 1.5 1.5 3 4 and 1 2.5 2.5 4"
    )


def test_the_interval_that_training_logs_is_that_of_an_evaluation():
    counts = {"adapter": clip_counts([1, 0, 3, 1], [3, 2, 3, 1])}
    raw = counts["adapter"]["raw"]
    ids = ["1", "2", "3", "4"]
    for speakers in (["", "", "", ""], ["p", "p", "q", "r"]):
        expected = statistics.significance(ids, speakers, counts).intervals["adapter"]["raw"]
        pairs = [expected["wer_interval"], expected.get("wer_interval_clips")]
        lows, highs = zip(*(pair for pair in pairs if pair), strict=True)
        got = rate_interval(raw.words, ids, speakers)
        assert list(got) == [min(lows), max(highs)]
        assert got[0] < got[1]


def test_two_speakers_who_happen_to_be_alike_do_not_make_the_logged_interval_narrow():
    errors, ids = [9, 1, 9, 1], ["1", "2", "3", "4"]
    words = clip_counts(errors, [10, 10, 10, 10])["raw"].words
    low, high = rate_interval(words, ids, ["p", "p", "q", "q"])
    assert high - low > 20, "each speaker has 50 %"


@pytest.mark.parametrize("speakers", [5, 40])
def test_the_interval_of_a_difference_is_that_of_the_comparison(speakers):
    """Below 20 speakers it is as wide as that over speakers or that over clips."""
    ids, names, counts = corpus(200, speakers)
    words = [counts[system]["raw"].words for system in ("base", "adapter")]
    [comparison, _] = statistics.significance(ids, names, counts).comparisons
    bounds = [comparison["interval"], comparison.get("interval_clips", comparison["interval"])]
    widest = [min(low for low, _ in bounds), max(high for _, high in bounds)]
    assert difference_interval(*words, ids, names) == pytest.approx(widest)
