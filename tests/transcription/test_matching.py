"""A transcript beside what was recognized: pairs of letters, cuts at pauses, what is left out."""

import itertools
import random
import time

import pytest

from transcription import matching, text_clips
from transcription.matching import letters, pair_letters, read_words
from transcription.text_clips import Speech, cut_clips

ALPHABETS = {
    "mr": "कखगघचछजझटठडतथदधनपफबभमयरलवशसहािीुूेो",
    "en": "abcdefghijklmnopqrstuvwxyz",
    "ar": "ابتثجحخدذرزسشصضطظعغفقكلمنهوي",
    "zh": "".join(map(chr, range(0x4E00, 0x4E00 + 400))),
}


# ------ letters


def plain_path(hypothesis, reference):
    """The value of the best path as a textbook computes it."""
    rows, columns = len(hypothesis), len(reference)
    paired = [[matching.LOW] * (columns + 1) for _ in range(rows + 1)]
    skipping = [[matching.LOW] * (columns + 1) for _ in range(rows + 1)]
    for row, column in itertools.product(range(rows + 1), range(columns + 1)):
        ways, skips = [] if row or column else [0], []
        if row and column:
            is_equal = hypothesis[row - 1] == reference[column - 1]
            worth = matching.MATCH if is_equal else matching.ERROR
            ways.append(paired[row - 1][column - 1] + worth)
        if row:
            ways.append(paired[row - 1][column] + matching.ERROR)
            skips.append(skipping[row - 1][column])
        if column:
            ways.append(paired[row][column - 1] + matching.ERROR)
            skips.append(skipping[row][column - 1])
        skipping[row][column] = max([max(ways) + matching.SKIP, *skips])
        paired[row][column] = max([*ways, skipping[row][column]])
    return paired[rows][columns]


def worth(pairs, hypothesis, reference):
    """The value of the best path that pairs these equal letters and no others."""
    total, before = 0, (-1, -1)
    for pair in [*pairs, (len(hypothesis), len(reference))]:
        longer = max(new - old - 1 for new, old in zip(pair, before, strict=True))
        total += max(matching.ERROR * longer, matching.SKIP)
        total += matching.MATCH * (pair[0] < len(hypothesis))
        before = pair
    return total


@pytest.mark.parametrize("seed", range(20))
def test_the_path_is_the_best_and_its_pairs_are_equal_letters_in_order(seed):
    rng = random.Random(seed)
    alphabet = "abcd" if seed % 2 else ALPHABETS["en"]
    reference = "".join(rng.choices(alphabet, k=rng.randrange(60)))
    hypothesis = noisy(reference, rng, alphabet, share=0.3)
    if seed % 3 == 0:  # a paragraph that is not in the transcript
        cut = rng.randrange(len(hypothesis) + 1)
        hypothesis = hypothesis[:cut] + "".join(rng.choices(alphabet, k=40)) + hypothesis[cut:]
    pairs = pair_letters(hypothesis, reference).tolist()
    assert all(hypothesis[row] == reference[column] for row, column in pairs)
    assert all(a < c and b < d for (a, b), (c, d) in itertools.pairwise(pairs))
    assert worth(pairs, hypothesis, reference) == plain_path(hypothesis, reference)


def noisy(text, rng, alphabet, *, share):
    """A text in which a share of the letters is replaced, left out or doubled."""
    made = []
    for letter in text:
        change = rng.choice(("", rng.choice(alphabet), letter + rng.choice(alphabet)))
        made.append(change if rng.random() < share else letter)
    return "".join(made)


def test_a_long_text_is_divided_at_runs_that_are_once_in_both(monkeypatch):
    """And its pairs are nearly those of the whole."""
    rng = random.Random(0)
    reference = "".join(rng.choices(ALPHABETS["mr"], k=2_000))
    hypothesis = noisy(reference[:900] + reference[1_200:], rng, ALPHABETS["mr"], share=0.3)
    whole = {tuple(pair) for pair in pair_letters(hypothesis, reference).tolist()}
    monkeypatch.setattr(matching, "MAX_CELLS", 200_000)
    divided = {tuple(pair) for pair in pair_letters(hypothesis, reference).tolist()}
    assert len(whole & divided) > 0.99 * len(whole)
    assert not any(900 <= column < 1_200 for _, column in divided)


def test_long_texts_without_anything_in_common_have_no_pairs(monkeypatch):
    monkeypatch.setattr(matching, "MAX_CELLS", 10_000)
    rng = random.Random(0)
    texts = ["".join(rng.choices(ALPHABETS["mr"], k=2_000)) for _ in range(2)]
    assert pair_letters(*texts).shape == (0, 2)
    assert pair_letters("", texts[0]).shape == (0, 2)


# ------ words of a transcript


@pytest.mark.parametrize(
    ("text", "language", "parts"),
    [
        ("नमस्कार, १,५००  रुपये !\n“हो” – नाही।", "mr",
         ["नमस्कार,", "१,५००", "रुपये !", "“हो” –", "नाही।"]),
        ("He left.\n— Why?\n\n( A dog )", "en", ["He", "left.", "— Why?", "( A", "dog )"]),
        ("قال: «نعم»، ثم ذهب.", "ar", ["قال:", "«نعم»،", "ثم", "ذهب."]),
        ("2024年，他说：「好」。", "zh", ["2024", "年，", "他", "说：", "「好」。"]),
        ("*** — 5 % —", "en", ["*** — 5 % —"]),
    ],
)  # fmt: skip
def test_words_keep_their_signs_and_their_spelling(text, language, parts):
    transcript = read_words(text, language)
    made = [transcript.part(index, index + 1) for index in range(len(transcript.words))]
    assert made == parts
    assert all(transcript.words) and "".join(transcript.words) == letters(text, language)
    lines = transcript.part(0, len(transcript.words))
    assert "".join(lines.split()) == "".join(text.split())


def test_the_end_of_a_sentence_or_a_line_is_seen():
    transcript = read_words("वह गया। «क्यों?»\nपता नहीं 3.5 दिन", "hi")
    ends = [transcript.ends_sentence(index) for index in range(len(transcript.words) + 1)]
    assert ends == [True, False, True, True, False, False, False, True]


# ------ clips


@pytest.fixture(scope="module")
def paragraphs():
    """Eight paragraphs of six sentences of five to twelve words of two to eight letters."""
    rng = random.Random(1)
    lexicon = ["".join(rng.choices(ALPHABETS["mr"], k=rng.randrange(2, 9))) for _ in range(700)]
    sentence = lambda: rng.choices(lexicon, k=rng.randrange(5, 13))  # noqa: E731
    return [[sentence() for _ in range(6)] for _ in range(8)]


def speak(sentences, *, errors=0.0, seed=0):
    """Stretches of two to six words, with a share of wrong words; and the words of each."""
    rng, alphabet = random.Random(seed), ALPHABETS["mr"]
    speech, spoken, now = [], [], 0.0
    for sentence in sentences:
        words = list(sentence)
        while words:
            size = rng.randrange(2, 7)
            own, words = words[:size], words[size:]
            heard = [wrong(word, rng, alphabet) if rng.random() < errors else word for word in own]
            end = now + 0.4 * len(own)
            speech.append(Speech(now, end, "".join(heard)))
            spoken.append(own)
            now = end + 0.7
    return speech, spoken


def wrong(word, rng, alphabet):
    """A word as a weak model has it: left out, another one, or with some of its letters."""
    kind = rng.random()
    if kind < 0.1:
        return ""
    if kind < 0.2:
        return "".join(rng.choices(alphabet, k=len(word)))
    return noisy(word, rng, alphabet, share=0.5)


def written(paragraphs):
    return read_words("\n".join(" ".join(words) + "." for part in paragraphs for words in part), "")


def flat(paragraphs):
    return [sentence for paragraph in paragraphs for sentence in paragraph]


def judge(speech, spoken, transcript, known, *, min_match=0.5):
    """The share of the known words that clips have, and the shares of wrong and missing words.

    Args:
        known: spoken words that are also in the transcript, in number.
    """
    cut = cut_clips(speech, transcript, min_match=min_match)
    right = wrong_words = lacking = 0
    for clip in cut.clips:
        true = list(itertools.chain(*spoken[clip.first : clip.end]))
        given = transcript.words[clip.first_word : clip.end_word]
        common = sum(min(true.count(word), given.count(word)) for word in set(given))
        right += common
        wrong_words += len(given) - common
        lacking += len(true) - common
    used = [index for clip in cut.clips for index in range(clip.first, clip.end)]
    left_out = list(itertools.chain(*cut.left_out.values()))
    assert sorted(used + left_out) == list(range(len(speech))), "each stretch is counted once"
    ends = [limit for clip in cut.clips for limit in (clip.first_word, clip.end_word)]
    assert ends == sorted(ends), "no word is given twice"
    return right / known, wrong_words / max(right, 1), lacking / max(right, 1)


def num_words(sentences):
    return sum(map(len, sentences))


def test_a_transcript_of_all_that_was_said_gives_clips_of_two_seconds_without_an_error(paragraphs):
    speech, spoken = speak(flat(paragraphs))
    known = num_words(flat(paragraphs))
    assert judge(speech, spoken, written(paragraphs), known) == (1.0, 0.0, 0.0)
    cut = cut_clips(speech, written(paragraphs), min_match=0.5)
    assert all(clip.match == 1.0 for clip in cut.clips)
    for clip in cut.clips[:-1]:  # each ends at the first pause after two seconds
        assert speech[clip.end - 1].end - speech[clip.first].start >= 2.0
        before = speech[max(clip.end - 2, clip.first)].end
        assert clip.end - clip.first == 1 or before - speech[clip.first].start < 2.0


CASES = {  # paragraphs that are spoken, and written
    "a paragraph not written": (range(8), (0, 1, 2, 4, 5, 6, 7)),
    "a paragraph not spoken": ((0, 1, 2, 4, 5, 6, 7), range(8)),
    "two paragraphs swapped": (range(8), (0, 1, 2, 4, 3, 5, 6, 7)),
    "the first and the last not spoken": (range(1, 7), range(8)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("errors", [0.0, 0.4, 0.7])
def test_what_is_on_one_side_only_is_left_out_and_nothing_is_given_to_other_speech(
    paragraphs, case, errors
):
    spoken_parts, written_parts = CASES[case]
    sentences = flat(paragraphs[index] for index in spoken_parts)
    speech, spoken = speak(sentences, errors=errors)
    both = [index for index in spoken_parts if index in written_parts]
    both = both[:-1] if "swapped" in case else both  # one of the two can be had
    known = num_words(flat(paragraphs[index] for index in both))
    transcript = written([paragraphs[index] for index in written_parts])
    recovered, wrong_share, lacking = judge(speech, spoken, transcript, known)
    figures = f"{recovered:.3f} recovered, {wrong_share:.4f} wrong, {lacking:.4f} lacking"
    assert recovered >= {0.0: 0.95, 0.4: 0.8, 0.7: 0.6}[errors], figures
    assert wrong_share <= 0.005 and lacking <= 0.01, figures


@pytest.mark.parametrize("errors", [0.0, 0.7])
def test_a_text_of_other_speech_gives_no_clips(paragraphs, errors):
    speech, _ = speak(flat(paragraphs[:4]), errors=errors)
    cut = cut_clips(speech, written(paragraphs[4:]), min_match=0.5)
    assert not cut.clips
    assert sum(map(len, cut.left_out.values())) == len(speech)


def test_a_recording_without_speech_or_without_a_recognized_word_gives_no_clips(paragraphs):
    assert cut_clips([], written(paragraphs), min_match=0.5) == text_clips.Cut()
    speech = [Speech(0.0, 2.0, ""), Speech(3.0, 5.0, "")]
    cut = cut_clips(speech, written(paragraphs), min_match=0.5)
    assert cut == text_clips.Cut([], {text_clips.NO_TEXT: [0, 1]})


def test_shuffled_paragraphs_are_left_out(paragraphs):
    """What is in the order of the recording is kept."""
    order = [3, 0, 6, 1, 7, 4, 2, 5]
    speech, spoken = speak(flat(paragraphs), errors=0.4)
    known = num_words(flat(paragraphs))
    transcript = written([paragraphs[index] for index in order])
    recovered, wrong_share, lacking = judge(speech, spoken, transcript, known)
    assert 0.25 <= recovered <= 0.6, recovered
    assert wrong_share <= 0.005 and lacking <= 0.01, (wrong_share, lacking)


def test_words_that_were_not_recognized_at_a_cut_keep_its_stretches_together():
    transcript = read_words("one two three four five six seven eight nine ten", "en")
    heard = ("onetwothree", "fiveseveneight", "nineten")
    speech = [Speech(3.0 * index, 3.0 * index + 2.5, own) for index, own in enumerate(heard)]
    cut = cut_clips(speech, transcript, min_match=0.5)
    assert [(clip.first, clip.end, clip.first_word, clip.end_word) for clip in cut.clips] == [
        (0, 2, 0, 8), (2, 3, 8, 10),
    ]  # fmt: skip
    long = [Speech(20.0 * index, 20.0 * index + 18, own) for index, own in enumerate(heard)]
    cut = cut_clips(long, transcript, min_match=0.5)
    assert [(clip.first, clip.end) for clip in cut.clips] == [(2, 3)]
    assert cut.left_out == {text_clips.NO_CUT: [0, 1]}


def test_a_clip_that_has_words_more_or_less_than_its_text_is_left_out():
    text = "the farmer shut the gate and went to the market with his two brown horses"
    transcript = read_words(text, "en")
    for heard in ("thefarmershutthegatewithhistwobrownhorses", letters(text + text[:20], "en")):
        cut = cut_clips([Speech(0.0, 5.0, heard)], transcript, min_match=0.3)
        assert not cut.clips and list(cut.left_out.values()) == [[0]], cut


def test_languages_without_spaces_are_cut_between_letters():
    text = "今天天气很好，我们去公园。\n他说「好」，明天是2024年。"
    transcript = read_words(text, "zh")
    heard = ("今天天汽很好", "我们去公圆", "他说好", "明天是2024年")
    speech = [Speech(3.0 * index, 3.0 * index + 2.5, own) for index, own in enumerate(heard)]
    cut = cut_clips(speech, transcript, min_match=0.5)
    parts = [transcript.part(clip.first_word, clip.end_word) for clip in cut.clips]
    assert "".join(parts) == text.replace("\n", "")
    assert len(parts) >= 3 and parts[0] == "今天天气很好，"


def test_a_long_recording_takes_seconds():
    """15 minutes, of which a third of the words is wrong; a whole table would be 200 MB."""
    rng = random.Random(0)
    sentences = [
        ["".join(rng.choices(ALPHABETS["mr"], k=rng.randrange(2, 9))) for _ in range(10)]
        for _ in range(250)
    ]
    speech, spoken = speak(sentences, errors=0.33)
    start = time.process_time()
    recovered, wrong_share, _ = judge(speech, spoken, written([sentences]), 2_500)
    assert recovered > 0.8 and wrong_share < 0.005, (recovered, wrong_share)
    assert time.process_time() - start < 20  # one or two on a free core
