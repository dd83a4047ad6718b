"""Scores: what each normaliser keeps, and counts that are of the corpus."""

import itertools
import json
import subprocess
import sys

import pytest
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from common import metrics
from common.error_rate import ErrorRate

TABLE = [  # text, keep_marks, whisper_basic
    ("नमस्कार, कसं काय?", "नमस्कार कसं काय", "नमस क र कस क य"),
    ("हिंदी । मराठी", "हिंदी मराठी", "ह द मर ठ"),
    ("สวัสดี ครับ!", "สวัสดี ครับ", "สว สด คร บ"),
    ("السَّلامُ عليكم؟", "السَّلامُ عليكم", "الس لام عليكم"),
    ("Hello, World! It's 5%", "hello world it s 5", "hello world it s 5"),
    ("  two\t spaces\n", "two spaces", "two spaces"),
]


@pytest.mark.parametrize(("text", "kept", "basic"), TABLE)
def test_normalisers_on_scripts(text, kept, basic):
    assert metrics.keep_marks(text) == kept
    assert metrics.whisper_basic(text) == basic
    assert metrics.raw(text) == " ".join(text.split())


def test_only_the_mark_keeping_normaliser_sees_a_wrong_vowel_sign():
    pair = {"references": ["की"], "predictions": ["का"]}
    assert ErrorRate("keep_marks").compute(**pair)["wer"] == 100.0
    assert ErrorRate("whisper_basic").compute(**pair)["wer"] == 0.0, "it flatters"


def test_composed_and_decomposed_spellings_are_one_text():
    assert metrics.keep_marks("\u0915\u093c") == metrics.keep_marks("\u0958")
    assert metrics.keep_marks("e\u0301") == metrics.keep_marks("\u00e9")


SAME = [  # language, reference and what differs in nothing that is heard
    ("tr", "İstanbul İyi bir şehir", "istanbul iyi bir şehir"),
    ("tr", "IŞIK Irmak DİYARBAKIR", "ışık ırmak diyarbakır"),
    ("az", "BAKI", "bakı"),
    ("az", "I\u0307sti", "isti"),
    ("en", "İstanbul IS BIG", "istanbul is big"),
    ("zh", "今天天气很好，我们去公园吧。", "今天天气很好我们去公园吧"),
    ("yue", "今日天氣 好好", "今日天氣好好。"),
    ("ja", "東京 は 日本の首都 です", "東京は日本の首都です"),
    ("th", "สวัสดี ครับ", "สวัสดีครับ"),
    ("lo", "ສະ ບາຍ ດີ", "ສະບາຍດີ"),
    ("my", "မင်္ဂလာ ပါ", "မင်္ဂလာပါ"),
    ("he", "\u200fשלום עולם\u200f", "שלום עולם"),
    ("ar", "\u061cسلام\u202a عليكم\u202c", "سلام عليكم"),
    ("ar", "كـــتاب", "كتاب"),
    ("en", "\ufeffhello co\u00adoperate", "hello cooperate"),
    ("en", "un\u2060able e\u034f\u0301t\u200bé", "unable été"),
    ("en", "good \u2764\ufe0f day", "good day"),
    ("en", "a \U0001f469\u200d\u2695\ufe0f doctor", "a doctor"),
    ("de", "Auf\u200clage", "Auflage"),
    ("hi", "हिंदी\u200d मराठी\u200e", "हिंदी मराठी"),
]


@pytest.mark.parametrize(("language", "reference", "hypothesis"), SAME)
def test_what_cannot_be_heard_costs_nothing_when_marks_are_kept(language, reference, hypothesis):
    metric = ErrorRate("keep_marks", languages=[language])
    for pair in ((reference, hypothesis), (hypothesis, reference)):
        found = metric.compute(references=[pair[0]], predictions=[pair[1]])
        assert (found["wer"], found["cer"]) == (0.0, 0.0)
    raw = ErrorRate("raw", languages=[language])
    assert raw.compute(references=[reference], predictions=[hypothesis])["wer"] > 0


DIFFERENT = [  # joiners that are part of the spelling
    ("fa", "می\u200cخواهم", "میخواهم"),
    ("mr", "दर\u094d\u200dया", "दर\u094dया"),
    ("hi", "क\u094d\u200cष", "क\u094dष"),
    ("bn", "র\u200d\u09cdয", "র\u09cdয"),
    ("tr", "ılık", "ilik"),
    ("zh", "今天", "明天"),
]


@pytest.mark.parametrize(("language", "reference", "hypothesis"), DIFFERENT)
def test_what_is_spelt_otherwise_still_costs(language, reference, hypothesis):
    metric = ErrorRate("keep_marks", languages=[language])
    assert metric.compute(references=[reference], predictions=[hypothesis])["wer"] > 0


def test_languages_without_spaces_are_scored_by_letter_and_the_result_says_so():
    texts = {"references": ["我们去公园吧", "we go out"], "predictions": ["我们去花园吧", "we go"]}
    raw = ErrorRate("raw", languages=["zh", "en"]).compute(**texts)
    assert (raw["unit"], raw["words"]["reference_length"], raw["wer"]) == ("word", 4, 50.0)
    for name in metrics.BY_LETTER:
        mixed = ErrorRate(name, languages=["zh", "en"]).compute(**texts)
        assert mixed["unit"] == "word; letter in zh"
        assert mixed["words"]["reference_length"] == 6 + 3
        assert mixed["words"]["substitutions"] == mixed["words"]["deletions"] == 1
        assert mixed["characters"]["reference_length"] == 6 + 9, "no spaces between letters"
        one = {key: texts[key][:1] for key in texts}
        assert ErrorRate(name, languages=["zh"]).compute(**one)["unit"] == "letter"
        assert ErrorRate(name, languages=["zh"]).compute(**one)["wer"] == 100 / 6


@pytest.mark.parametrize("language", metrics.LETTER_LANGUAGES)
def test_letters_are_those_of_openais_own_split(language):
    text = "今天 天气, สวัสดี ครับ! မင်္ဂလာ ສະບາຍດີ abc"
    assert (
        metrics.whisper_basic(text, language)
        == BasicTextNormalizer(split_letters=True)(text).strip()
    )
    assert metrics.keep_marks("สวัสดี", language) == "ส วั ส ดี", "vowel signs stay at their letters"


def test_english_normaliser_knows_numbers_contractions_and_a_spelling_table():
    text = "Mr. Neil can't pay twenty-one dollars for colour"
    expected = "mister neil can not pay $21 for color"
    assert metrics.whisper_english(text, {"colour": "color"}) == expected
    metric = ErrorRate("whisper_english", spelling={"colour": "color"})
    assert metric.compute(references=["a colour"], predictions=["A color!"])["wer"] == 0.0


def test_the_english_normaliser_is_reported_for_english_alone():
    assert "whisper_english" in metrics.normalisers_for(["en", "en"])
    assert "whisper_english" not in metrics.normalisers_for(["en", "mr"])
    assert len(metrics.NORMALISERS) == 5


def test_turkish_capitals_cost_nothing_but_under_openais_own_normaliser():
    pair = {"references": ["İstanbul IŞIK"], "predictions": ["istanbul ışık"]}
    for languages in (["tr"], ["az"], None):  # without a language ı and İ show it
        basic = ErrorRate("whisper_basic", languages=languages).compute(**pair)
        assert (basic["wer"], basic["cer"]) == (0.0, 0.0)
        assert ErrorRate("whisper_openai", languages=languages).compute(**pair)["wer"] > 0
    assert metrics.whisper_basic("I\u0307zmir", "tr") == "izmir"
    for text in ("İstanbul'da IŞIK", "Ilık, süt!", "हिंदी"):
        assert metrics.whisper_openai(text, "tr") == " ".join(BasicTextNormalizer()(text).split())
        assert metrics.whisper_basic(text, "en") == metrics.whisper_openai(text, "en")
    assert "whisper_openai" in metrics.normalisers_for(["tr", "de"])
    assert "whisper_openai" not in metrics.normalisers_for(["hi", "de"])


@pytest.mark.parametrize(("language", "reference", "hypothesis"), SAME)
def test_without_a_language_the_writing_system_decides(language, reference, hypothesis):
    if language == "az":
        pytest.skip("I alone is no sign of a language")
    for name in (
        ("keep_marks", "whisper_basic") if language in "zh ja th lo my" else ("keep_marks",)
    ):
        metric = ErrorRate(name)
        assert metric.compute(references=[reference], predictions=[hypothesis])["wer"] == 0.0


def test_counts_equal_the_least_number_of_edits_found_by_trying_all():
    def distance(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(
            distance(a[1:], b[1:]) + (a[0] != b[0]),
            distance(a[1:], b) + 1,
            distance(a, b[1:]) + 1,
        )

    texts = [" ".join(words) for n in range(4) for words in itertools.product("ab", repeat=n)]
    for reference, hypothesis in itertools.product(texts, texts):
        counts = metrics.count_errors(reference, hypothesis, "word")
        assert counts.errors == distance(reference.split(), hypothesis.split())
        length = len(hypothesis.split())
        assert counts.reference_length + counts.insertions - counts.deletions == length


def test_a_corpus_rate_is_errors_over_words_and_no_mean_of_rates():
    references, predictions = ["a b c d e f g h i", "a"], ["a b c d e f g h i", "b"]
    result = ErrorRate("raw").compute(references=references, predictions=predictions)
    assert result["wer"] == 10.0, "the mean of the clips' rates would be 50"
    assert result["words"] == {
        "substitutions": 1,
        "deletions": 0,
        "insertions": 0,
        "reference_length": 10,
    }


def test_an_empty_reference_counts_its_insertions():
    result = ErrorRate("raw").compute(references=["", "a"], predictions=["x y", "a"])
    assert result["words"]["insertions"] == 2
    assert result["wer"] == 200.0


def test_metrics_have_the_same_counts_as_the_plain_functions():
    references, predictions = ["एक दोन तीन"], ["एक तीन तीन चार"]
    result = ErrorRate("raw").compute(references=references, predictions=predictions)
    counts = sum(metrics.count_clips(references, predictions, "char"), metrics.ErrorCounts())
    assert result["cer"] == counts.rate
    assert json.loads(json.dumps(result)) == result


def test_metrics_import_no_torch_of_their_own():
    code = "import sys, common.metrics; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
