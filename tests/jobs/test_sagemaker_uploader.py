"""What SageMaker writes into /opt/ml/checkpoints while it copies them to S3 is in nobody's way."""

from pathlib import Path

import pytest
import sagemaker
import torch
from accelerate import Accelerator

from common import files
from jobs import entry
from training import checkpoint

SAVES = 60
SPEEDS = [0.0, 0.02]  # seconds that a file takes to upload: faster than a save, and slower
MARKERS = (".sagemaker-uploading", ".sagemaker-uploaded")


@pytest.fixture
def trained():
    """A model and its optimizer after a step, on a CPU."""
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    return {"accelerator": Accelerator(cpu=True), "model": model, "optimizer": optimizer}


@pytest.mark.parametrize("careless", [False, True], ids=["ignores", "careless"])
@pytest.mark.parametrize("seconds", SPEEDS)
def test_every_save_succeeds_while_its_folder_is_uploaded(seconds, careless, trained, tmp_path):
    failed = []
    with sagemaker.Uploader(tmp_path, seconds=seconds, careless=careless) as uploader:
        for step in range(1, SAVES + 1):
            try:
                checkpoint.save(
                    tmp_path / "checkpoints", **trained, step=step, state={"identity": {}}, keep=2
                )
            except OSError as error:
                failed.append(error)
    assert not failed, f"{len(failed)} of {SAVES} saves failed: {failed[0]!r}"
    print(f"{seconds} s a file, careless {careless}: {SAVES} saves, {uploader.uploads} uploads")
    assert uploader.uploads > SAVES / 10
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [f"step-{SAVES - 1:08d}", f"step-{SAVES:08d}"]
    found, warnings = checkpoint.find(tmp_path / "checkpoints", {})
    assert (found.name, warnings) == (kept[-1], [])


def test_what_a_killed_run_had_begun_is_removed_by_the_next_save(trained, tmp_path):
    for name in ("step-00000007.partial", "step-00000005.old"):
        (tmp_path / f"{name}.sagemaker-ignore").mkdir()
    checkpoint.save(tmp_path, **trained, step=8, state={"identity": {}}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000008"]


def test_a_folder_that_is_written_is_not_uploaded_before_it_is_whole(tmp_path):
    with sagemaker.Uploader(tmp_path, seconds=0) as uploader:
        for number in range(20):
            with files.new_folder(tmp_path / "adapter") as folder:
                (folder / "first").write_text(str(number))
                (folder / "second").write_text(str(number))
            files.write_json(tmp_path / "train.json", {})
    assert set(uploader.copied) <= {"adapter/first", "adapter/second", "train.json"}


def test_a_folder_takes_the_place_of_a_link_and_of_a_file(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "adapter").symlink_to("elsewhere")
    for content in ("a", "b"):
        with files.new_folder(tmp_path / "adapter") as folder:
            (folder / "x").write_text(content)
        assert (tmp_path / "adapter" / "x").read_text() == content
    (tmp_path / "model").write_text("a file")
    with files.new_folder(tmp_path / "model"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "elsewhere", "model"]
    assert not any((tmp_path / "elsewhere").iterdir())


def test_results_are_kept_without_the_uploaders_markers(tmp_path):
    written = tmp_path / "checkpoints"
    for name in ("adapter/adapter_config.json", "train.json", "metrics.jsonl"):
        (written / name).parent.mkdir(parents=True, exist_ok=True)
        (written / name).write_text("{}")
        for marker in MARKERS:
            (written / f"{name}{marker}").touch()
    (written / "adapter.partial.sagemaker-ignore").mkdir()
    # a marker that is gone when it is to be copied, as a link that leads nowhere
    (written / "adapter" / "x.sagemaker-uploading").symlink_to("nowhere")
    entry.keep_results(written, tmp_path / "model")
    kept = {str(path.relative_to(tmp_path / "model")) for path in (tmp_path / "model").rglob("*")}
    assert kept == {"adapter", "adapter/adapter_config.json", "train.json", "metrics.jsonl"}


def test_results_are_kept_while_they_are_uploaded(tmp_path):
    written = Path(tmp_path, "checkpoints")
    (written / "adapter").mkdir(parents=True)
    for number in range(50):
        (written / "adapter" / str(number)).write_text("x")
    (written / "train.json").write_text("{}")
    with sagemaker.Uploader(written, seconds=0.0005):
        for _ in range(50):
            entry.keep_results(written, tmp_path / "model")
    kept = [path.name for path in (tmp_path / "model" / "adapter").iterdir()]
    assert len(kept) == 50
