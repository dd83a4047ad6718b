"""Two machines, really: two network namespaces joined by a cable (a veth pair), each with its own
launcher and its own disk; one is lost in the middle, and the run goes on.
"""

import itertools
import json
import signal
from pathlib import Path

import launch
import pytest
from short_run import records, small_options, train

from benchmarks import machines

pytestmark = [pytest.mark.root, pytest.mark.slow]
PORTS = itertools.count(29_500)  # free in a fresh namespace


@pytest.fixture(scope="module")
def nodes():
    """Two machines; skips, saying so, where they cannot be made."""
    try:
        with machines.two_machines():
            yield
    except RuntimeError as error:
        pytest.skip(str(error))


def start(node, options, config, port):
    """The command that a user types on machine `node`."""
    words = launch.command("train_lora.py", options, processes=2, config=config)
    at = words.index("--num_processes")
    words[at : at + 4] = machines.launch_words(node, port)
    environment = launch.environment() | machines.environment(node)
    return launch.start(machines.on_machine(node, words), env=environment)


def run_both(options, config):
    port = next(PORTS)
    disks = [options, options | {"output_dir": f"{options['output_dir']}_of_node1"}]
    return [start(node, own, config, port) for node, own in enumerate(disks)]


@pytest.mark.parametrize("config", ["multi_node", "deepspeed_zero2"])
def test_two_machines_train_as_one_process_lose_one_and_go_on(
    nodes, checkpoint, train_only, tmp_path, config
):
    options = small_options(checkpoint, train_only, tmp_path, save_every=2)
    options |= {"max_steps": 60, "collective_timeout": 0.5}
    whole = options | {"output_dir": str(tmp_path / "whole")}
    train(whole)

    first, second = run_both(options, config)
    folder = Path(options["output_dir"], "checkpoints")
    launch.wait_for(lambda: list(folder.glob("step-*/state.json")), first)
    for process in launch.descendants(second):  # the power goes
        process.send_signal(signal.SIGKILL)
    second.wait(60)
    out, err = first.communicate(timeout=240)
    assert first.returncode
    assert "error: --collective_timeout: another process of this run ended" in err, err[-3000:]
    lost = max(records(options, "loss"))
    assert lost < options["max_steps"]

    for process in run_both(options, config):
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err[-3000:]
        if "resumed at step" in out:
            log = out
    assert "resumed at step" in log
    told = json.loads(Path(options["output_dir"], "train.json").read_text())
    assert (told["processes"], told["engine"]) == (2, "zero2" if "zero2" in config else "ddp")
    expected, got = records(whole, "loss"), records(options, "loss")
    assert expected.keys() == got.keys()
    assert max(abs(got[step] / expected[step] - 1) for step in expected) < 1e-3
    assert not Path(f"{options['output_dir']}_of_node1", "checkpoints").exists()
