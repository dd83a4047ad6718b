"""The reference runs are scripts that work."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading

import launch
import pytest
import tiny

RUNS = sorted((launch.ROOT / "runs").glob("*.sh"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_a_reference_run_is_an_executable_script_that_says_how_to_call_it(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK)
    assert f"runs/{path.name}" in path.read_text(encoding="utf-8")


ASK = """
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect(os.environ["FORK_FOR_BASH"])
socket.send_fds(server, [json.dumps(sys.argv[1:]).encode()], [0, 1, 2])
sys.exit(int(server.recv(16)))
"""


@pytest.fixture
def python_in_bash(tmp_path):
    """Variables with which a Bash script's `python` is forked, by tests/launch.py."""
    (tmp_path / "ask.py").write_text(ASK)
    function = f'() {{ {sys.executable} -I -S {tmp_path}/ask.py "$@"; }}'
    with tempfile.TemporaryDirectory() as folder:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(f"{folder}/asked")  # short, as names of sockets must be
        listener.listen()

        def serve():
            while True:
                channel, _ = listener.accept()
                with channel:
                    content, files, *_ = socket.recv_fds(channel, 1 << 16, 3)
                    if not content:
                        return
                    streams = dict(zip(("stdin", "stdout", "stderr"), files, strict=True))
                    words = [sys.executable, *json.loads(content)]
                    code = launch.start(words, **streams).wait()
                    channel.send(str(code).encode())
                    for file in files:
                        os.close(file)

        server = threading.Thread(target=serve)
        server.start()
        try:
            yield {"FORK_FOR_BASH": f"{folder}/asked", "BASH_FUNC_python%%": function}
        finally:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as end:
                end.connect(f"{folder}/asked")
            server.join()
            listener.close()


@pytest.mark.slow
def test_the_measuring_run_scores_base_and_adapter_at_both_windows(
    checkpoint, tmp_path, python_in_bash
):
    clips = {"train": 10, "validation": 3, "test": 3}
    source = tiny.make_corpus(tmp_path / "source", clips=clips)
    done = subprocess.run(
        [launch.ROOT / "runs" / "measure.sh", source, "mr", checkpoint, tmp_path / "out"],
        env=os.environ | python_in_bash,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "out" / "wer" / "wer.json").read_text(encoding="utf-8"))
    for system in ("base", "adapter"):
        windows = {scores[system]["window"], scores[system]["other_window"]["window"]}
        assert windows == {"natural", "full"}, system
