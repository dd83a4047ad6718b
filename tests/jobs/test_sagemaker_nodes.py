"""A job on two nodes, really: two network namespaces, the entry as process 1 of each."""

import json
import signal
import time

import launch
import pytest
import sagemaker
from short_run import SMALL, records, small_options

from benchmarks import machines

pytestmark = [pytest.mark.root, pytest.mark.slow]
OPTIONS = SMALL | {"max_steps": 40, "save_every": 10}


@pytest.fixture(scope="module")
def network():
    """Two machines that know each other as algo-1 and algo-2; skips where they cannot be made."""
    try:
        with machines.two_machines():
            yield
    except RuntimeError as error:
        pytest.skip(str(error))


def make_nodes(folder, options, checkpoint, prepared):
    channels = {"train": prepared, "model": checkpoint}
    nodes = [
        sagemaker.make_ml(folder / host, options, channels, host=host, hosts=sagemaker.HOSTS)
        for host in sagemaker.HOSTS
    ]
    pairs = zip(machines.ADDRESSES, sagemaker.HOSTS, strict=True)
    names = "".join(f"{address} {host}\n" for address, host in pairs)
    for ml in nodes:
        (ml / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    return nodes


def start_both(nodes, **variables):
    return [sagemaker.start_node(ml, node=at, **variables) for at, ml in enumerate(nodes)]


def losses(checkpoints):
    return records({"output_dir": str(checkpoints)}, "loss")


@pytest.fixture(scope="module")
def expected(checkpoint, prepared, tmp_path_factory):
    """Losses of one machine: two processes, and one."""
    found = []
    for processes in (2, 1):
        folder = tmp_path_factory.mktemp(f"alone_{processes}")
        options = small_options(checkpoint, prepared, folder) | OPTIONS
        done = launch.run("train_lora.py", options, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(records(options, "loss"))
    return found


def test_a_signal_to_one_node_saves_and_the_job_goes_on_to_an_adapter_on_the_first(
    network, checkpoint, prepared, expected, tmp_path
):
    nodes = make_nodes(tmp_path, OPTIONS, checkpoint, prepared)
    running = start_both(nodes)
    written = nodes[0] / "checkpoints" / "metrics.jsonl"
    launch.wait_for(written.exists, running[0])
    sagemaker.process_1(running[1]).send_signal(signal.SIGTERM)
    ends = [sagemaker.end(node, 120) for node in running]
    assert [code for code, _, _ in ends] == [0, 0], (ends[0][2][-3000:], ends[1][2][-3000:])
    assert "stopped by SIGTERM after step" in ends[0][1]
    done = max(losses(nodes[0] / "checkpoints"))
    assert done < OPTIONS["max_steps"]
    assert not any((nodes[0] / "model").iterdir())

    ends = [sagemaker.end(node) for node in start_both(nodes)]
    assert [code for code, _, _ in ends] == [0, 0], ends[0][2][-3000:]
    assert f"resumed at step {done}" in ends[0][1]
    first, second = nodes
    assert (first / "model" / "adapter" / "adapter_model.safetensors").exists()
    assert not any((second / "model").iterdir())
    told = json.loads((first / "model" / "train.json").read_text(encoding="utf-8"))
    assert (told["processes"], told["engine"]) == (2, "ddp")
    two, one = expected
    got = losses(first / "checkpoints")
    assert got == two, "byte for byte, as two processes of one machine"
    assert max(abs(got[step] / one[step] - 1) for step in one) < 1e-4
    (line,) = ends[1][1].splitlines()  # the first node alone tells of the run
    assert "algo-2 is node 2 of 2" in line


def test_a_reclaimed_spot_node_has_both_save_and_neither_ends_by_itself(
    network, checkpoint, prepared, tmp_path
):
    nodes = make_nodes(tmp_path, OPTIONS, checkpoint, prepared)
    running = start_both(nodes, LAUNCH_SPOT="true")
    written = nodes[0] / "checkpoints" / "metrics.jsonl"
    launch.wait_for(written.exists, running[0])
    sagemaker.process_1(running[1]).send_signal(signal.SIGTERM)
    first = [sagemaker.process_1(node) for node in running]
    for process, node in zip(first, running, strict=True):
        launch.wait_for(lambda process=process: not launch.ranks(process), node, 60)
    assert list((nodes[0] / "checkpoints" / "checkpoints").glob("step-*"))
    time.sleep(3)
    assert [node.poll() for node in running] == [None, None]
    for process in first:
        process.kill()
    ends = [sagemaker.end(node, 60) for node in running]
    assert 0 not in [code for code, _, _ in ends]
    assert all("waits up to 130 s" in out for _, out, _ in ends)
