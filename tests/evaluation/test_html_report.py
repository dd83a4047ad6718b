"""report.html: complete in one file, readable by everyone, and other people's texts stay texts."""

import base64
import html
import html.parser
import io
import json
import re

import browser
import numpy as np
import pytest
import soundfile
import tiny
from datasets import Dataset

from common import metrics
from common.audio import encode_flac
from evaluation import charts, diff, html_report, voices

ATTACK = "<script>document.title = 'run'</script><img src=http://127.0.0.1:9/x onerror=run()>"
TEXTS = [  # id, reference, base, adapter
    ("one", "एक दोन तीन चार", "एक दोन तीन", "एक दोन तीन चार"),
    ("two", "मेढक घर", "मेंढक घर", "मेढक पाणी नदी"),
    ("three", "घर", "घर " * 14, "घर"),
    ("four", "پانی کہاں ہے", "पानी कहाँ है", "پانی کہاں"),
    ('<b>"five"&', ATTACK, ATTACK, f"{ATTACK} more"),
]
LOOPING = "three"
MORE = [(f"clip {number:03d}", "घर " * (number % 7 + 1), "घर", "घर नदी") for number in range(150)]
MARKUP_BYTES = 335  # of a clip at most, besides its texts


def rates(wer):
    words = {"substitutions": 1, "deletions": 2, "insertions": 3, "reference_length": 13}
    return {"unit": "word", "wer": wer, "cer": wer / 2, "words": words, "characters": words}


def system(wer):
    group = {"group": "0-2 s", "clips": 1, "reference_words": 4, "wer": wer, "wer_interval": None}
    return {
        "clips": len(TEXTS), "clips_at_cap": 1, "clips_decoded_again": 2, "window": "natural",
        "breakdown": {"duration": [group]},
        "wall_seconds": 1.0, "normalisers": {"raw": rates(wer), "keep_marks": rates(wer + 1)},
    }  # fmt: skip


RESULTS = {
    "base": system(164.7),
    "adapter": system(68.7),
    "recipe": {
        "config": {
            "model": "/somewhere/whisper-tiny", "split": "test", "context": "auto",
            "num_beams": 1, "precision": "fp32", "output_dir": "/somewhere/wer",
        },
        "versions": {"torch": "2.13.0"},
        "commit": "abc",
    },
}  # fmt: skip


def with_statistics():
    """The same results with intervals, comparisons, groups and confusions."""
    results = json.loads(json.dumps(RESULTS))
    for name in ("base", "adapter"):
        results[name]["normalisers"]["raw"] |= {
            "wer_interval": [60.1, 77.5], "cer_interval": [30.0, 40.0]
        }  # fmt: skip
        group = {"clips": 2, "reference_words": 6, "wer": 50.0, "wer_interval": [40.0, 61.0]}
        results[name]["breakdown"] = {
            "duration": [{"group": "0-2 s"} | group], "speaker": [{"group": "ravi"} | group],
        }  # fmt: skip
        pair = {"reference": "मेढक", "hypothesis": "मेंढक", "count": 7}
        results[name]["confusions"] = {"words": [pair], "graphemes": [pair]}
    compared = {
        "systems": ["base", "adapter"], "normaliser": "raw", "rate": "wer", "difference": -96.0,
        "interval": [-110.0, 1.0], "p": 0.06, "distinguishable": False,
    }  # fmt: skip
    results["comparisons"] = [compared]
    results["bootstrap"] = {
        "replicas": 10000, "seed": 0, "unit": "speaker", "units": 3, "warning": "Only 3 speakers."
    }  # fmt: skip
    return results


PANEL = [  # id, kind, reference, what is written in all four ways
    ("silence (1)", "silence", "", ("", "शुक्रिया", "", "")),
    ("clicks (1)", "clicks", "", ("", "", "", "...")),
    ("music (1)", "music", "", ("", "ला " * 12, "", ATTACK)),
    ("padded (1)", "padded", "एक दोन", ("एक दोन", "एक दोन", "एक दोन तीन", "एक")),
]
WAYS = ("base_natural", "base_full", "adapter_natural", "adapter_full")


def with_panel():
    """The same results with what the systems made up; the rows of nonspeech.jsonl."""
    results, panel = with_statistics(), []
    counts = {
        "clips": 1, "clips_with_words": 1, "words": 9, "words_per_minute": 108.4,
        "repeated_ngrams": 0, "compression_ratio": None,
    }  # fmt: skip
    kinds = [
        counts | {"kind": kind, "speech": bool(text), "left_out": 0} for _, kind, text, _ in PANEL
    ] + [counts | {"kind": "pauses", "speech": False, "clips": 0, "left_out": 2}]
    kinds[3]["reference_words_per_minute"] = 60.2
    for name in ("base", "adapter"):
        rates = counts | {"clips": 3, "kinds": kinds}
        results[name]["nonspeech"] = {"natural": rates, "full": rates}
    for name, kind, text, written in PANEL:
        row = {"id": name, "kind": kind, "text": text, "seconds": 5.0, "language": "mr"}
        for way, own in zip(WAYS, written, strict=True):
            invented = own not in ("", "...") and own not in text
            row |= {way: own, f"{way}_loops": own.count("ला") > 3, f"{way}_invented": invented}
        panel.append(row)
    return results, panel


def rows(texts=TEXTS):
    made = []
    for number, (name, text, base, adapter) in enumerate(texts):
        row = {"id": name, "text": text, "seconds": 1.0 + number, "language": "mr"}
        for key, written in (("base", base), ("adapter", adapter)):
            row |= {key: written, f"{key}_hit_cap": False, f"{key}_decoded_again": False}
            row[f"{key}_loops"] = (name, key) == (LOOPING, "base")
        made.append(row)
    return made


def write(folder, results=RESULTS, clips=None, audio_mb=0.0, run=(), panel=None):
    """Write a report of an evaluation; its text and what was printed."""
    clips = rows() if clips is None else clips
    (folder / "wer").mkdir(parents=True)
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text("".join(f"{line}\n" for line in run))
    (folder / "wer" / "wer.json").write_text(json.dumps(results))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in clips)
    (folder / "wer" / "predictions.jsonl").write_text(lines, encoding="utf-8")
    flac = [encode_flac(tiny.tone(1.0, pitch=200.0, seed=seed)) for seed in range(len(clips))]
    dataset = Dataset.from_dict({"id": [row["id"] for row in clips], "audio": flac})
    adapters = {"base": "", "adapter": str(folder / "run" / "adapter")}
    sounds = None
    if panel:
        content = "".join(json.dumps(row) + "\n" for row in panel)
        (folder / "wer" / "nonspeech.jsonl").write_text(content)
        sounds = Dataset.from_dict({"id": [row["id"] for row in panel], "audio": flac[:4]})
    printed = html_report.write_report(
        folder / "wer", dataset, adapters=adapters, audio_mb=audio_mb, panel=sounds
    )
    return (folder / "wer" / "report.html").read_text(encoding="utf-8"), printed


class Elements(html.parser.HTMLParser):
    """All elements of a page with their attributes."""

    def __init__(self, page):
        super().__init__()
        self.all = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.all.append((tag, dict(attrs)))


# ------ content


def test_the_report_shows_rates_intervals_and_whether_a_difference_is_distinguishable(tmp_path):
    page, printed = write(tmp_path, with_statistics())
    assert printed.splitlines() == [
        "raw WER: base 164.7 [60.1, 77.5], adapter 68.7 [60.1, 77.5]",
        f"report {(tmp_path / 'wer' / 'report.html').as_uri()}",
    ]
    text = " ".join(re.sub(r"<[^>]*>", "", page).split())
    for shown in (
        "68.7 [60.1, 77.5]", "adapter less base: −96.0 points [−110.0, 1.0], p = 0.06: not "
        "distinguishable on 5 clips", "10,000 replicas of 3 speakers. Only 3 speakers.",
        "1 + 2 + 3 of 13", "ravi", "Most confused words of adapter",
    ):  # fmt: skip
        assert shown in text, shown


def test_the_report_is_written_from_results_without_statistics_too(tmp_path):
    page, printed = write(tmp_path)
    assert printed.startswith("raw WER: base 164.7, adapter 68.7\n")
    assert "Raw WER by length of the clip" in page
    assert "95 % intervals" not in page


@pytest.mark.parametrize("names", [["base"], ["base", "adapter_1", "adapter_2"]])
def test_any_number_of_systems_is_shown(tmp_path, names):
    results = {name: system(50.0 + number) for number, name in enumerate(names)}
    clips = []
    for row in rows():
        for name in names:
            row |= {name: row["base"], f"{name}_logprob": -0.5 if name == "base" else None}
            row |= {f"{name}_hit_cap": False, f"{name}_decoded_again": False}
            row[f"{name}_loops"] = row["base_loops"]
        clips.append(row)
    page, printed = write(tmp_path, results | {"recipe": RESULTS["recipe"]}, clips)
    assert all(f"WER {name}" in page for name in names)
    assert printed.count(", adapter_") == len(names) - 1
    assert ("a dot a clip" in page) == (len(names) > 1)


def test_the_page_says_whether_log_probability_tells_which_clips_to_listen_to(tmp_path):
    results = with_statistics()
    results["base"]["logprob_error_correlation"] = -0.411527
    results["adapter"]["logprob_error_correlation"] = 0.509476
    clips = [row | {"adapter_logprob": -0.5, "base_logprob": -0.2} for row in rows()]
    page, _ = write(tmp_path / "known", results, clips)
    assert "with the WER of a clip: base −0.41, adapter +0.51." in page
    results["base"]["logprob_error_correlation"] = None
    page, _ = write(tmp_path / "alike", results, clips)
    assert "with the WER of a clip: adapter +0.51." in page


def test_the_curves_of_the_run_beside_the_adapter_are_drawn(tmp_path):
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}]
    page, _ = write(tmp_path / "run", run=map(json.dumps, lines))
    assert "Training of adapter" in page
    assert page.count("<polyline") == 2
    damaged, _ = write(tmp_path / "damaged", run=['{"step": 1, "lo'])
    assert "metrics.jsonl beside it cannot be read" in damaged
    none, _ = write(tmp_path / "none")
    assert "polyline" not in re.sub(r"<style>.*?</style>", "", none, flags=re.S)


def test_a_curve_skips_what_is_not_finite_and_is_thinned():
    records = [{"step": step, "loss": float("nan") if step == 5 else 1.0} for step in range(1000)]
    assert (5.0, 1.0) not in charts.points(records, "loss")
    assert 0 < len(charts.points(records, "loss")) <= charts.MOST_POINTS


def test_the_same_results_give_the_same_bytes_in_any_folder(tmp_path):
    first, _ = write(tmp_path / "first", with_statistics(), audio_mb=1.0)
    moved = with_statistics()
    moved["recipe"]["config"] |= {"model": "/elsewhere/whisper-tiny", "output_dir": "other"}
    moved["base"]["wall_seconds"] = 2.0
    second, _ = write(tmp_path / "second", moved, audio_mb=1.0)
    assert first == second
    assert "data:audio/ogg" in first


def test_what_others_wrote_is_escaped_wherever_it_stands(tmp_path):
    results = with_statistics()
    pair = {"reference": ATTACK, "hypothesis": '"><script>', "count": 1}
    results["adapter"]["confusions"]["words"] = [pair]
    results["adapter"]["breakdown"]["speaker"][0]["group"] = ATTACK
    results["recipe"]["config"]["model"] = ATTACK
    page, _ = write(tmp_path, results)
    elements = Elements(page).all
    assert sum(tag == "script" for tag, _ in elements) == 2
    assert not [tag for tag, _ in elements if tag in ("img", "iframe", "object", "form")]
    handlers = {name for _, attributes in elements for name in attributes if name[:2] == "on"}
    assert not handlers
    assert not [attributes for _, attributes in elements if "style" in attributes]


def test_no_address_is_on_the_page(tmp_path):
    page, _ = write(tmp_path, with_statistics(), audio_mb=1.0)
    for _, attributes in Elements(page).all:
        for name in ("src", "href"):
            if name in attributes:
                assert attributes[name].startswith(("#", "data:")), attributes
    metas = [attributes for tag, attributes in Elements(page).all if tag == "meta"]
    (policy,) = [meta["content"] for meta in metas if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "http" not in policy


def test_the_report_shows_what_was_made_up_by_kind_window_and_system(tmp_path):
    results, panel = with_panel()
    page, _ = write(tmp_path / "panel", results, panel=panel)
    section = page[page.index("What it makes up") :]
    section = section[: section.index("</section>")]
    text = " ".join(re.sub(r"<[^>]*>", " ", section).split())
    for shown in (
        "base, natural base, full adapter, natural adapter, full",
        "silence 1 of 1 , 108/min 1 of 1",
        "pauses 2 left out: the scored clips hold none", "all without speech 1 of 3 , 108/min",
        "padded 1 of 1 , 108/min (60)", "compression ratio none",
    ):  # fmt: skip
        assert shown in text, shown
    assert re.findall(r'href="#nonspeech-(\d)"', section) == ["0", "2", "3"], "clicks got no word"
    assert "What it makes up" not in write(tmp_path / "none", with_statistics())[0]


def many(num_clips):
    """Clips of one kind, with words right, replaced, missing and added; their texts."""
    texts = ("मेढक पाणी नदी", "मेंढक पाणी", "मेढक पाणी नदी घर")
    clips = rows([(f"clip {number:04d}", *texts) for number in range(num_clips)])
    known = {"speaker": "ravi", "base_logprob": -0.5, "adapter_logprob": -0.25}
    return [row | known for row in clips], texts


def test_a_clip_adds_few_bytes_besides_its_texts(tmp_path):
    sizes = {}
    for num_clips in (100, 1100):
        clips, texts = many(num_clips)
        page, _ = write(tmp_path / str(num_clips), clips=clips)
        sizes[num_clips] = len(page.encode())
    parts = ("clip 0000", "ravi", *texts, "मेढक", "नदी")  # base lacks two words
    shown = sum(len(part.encode()) for part in parts)
    markup = (sizes[1100] - sizes[100]) / 1000 - shown
    assert markup <= MARKUP_BYTES, f"{markup:.0f} bytes of markup a clip"


# ------ voices


def test_sounds_of_the_panel_follow_the_voices_of_clips_below_the_same_limit(tmp_path):
    results, panel = with_panel()
    whole, _ = write(tmp_path / "whole", results, audio_mb=1.0, panel=panel)
    assert whole.count("<audio") == len(TEXTS) + 3
    assert f"holds the voices of {len(TEXTS) + 1} clips" in whole, "sounds are no voices"
    uris = [len(uri) for uri in re.findall(r'src="(data:audio[^"]*)"', whole)]
    limit = sum(uris[: len(TEXTS) + 1]) + 0.5 * uris[-1]
    part, _ = write(tmp_path / "part", results, audio_mb=limit / 1e6, panel=panel)
    assert part.count("<audio") == len(TEXTS) + 1
    assert 'aria-label="Sound of silence (1)"' in part


def test_voices_stay_below_the_limit_and_the_page_says_that_it_holds_them(tmp_path):
    whole, _ = write(tmp_path / "whole", audio_mb=1.0)
    assert whole.count("<audio") == len(TEXTS)
    assert f"holds the voices of {len(TEXTS)} clips" in whole
    uri = len(re.search(r'src="(data:audio[^"]*)"', whole)[1])
    part, _ = write(tmp_path / "part", audio_mb=2.5 * uri / 1e6)
    assert 1 <= part.count("<audio") < len(TEXTS)
    assert sum(map(len, re.findall(r'src="(data:audio[^"]*)"', part))) <= 2.5 * uri
    without, _ = write(tmp_path / "without", audio_mb=0.0)
    assert "<audio" not in without
    assert "This page holds no voices" in without


def test_a_voice_has_the_same_bytes_each_time_and_can_be_decoded():
    pcm = (tiny.tone(1.0, pitch=200.0) * 20_000).astype(np.int16)
    first, second = voices.data_uri(pcm), voices.data_uri(pcm)
    assert first == second
    ogg = base64.b64decode(first.split(",")[1])
    samples, rate = soundfile.read(io.BytesIO(ogg), dtype="int16")
    assert (rate, len(samples)) == (16_000, 16_000)
    assert np.corrcoef(samples, pcm)[0, 1] > 0.9


def test_the_checksum_is_the_one_that_libsndfile_writes():
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(1600, np.int16), 16_000, format="OGG", subtype="OPUS")
    page = bytearray(buffer.getvalue()[: 28 + 19])  # one segment of 19 bytes: OpusHead
    written, page[voices.CHECKSUM] = page[voices.CHECKSUM], bytes(4)
    assert voices.checksum(bytes(page)).to_bytes(4, "little") == bytes(written)


# ------ differences


def test_a_difference_counts_the_errors_that_the_score_counts():
    for _, reference, base, adapter in TEXTS:
        for text in (base, adapter):
            expected = metrics.count_errors(reference, text, "word")
            found = diff.compare(reference, text)
            assert (found.errors, found.wer) == (expected.errors, expected.rate)


def test_both_texts_can_be_read_from_their_difference():
    for _, reference, base, adapter in TEXTS[:-1]:
        for text in (base, adapter):
            html_text = str(diff.compare(reference, text).html)
            plain = {}
            for side in ("del", "ins"):
                kept = re.sub(rf"<{side}\b.*?</{side}>", "", html_text)
                plain[side] = re.sub(r"<[^>]*>", "", kept).split()
            assert plain == {"ins": reference.split(), "del": text.split()}


def test_a_vowel_sign_is_never_split_from_its_consonant():
    assert diff.graphemes("क्षत्रिय") == ["क्ष", "त्रि", "य"]
    left, right = diff.compare_graphemes("पानी", "पाना")
    assert (str(left), str(right)) == ("पा<u>नी</u>", "पा<u>ना</u>")


# ------ style


def luminance(color):
    channels = (int(color[at : at + 2], 16) / 255 for at in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first, second):
    """WCAG 2.2's contrast ratio."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_texts_and_marks_have_the_contrast_of_level_aa(scheme):
    blocks = re.findall(r":root \{(.*?)\}", html_report.read_part("report.css"), flags=re.S)
    colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[scheme]))
    pairs = [("deleted", "deleted-back"), ("inserted", "inserted-back")]
    pairs += [("warning", "warning-back"), ("warning", "back"), ("back", "text")]
    for name in ("text", "muted", "link"):
        pairs += [(name, "back"), (name, "panel")]
    pairs += [(f"series{number}", "back") for number in range(4)]
    for front, back in pairs:
        assert contrast(colors[front], colors[back]) >= 4.5, (front, back)


# ------ in a browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report with voices, opened in Chromium."""
    if not browser.CHROMIUM:
        pytest.skip("needs Chromium")
    folder = tmp_path_factory.mktemp("report")
    results, panel = with_panel()
    known = {"speaker": "0f" * 64, "base_logprob": -0.5, "adapter_logprob": -0.25}
    clips = [row | known for row in rows(TEXTS + MORE)]
    for name in ("base", "adapter"):
        results[name]["breakdown"]["speaker"][0]["group"] = known["speaker"]
    write(folder, results, clips, audio_mb=0.2, panel=panel)
    with browser.chromium(tmp_path_factory.mktemp("profile")) as opened:
        opened.address = (folder / "wer" / "report.html").as_uri()
        yield opened


@pytest.fixture
def fresh(page):
    page.open(page.address)
    yield page
    assert page.requests() == [page.address]
    assert not page.complaints()


def ids(page):
    return page.evaluate(
        "Array.from(document.querySelectorAll('#table tbody th bdi:first-child'), "
        "(id) => id.textContent)"
    )


def values(page, column):
    return page.evaluate(
        f"Array.from(document.querySelectorAll('#table tbody tr'), "
        f"(row) => parseFloat(row.cells[{column}].textContent.replace('−', '-')))"
    )


def click(page, selector):
    page.evaluate(f"document.querySelector({json.dumps(selector)}).click()")


def search(page, text):
    page.evaluate(
        f"document.getElementById('search').value = {json.dumps(text)}, "
        "document.getElementById('search').dispatchEvent(new Event('input'))"
    )
    return ids(page)


def status(page):
    return page.evaluate("document.getElementById('status').textContent")


def test_a_click_on_a_heading_sorts_and_a_second_one_turns_the_order(fresh):
    for key, column in (("seconds", 1), ("wer-0", 2), ("change", 4)):
        click(fresh, f"[data-key='{key}']")
        down = values(fresh, column)
        assert down == sorted(down, reverse=True)
        click(fresh, f"[data-key='{key}']")
        up = values(fresh, column)
        assert up == sorted(up)
        assert up[0] < down[0]
    assert fresh.evaluate("document.querySelectorAll('[aria-sort]').length") == 1


def test_filters_show_the_clips_that_they_name(fresh):
    click(fresh, "[data-filter='looping']")
    assert ids(fresh) == [LOOPING]
    assert status(fresh) == "1 of 155 clips"
    hidden = "getComputedStyle(document.getElementById('more')).display === 'none'"
    assert fresh.evaluate(hidden), "there are no more"
    click(fresh, "[data-filter='worst']")
    assert len(ids(fresh)) == 20
    click(fresh, "[data-filter='improved']")
    assert LOOPING in ids(fresh)
    assert all(change < 0 for change in values(fresh, 4))
    click(fresh, "[data-filter='worsened']")
    assert all(change > 0 for change in values(fresh, 4))
    click(fresh, "[data-filter='']")
    assert status(fresh) == "155 of 155 clips, 50 shown"
    assert not fresh.evaluate(hidden)
    click(fresh, "#more-button")
    assert len(ids(fresh)) == 100


def test_clips_without_speech_are_shown_where_they_are_asked_for(fresh):
    assert "silence (1)" not in ids(fresh)
    assert search(fresh, "silence") == []
    search(fresh, "")
    click(fresh, "[data-filter='invented']")
    assert ids(fresh) == ["silence (1)", "music (1)", "padded (1)"]
    assert status(fresh) == "3 of 3 clips"
    click(fresh, "[data-key='seconds']")
    assert len(ids(fresh)) == 3
    fresh.open(fresh.address)
    click(fresh, "[data-kind='music']")
    assert ids(fresh) == ["music (1)"]
    assert fresh.evaluate("location.hash") == "#nonspeech-2"
    fresh.open("about:blank")
    fresh.open(f"{fresh.address}#nonspeech-3")
    assert ids(fresh) == ["padded (1)"]
    fresh.open(fresh.address)


def test_search_finds_ids_and_what_was_said_or_written(fresh):
    assert search(fresh, "TWO") == ["two"]
    assert search(fresh, "तीन") == ["one"]
    assert search(fresh, "पाणी नदी") == ["two"]
    assert search(fresh, "کہاں") == ["four"]
    assert search(fresh, "<script>") == ['<b>"five"&']
    assert search(fresh, "nowhere") == []
    assert status(fresh) == "0 of 155 clips"


def test_texts_of_others_are_not_run(fresh):
    assert fresh.evaluate("document.title").startswith("raw WER")
    assert fresh.evaluate("document.images.length") == 0


def violation(page, statement):
    """The directive that a statement in the page violates."""
    return page.evaluate(
        "new Promise((done) => { document.addEventListener('securitypolicyviolation', "
        f"(event) => done(event.effectiveDirective), {{once: true}}); {statement} }})"
    )


def test_the_policy_stops_requests_and_scripts_that_the_report_was_not_written_with(page):
    page.open(page.address)
    assert violation(page, "new Image().src = 'http://127.0.0.1:9/';") == "img-src"
    assert violation(page, "fetch('http://127.0.0.1:9/').catch(() => 0);") == "connect-src"
    add = "const added = document.createElement('script'); added.textContent = 'window.ran = 1';"
    assert violation(page, f"{add} document.body.append(added);") == "script-src-elem"
    assert page.evaluate("window.ran") is None


def mouse(page, kind, x, y):
    page.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


def test_a_dot_and_a_confusion_open_their_clips(fresh):
    axes = charts.Axes((0.0, charts.DOTS_TO), (0.0, charts.DOTS_TO))
    x, y = fresh.evaluate(
        "(() => { const line = document.getElementById('dots'); line.scrollIntoView();"
        f" const dot = new DOMPoint({axes.x(50.0)}, {axes.y(100.0)})"
        ".matrixTransform(line.getScreenCTM()); return [dot.x, dot.y]; })()"
    )
    mouse(fresh, "mouseMoved", x + 40, y)
    assert fresh.evaluate("document.querySelector('svg a[href]')") is None, "no dot is there"
    mouse(fresh, "mouseMoved", x, y)
    title = fresh.evaluate("document.querySelector(\"svg a[href='#clip-1'] title\").textContent")
    assert title == "two: WER base 50 %, WER adapter 100 %"
    mouse(fresh, "mousePressed", x, y)
    mouse(fresh, "mouseReleased", x, y)
    assert ids(fresh) == ["two"]
    assert fresh.evaluate("document.activeElement.id") == "clip-1"
    search(fresh, "")
    click(fresh, "[data-search]")
    assert ids(fresh) == ["two"]


def test_a_voice_plays(fresh):
    duration = fresh.evaluate(
        "(async () => { const audio = document.querySelector('audio'); audio.muted = true;"
        " await audio.play(); audio.pause(); return audio.duration; })()"
    )
    assert duration == pytest.approx(1.0, abs=0.05)


def test_everything_is_reached_and_worked_with_the_keyboard(fresh):
    fresh.evaluate("document.querySelector('[data-filter=looping]').focus()")
    fresh.press("Enter", "\r")
    assert ids(fresh) == [LOOPING]
    fresh.press("Tab")
    assert fresh.evaluate("document.activeElement.dataset.filter") == "invented"
    fresh.press("Tab")
    assert fresh.evaluate("document.activeElement.id") == "search"
    fresh.press("Tab")
    assert fresh.evaluate("document.activeElement.dataset.key") == "clip"
    fresh.press(" ", " ")
    assert fresh.evaluate("document.querySelector('[aria-sort]').cellIndex") == 0


def test_without_javascript_every_clip_is_on_the_page(page):
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.open(page.address)
        document = page.call("DOM.getDocument", depth=0)["root"]["nodeId"]

        def seen(selector):
            nodes = page.call("DOM.querySelectorAll", nodeId=document, selector=selector)["nodeIds"]
            boxes = [page.call("DOM.getContentQuads", nodeId=node)["quads"] for node in nodes[-1:]]
            return len(nodes), all(boxes)

        assert seen("#table tbody tr") == (158, True), "155 and 3 without speech"
        assert seen(".noscript")[1]
    finally:
        page.call("Emulation.setScriptExecutionDisabled", value=False)


def test_without_javascript_all_texts_of_all_clips_can_be_read(page):
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.open(page.address)
        document = page.call("DOM.getDocument", depth=0)["root"]["nodeId"]
        table = page.call("DOM.querySelector", nodeId=document, selector="#table")["nodeId"]
        content = page.call("DOM.getOuterHTML", nodeId=table)["outerHTML"]
    finally:
        page.call("Emulation.setScriptExecutionDisabled", value=False)

    def words(part):
        return tuple(html.unescape(re.sub("<[^>]*>", "", part)).split())

    readable = set()
    for row in re.findall('<tr id="clip-.*?</tr>', content, flags=re.S):
        clip, _, reference, *transcripts = re.findall("<bdi.*?</bdi>", row, flags=re.S)
        written = [re.sub("<del.*?</del>", "", own) for own in transcripts]
        wanted = [re.sub("<ins.*?</ins>", "", own) for own in transcripts]
        assert [words(own) for own in wanted] == [words(reference)] * 2
        readable.add((words(clip), words(reference), *map(words, written)))
    given = {tuple(tuple(part.split()) for part in clip) for clip in TEXTS + MORE}
    assert readable == given


def test_a_clip_is_no_element_before_it_is_shown(page, tmp_path):
    elements = {}
    for num_clips in (100, 1100):
        write(tmp_path / str(num_clips), clips=many(num_clips)[0])
        page.open((tmp_path / str(num_clips) / "wer" / "report.html").as_uri())
        assert status(page) == f"{num_clips} of {num_clips} clips, 50 shown"
        elements[num_clips] = page.evaluate("document.querySelectorAll('*').length")
    assert elements[1100] == elements[100]


@pytest.mark.parametrize("width", [320, 1280])
def test_the_page_is_never_wider_than_the_screen(fresh, width):
    fresh.resize(width, 800)
    assert fresh.evaluate("document.documentElement.scrollWidth") <= width


def test_each_number_of_a_clip_has_its_name_on_a_narrow_screen(fresh):
    fresh.resize(320, 800)
    names = """[...document.querySelector("#table tbody tr").querySelectorAll("td")].map(
        own => getComputedStyle(own, "::before").content)"""
    labels = ("seconds", "WER base", "WER adapter", "change", "log-probability")
    assert fresh.evaluate(names) == [*(f'"{label} "' for label in labels), "none"]
    click(fresh, "[data-filter='invented']")
    assert fresh.evaluate(names) == ['"seconds "', *["none"] * 5], "nothing else is known"
    fresh.resize(1280, 800)
    assert set(fresh.evaluate(names)) == {"none"}


def test_the_name_of_a_system_cannot_end_the_style_sheet_or_its_own_string():
    style = html_report.label_cells(["a_1", 'b"}</style>\\'], has_logprob=False)
    assert 'content: "WER a_1 "' in style
    assert 'content: "WER b\\22 \\7d \\3c \\2f style\\3e \\5c  "' in style


def test_a_long_speaker_id_takes_one_line_and_no_heading_is_cut_inside_a_word(fresh):
    fresh.resize(1280, 900)
    lines = """[...document.querySelectorAll(".clips .speaker")].map(
        own => own.getBoundingClientRect().height / parseFloat(getComputedStyle(own).lineHeight))"""
    assert max(fresh.evaluate(lines)) < 1.5
    cut = """[...document.querySelectorAll(".clips thead th")].filter(
        own => own.scrollWidth > own.clientWidth).map(own => own.textContent.trim())"""
    assert fresh.evaluate(cut) == []
    fresh.evaluate("document.querySelectorAll('details').forEach(own => { own.open = true; })")
    wide = "[...document.querySelectorAll('details .scroll')].map(own => own.scrollWidth)"
    assert max(fresh.evaluate(wide)) < 1280


def test_urdu_runs_from_the_right_and_hindi_from_the_left(fresh):
    search(fresh, "four")
    directions = fresh.evaluate(
        "Array.from(document.querySelectorAll('#table td bdi'), "
        "(text) => getComputedStyle(text).direction)"
    )
    assert directions[0] == "rtl"
    pieces = fresh.evaluate(
        "Array.from(document.querySelectorAll('#table del, #table ins'), "
        "(piece) => piece.tagName + getComputedStyle(piece).direction)"
    )
    assert {"DELrtl", "INSltr"} <= set(pieces)


def test_the_headline_of_few_speakers_has_the_interval_over_clips_too():
    raw = {"wer": 70.9, "wer_interval": [70.0, 71.8]}
    results = {"adapter": {"normalisers": {"raw": raw}}}
    assert html_report.headline(results) == "raw WER: adapter 70.9 [70.0, 71.8]"
    raw["wer_interval_clips"] = [61.4, 80.7]
    shown = "raw WER: adapter 70.9 [70.0, 71.8] (over clips [61.4, 80.7])"
    assert html_report.headline(results) == shown
