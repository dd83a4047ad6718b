"""--benchmark: an entry for a leaderboard of the Hub, which says what was measured."""

import json

import pytest
import yaml
from huggingface_hub._eval_results import parse_eval_result_entries

import eval_wer
from common.cli import UserError
from evaluation import leaderboard

RATES = {"unit": "word", "wer": 70.27027, "cer": 31.4, "wer_interval": [66.0714, 74.5851]}
RESULTS = {
    "adapter": {
        "clips": 78, "window": "natural",
        "normalisers": {"raw": RATES, "whisper_basic": {"unit": "word", "wer": 52.0, "cer": 20.0}},
    },
    "recipe": {"config": {"num_beams": 1}},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Of wer.json."""
    path = tmp_path / "wer"
    path.mkdir()
    (path / "wer.json").write_text(json.dumps(RESULTS))
    return path


def entries(path):
    return parse_eval_result_entries(yaml.safe_load(path.read_text()))


def test_an_entry_beside_the_card_names_benchmark_rate_and_how_it_was_measured(folder, tmp_path):
    card = tmp_path / "adapter" / "README.md"
    card.parent.mkdir()
    (line,) = leaderboard.write_entries("google/fleurs:mr_in", folder, {"adapter": card})
    path = card.parent / ".eval_results" / "google_fleurs_mr_in.yaml"
    assert line == f"leaderboard entry {path}"
    (entry,) = entries(path)
    assert (entry.dataset_id, entry.task_id, entry.value) == ("google/fleurs", "mr_in", 70.27)
    assert entry.notes == (
        "WER raw in per cent (by word), 95 % interval 66.07 to 74.59; 78 clips; beams: 1, "
        "window: natural"
    )
    assert (entry.date, entry.verify_token) == (None, None), "the same results, the same bytes"


def test_another_normalizer_is_named_with_the_task(folder, tmp_path):
    card = tmp_path / "README.md"
    leaderboard.write_entries("google/fleurs:mr_in:whisper_basic", folder, {"adapter": card})
    (entry,) = entries(tmp_path / ".eval_results" / "google_fleurs_mr_in.yaml")
    assert entry.value == 52.0 and entry.notes.startswith(
        "WER whisper_basic in per cent (by word);"
    )


def test_a_rate_that_was_not_measured_is_no_entry(folder, tmp_path):
    value = "google/fleurs:mr_in:whisper_english"
    lines = leaderboard.write_entries(value, folder, {"adapter": tmp_path / "README.md"})
    assert lines == [f"--benchmark {value}: no WER whisper_english in these languages"]
    assert not (tmp_path / ".eval_results").exists()


def test_cards_that_lie_in_one_folder_have_an_entry_each(folder):
    names = ("adapter_1", "adapter_2")
    results = json.loads((folder / "wer.json").read_text())
    results |= dict.fromkeys(names, results["adapter"])
    (folder / "wer.json").write_text(json.dumps(results))
    cards = {name: folder / f"model_card_{name}.md" for name in names}
    leaderboard.write_entries("google/fleurs:mr_in", folder, cards)
    written = sorted(path.name for path in (folder / ".eval_results").iterdir())
    assert written == [f"google_fleurs_mr_in_{name}.yaml" for name in names]


def test_nothing_is_written_unasked(folder, tmp_path):
    assert leaderboard.write_entries("", folder, {"adapter": tmp_path / "README.md"}) == []
    assert not (tmp_path / ".eval_results").exists()


@pytest.mark.parametrize("value", ["fleurs:mr", "google/fleurs", "a/b:c d", "a/b:mr:loose"])
def test_what_names_no_task_is_refused(checkpoint, value):
    config = eval_wer.Config(model=str(checkpoint), benchmark=value)
    with pytest.raises(UserError, match=f"--benchmark {value}: give OWNER/NAME:TASK"):
        eval_wer.check(config)


def test_a_part_of_the_test_set_is_refused(checkpoint):
    config = eval_wer.Config(model=str(checkpoint), benchmark="google/fleurs:mr_in", max_clips=5)
    with pytest.raises(UserError, match="--benchmark google/fleurs:mr_in: goes with a model card"):
        eval_wer.check(config)
