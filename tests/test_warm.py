"""Scripts that are forked instead of started behave as if they had been started."""

import json
import resource
import signal
import subprocess
import sys

import launch
import psutil
import pytest
import torch
import warm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not fork"),
]
SCRIPT = """
import atexit, json, os, sys
import torch
atexit.register(print, "at exit")
print(json.dumps({
    "arguments": sys.argv, "main": [__name__, sys.modules["__main__"].__file__],
    "folder": os.getcwd(), "path": sys.path[0], "input": sys.stdin.read(),
    "variables": [os.environ.get("ADDED"), os.environ.get("TAKEN")],
    "parent": os.getppid(), "rank": os.environ.get("RANK"),
    "leads": os.getpgid(0) == os.getpid(), "threads": torch.get_num_threads(),
}), flush=True)
print("to stderr", file=sys.stderr)
if sys.argv[1] == "wait":
    import time
    time.sleep(300)
if sys.argv[1] == "fail":
    raise ValueError("on purpose")
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def script(tmp_path):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    return str(file)


def start(script, word, **options):
    return launch.start([sys.executable, script, word], stdin=subprocess.PIPE, **options)


def test_a_script_has_its_own_arguments_folder_environment_and_streams(
    script, tmp_path, monkeypatch
):
    monkeypatch.setenv("TAKEN", "for the test alone")
    environment = launch.environment() | {"ADDED": "for the script"}
    del environment["TAKEN"]
    process = start(script, "3", env=environment, cwd=tmp_path, start_new_session=True)
    assert isinstance(process, warm.Popen)
    out, err = process.communicate("read\n")
    told = json.loads(out.splitlines()[0])
    assert (process.returncode, err, out.splitlines()[1]) == (3, "to stderr\n", "at exit")
    assert told["arguments"] == [script, "3"]
    assert told["main"] == ["__main__", script]
    assert (told["folder"], told["path"], told["input"]) == (str(tmp_path), str(tmp_path), "read\n")
    assert told["variables"] == ["for the script", None]
    assert told["parent"] == psutil.Process().pid
    assert told["leads"]
    assert told["threads"] == 1


def test_an_error_has_its_traceback_and_a_signal_kills(script):
    process = start(script, "fail")
    _, err = process.communicate("")
    assert process.returncode == 1
    assert err.startswith("to stderr\nTraceback") and err.endswith("ValueError: on purpose\n")
    process = start(script, "wait")
    process.stdin.close()
    assert process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL


def test_a_launchers_processes_are_its_children_and_end_with_it(script):
    before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    process = launch.start([*launch.command(script, {}, processes=2), "wait"])
    told = [json.loads(process.stdout.readline()) for _ in range(2)]
    assert {one["parent"] for one in told} == {process.pid}
    assert {one["rank"] for one in told} == {"0", "1"}
    ranks, tree = launch.ranks(process), launch.descendants(process)
    assert len(ranks) == 2 and len(tree) == 4, "and the launcher, and its server"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    _, left = psutil.wait_procs(tree, timeout=30)
    assert process.returncode and not left
    assert sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) > before, "it is accounted for"


def test_a_variable_that_imports_read_has_the_script_started_anew(script):
    process = start(script, "0", env=launch.environment() | {"HF_HOME": "/elsewhere"})
    assert not isinstance(process, warm.Popen)
    assert process.communicate("")[0].endswith("at exit\n")
