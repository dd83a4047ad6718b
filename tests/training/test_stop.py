"""Stopping: signals, time limits; all processes agree, save and end well, and a run goes on."""

import json
import resource
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import launch
import psutil
import pytest
import torch
import warm
from safetensors.torch import load_file
from short_run import records, small_options, train

from training import stop as stopping
from training.stop import Stop, agree, listen

LONG = {"max_steps": 4000, "log_every": 1, "save_every": 100_000, "eval_every": 100_000}


@pytest.fixture
def options(checkpoint, prepared, tmp_path):
    return small_options(checkpoint, prepared, tmp_path) | LONG


def metrics(options):
    return Path(options["output_dir"], "metrics.jsonl")


def is_training(options):
    return lambda: metrics(options).exists() and len(records(options, "loss")) > 3


def saved_step(options):
    (folder,) = Path(options["output_dir"], "checkpoints").iterdir()
    return json.loads((folder / "state.json").read_text())["step"]


def computed(process):
    """Seconds that the processors have spent on a process and all below it, so far."""
    times = [one.cpu_times() for one in launch.descendants(process)]
    return sum(sum(one[:4]) for one in times)  # user and system, ended children included


def end(process, before):
    """Its output, once it has ended by itself, 10 seconds of computing after the signal at most.

    Of computing, because a loaded machine takes longer by the clock.

    Args:
        before: what it had `computed` when it got the signal.
    """
    others = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    try:
        out, err = process.communicate(timeout=120)  # SageMaker gives a job two minutes
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"did not end: {process.communicate()}")
    spent = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - others - before
    assert spent < 10, f"{spent:.1f} s after the signal"
    return out, err


def signal_after_step(process, number, options):
    """Send a signal to a training process; the last step that it had logged when it got it.

    It is stopped meanwhile: on a loaded machine it would take many steps between the two.
    """
    process.suspend()
    while process.status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    last = max(records(options, "loss"))
    process.send_signal(number)
    process.resume()
    return last


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_ends_well_and_the_run_goes_on_exactly(options, number, tmp_path):
    process = launch.start(launch.command("train_lora.py", options | {"num_workers": 1}))
    launch.wait_for(is_training(options), process)
    before = computed(process)
    last = signal_after_step(psutil.Process(process.pid), number, options)
    out, err = end(process, before)
    assert process.returncode == 0, err
    assert f"stopped by {number.name} after step" in out
    step = saved_step(options)
    assert last < step <= last + 2, "the step that was under way, and one not logged yet"
    assert max(records(options, "loss")) <= step

    total = step + 3
    changed = {"max_steps": total, "resume_changed": True, "schedule": "linear"}
    train(options | changed)
    assert max(records(options, "loss")) == total


@pytest.mark.slow
@pytest.mark.parametrize("target", ["last rank", "launcher"])
def test_a_signal_to_one_of_two_processes_or_the_launcher_stops_both(options, target):
    process = launch.start(launch.command("train_lora.py", options, processes=2))
    launch.wait_for(is_training(options), process)
    before = computed(process)
    if target == "launcher":
        process.send_signal(signal.SIGTERM)
    else:
        last = signal_after_step(launch.ranks(process)[-1], signal.SIGTERM, options)
    out, err = end(process, before)
    assert "after step" in out and "stopped by" in out, (out[-2000:], err[-3000:])
    if target != "launcher":  # accelerate's launcher reports its own signal as a failure
        assert process.returncode == 0, err
        assert last <= saved_step(options) <= last + 3, "the other may have logged a step less"
    assert saved_step(options) > 3


def test_a_second_signal_counts_only_after_a_while():
    """A terminal and a launcher both pass on one Ctrl-C."""
    with listen(max_minutes=0, save_every_minutes=0) as stop:
        stop.hear(signal.SIGTERM, None)
        stop.hear(signal.SIGTERM, None)  # passed on: still here
        assert agree(stop, 0.0) == ("SIGTERM", False)


@pytest.mark.slow
def test_a_second_signal_after_a_while_kills_the_process(tmp_path):
    script = (
        "import os, signal, time\n"
        "from training.stop import listen\n"
        "with listen(max_minutes=0, save_every_minutes=0) as stop:\n"
        "    stop.hear(signal.SIGTERM, None)\n"
        "    stop.signal_at -= 10\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(300)\n"
    )
    process = launch.start([launch.sys.executable, "-c", script])
    assert process.wait(200) == -signal.SIGTERM  # sooner than it would end by itself


def test_the_processes_wait_for_each_others_flags_as_long_as_asked(tmp_path):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", store, rank=0, world_size=1)
    try:
        with listen(max_minutes=0, save_every_minutes=0) as stop:
            stop.join(SimpleNamespace(num_processes=2), timeout_minutes=0.25)
        backend = stop.group._get_backend(torch.device("cpu"))
        assert backend.options._timeout.total_seconds() == 15
    finally:
        torch.distributed.destroy_process_group()


def test_handlers_are_those_of_before_after_the_run():
    before = signal.getsignal(signal.SIGTERM)
    with listen(max_minutes=0, save_every_minutes=0):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_time_limit_stops_in_time_to_save_and_a_jumping_clock_changes_nothing(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(stopping.time, "time", lambda: pytest.fail("looks at the wall clock"))
    stop = Stop(max_seconds=100.0, save_every_seconds=30.0, started=1000.0, saved_at=1000.0)
    assert agree(stop, 1.0) == ("", False)
    now[0] += 30
    assert agree(stop, 1.0) == ("", True)
    stop.saved(seconds=10.0)
    assert agree(stop, 1.0) == ("", False)
    now[0] = 1000 + 100 - 2 * 10 - 3 - 1
    assert agree(stop, 3.0)[0] == ""
    now[0] += 2
    assert agree(stop, 1.0)[0] == "--max_minutes"


@pytest.mark.slow
def test_a_run_with_a_time_limit_saves_before_it_and_saves_every_few_seconds(options, tmp_path):
    warm.server()  # not timed
    start = time.time()
    short = options | {"max_steps": 1, "output_dir": str(tmp_path / "short")}
    assert launch.run("train_lora.py", short).returncode == 0
    kept_free = stopping.SAVE_FACTOR * stopping.FIRST_SAVE_SECONDS  # seconds, for the last save
    limit = kept_free + 4 + 3 * (time.time() - start)  # on a loaded machine a run starts later
    own = options | {"max_minutes": limit / 60, "save_every_minutes": 0.01}
    own |= {"keep_checkpoints": 1000}
    start = time.time()
    done = launch.run("train_lora.py", own)
    assert done.returncode == 0, done.stderr
    assert "stopped by --max_minutes after step" in done.stdout
    folders = sorted(Path(own["output_dir"], "checkpoints").iterdir())
    assert len(folders) > 3
    assert (folders[-1] / "state.json").stat().st_mtime - start < limit, "saved too late"
    assert all(load_file(one / "weights.safetensors") for one in folders)


def test_a_run_stopped_where_it_was_to_evaluate_ends_as_an_unbroken_one(options, tmp_path):
    whole = options | {"max_steps": 6, "save_every": 100, "output_dir": str(tmp_path / "whole")}
    whole |= {"eval_every": 2, "wer_every": 2}  # due in the step that is stopped after
    train(whole)
    cut = whole | {"output_dir": str(tmp_path / "cut")}
    done = launch.run("tests/stop_after.py", cut)
    assert "stopped by SIGTERM after step 2" in done.stdout, done.stderr
    assert not Path(cut["output_dir"], "adapter").exists()
    train(cut)
    for key in ("loss", "eval_loss", "wer_raw"):
        assert records(cut, key) == records(whole, key)
    name = "adapter/adapter_model.safetensors"
    expected = load_file(Path(whole["output_dir"], name))
    got = load_file(Path(cut["output_dir"], name))
    assert all(torch.equal(expected[key], got[key]) for key in expected)
