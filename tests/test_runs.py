"""The reference runs are scripts that work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import launch
import pytest
import tiny

RUNS = sorted((launch.ROOT / "runs").glob("*.sh"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_a_reference_run_is_an_executable_script_that_says_how_to_call_it(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK)
    assert f"runs/{path.name}" in path.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_measuring_run_scores_base_and_adapter_at_both_windows(checkpoint, tmp_path):
    clips = {"train": 10, "validation": 3, "test": 3}
    source = tiny.make_corpus(tmp_path / "source", clips=clips)
    done = subprocess.run(
        [launch.ROOT / "runs" / "measure.sh", source, "mr", checkpoint, tmp_path / "out"],
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "out" / "wer" / "wer.json").read_text(encoding="utf-8"))
    for system in ("base", "adapter"):
        windows = {scores[system]["window"], scores[system]["other_window"]["window"]}
        assert windows == {"natural", "full"}, system
