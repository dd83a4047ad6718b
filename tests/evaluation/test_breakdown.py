"""Where a system fails: groups that add up to the corpus, and confusions as a reader sees them."""

import pytest
from datasets import Dataset

from common.metrics import count_clips
from common.predictions import Prediction
from evaluation import breakdown, confusions

CLIPS = Dataset.from_dict(
    {
        "id": ["a", "b", "c", "d", "e"],
        "text": ["one two", "Three, four!", "one", "five six seven eight", "two two"],
        "seconds": [1.0, 2.0, 4.9, 12.0, 30.0],
        "language": ["sw", "sw", "mr", "mr", "mr"],
        "speaker": ["10", "9", "9", "", ""],
    }
)
LANGUAGES = CLIPS["language"]
SEEN = {"one", "two", "three", "four"}


def word_counts(hypotheses):
    return count_clips(CLIPS["text"], hypotheses, "word")


@pytest.fixture
def groups():
    perfect, empty = word_counts(CLIPS["text"]), word_counts([""] * 5)
    return breakdown.breakdown(CLIPS, LANGUAGES, SEEN, {"base": empty, "adapter": perfect})


def names(rows):
    return [row["group"] for row in rows]


def test_clips_are_grouped_by_duration_speaker_language_and_unseen_words(groups):
    base = groups["base"]
    assert names(base["duration"]) == ["0-2 s", "2-5 s", "10-20 s", "20-30 s"]
    assert names(base["speaker"]) == ["9", "10", "unknown"]
    assert names(base["language"]) == ["mr", "sw"]
    assert names(base["unseen_words"]) == ["0", "3 or more"]


def test_the_groups_of_a_kind_add_up_to_the_corpus(groups):
    for system, wer in (("base", 100.0), ("adapter", 0.0)):
        for rows in groups[system].values():
            assert sum(row["clips"] for row in rows) == 5
            assert sum(row["reference_words"] for row in rows) == 11
            assert {row["wer"] for row in rows} == {wer}


def test_a_group_of_one_clip_has_no_interval_and_a_speaker_has_one_over_clips(groups):
    rows = {row["group"]: row["wer_interval"] for row in groups["base"]["speaker"]}
    assert rows == {"10": None, "9": [100.0, 100.0], "unknown": [100.0, 100.0]}


def test_punctuation_and_capitals_make_no_unseen_word_nor_does_a_language_lower_differently():
    assert breakdown.unseen_groups(CLIPS.select([1]), ["sw"], SEEN) == ["0"]
    turkish = Dataset.from_dict({"text": ["IŞIK"]})
    assert breakdown.words_of(turkish, ["tr"]) == {"ışık"}
    assert breakdown.unseen_groups(turkish, ["tr"], {"ışık"}) == ["0"]


def test_without_speakers_or_training_clips_there_are_no_such_groups():
    alone = CLIPS.remove_columns("speaker").add_column("speaker", [""] * 5)
    found = breakdown.breakdown(alone, LANGUAGES, None, {"base": word_counts([""] * 5)})["base"]
    assert (found["speaker"], found["unseen_words"]) == ([], [])
    assert len(found["duration"]) == 4


def test_the_order_of_the_clips_does_not_count(groups):
    order = [3, 0, 4, 2, 1]
    empty = word_counts([""] * 5)
    found = breakdown.breakdown(
        CLIPS.select(order),
        [LANGUAGES[index] for index in order],
        SEEN,
        {"base": [empty[index] for index in order]},
    )
    assert found["base"] == groups["base"]


def confused(references, hypotheses, language="hi"):
    ids = [str(index) for index in range(len(references))]
    clips = Dataset.from_dict({"id": ids, "text": references})
    texts = {own: Prediction(own, text, False) for own, text in zip(ids, hypotheses, strict=True)}
    return confusions.confusions(clips, texts, [language] * len(ids))


def test_a_vowel_sign_is_never_split_from_its_consonant():
    found = confused(["की बात", "की"], ["कि बात", "कि"])
    pair = {"reference": "की", "hypothesis": "कि", "count": 2}
    assert found == {"words": [pair], "graphemes": [pair]}


def test_loops_do_not_fill_the_list_of_confusions():
    found = confused(["घर में"], ["घर मे" + " पर" * 40])
    assert sum(row["count"] for row in found["words"]) <= 2, "as many as the reference has words"


def test_the_most_frequent_confusions_come_first_and_equal_ones_by_their_text():
    found = confused(["a b c", "x b"], ["a d e", "y d"], "sw")["words"]
    assert [(row["reference"], row["hypothesis"], row["count"]) for row in found] == [
        ("b", "d", 2), ("c", "e", 1), ("x", "y", 1),
    ]  # fmt: skip


def test_a_language_without_spaces_has_confused_graphemes_but_no_words():
    found = confused(["我们去公园"], ["我们去花园"], "zh")
    assert found["words"] == []
    assert found["graphemes"] == [{"reference": "公", "hypothesis": "花", "count": 1}]
