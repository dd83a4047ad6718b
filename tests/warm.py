"""Start the project's scripts without their imports, which take longer than most tests.

A server, a process of its own, imports what the scripts import; what it forks carries on as the
script: a child of the process that asked for it, with its own arguments, environment, folder,
output, process group and network. `accelerate launch` and the first process of a container
(tests/container.py) start their processes the same way. They share the seed of `hash`, a process
that is alone does not take down its modules at its end, and AWS's toolkit starts Python anew in a
container.
"""

import atexit
import ctypes
import functools
import gc
import importlib
import importlib.util
import inspect
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path
from typing import Any

import container

ROOT = Path(__file__).resolve().parent.parent
SERVER = "fork server"  # its name among processes
LAUNCHER = "accelerate.commands.launch"
IMPORTS = (
    LAUNCHER, "torch.distributed.run", "deepspeed", "train_lora", "eval_wer",
    "preprocess", "common.error_rate",
)  # fmt: skip
# Read while modules are imported: a command that changes one of them starts Python anew. What
# chooses a GPU is not among them: with one, nothing is forked.
READ_BY_IMPORTS = (
    "BNB_", "HF_", "HOME", "LANG", "LC_", "LD_", "OMP_", "PATH", "PYTHON", "TORCH_",
    "TRANSFORMERS_", "XDG_",
)  # fmt: skip
READ_LATER = ("HF_TOKEN", "HF_TOKEN_FROM")
MESSAGE_BYTES, ROOM_BYTES = 1 << 20, 1 << 15
NETWORK = ["ip", "netns", "exec"]  # and a name, before a command
CLONE_NEWNET = 0x4000_0000  # linux/sched.h
PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 15, 36  # linux/prctl.h


def call_libc(name: str, *arguments: Any) -> None:
    """Call a function of the C library that returns 0, or fails."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        raise OSError(ctypes.get_errno(), name)


def read_by_imports(environment: dict[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(READ_BY_IMPORTS) and name not in READ_LATER
    }


# ------ in the process that starts commands


class Popen(subprocess.Popen):
    """`subprocess.Popen` of `[python, script or -m module, ...]` that a server forks."""

    def __init__(self, args: Any, *, channel: socket.socket, **options: Any) -> None:
        self._channel = channel
        super().__init__(args, **options)

    def _execute_child(self, *given: Any) -> None:  # with the pipes made
        call = inspect.signature(super()._execute_child).bind(*given).arguments
        pipes = [call[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        files = [number if pipe == -1 else pipe for number, pipe in enumerate(pipes)]
        words, network = [str(word) for word in call["args"]], None
        if words[:3] == NETWORK:
            network, words = words[3], words[4:]
        request = {
            "words": words[1:],
            "network": network,
            "environment": dict(os.environ if call["env"] is None else call["env"]),
            "folder": str(call["cwd"] or Path.cwd()),
            "new_session": call["start_new_session"],
        }
        # An orphan of the server becomes a child of this process.
        call_libc("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        socket.send_fds(self._channel, [json.dumps(request).encode()], files)
        pid = self._channel.recv(MESSAGE_BYTES)
        call_libc("prctl", PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        if not pid:
            raise RuntimeError("the fork server has ended")
        self.pid, self._child_created = int(pid), True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(call[name] for name in ends))


@functools.cache
def server() -> tuple[socket.socket, dict[str, str]]:
    """Start this process's server; the channel to it, and the environment of its imports."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(Path(__file__)), str(theirs.fileno())]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    room = environment | {"ROOM": " " * ROOM_BYTES}  # see show_variables
    subprocess.Popen(words, cwd=ROOT, env=room, pass_fds=[theirs.fileno()], **quiet)
    theirs.close()
    if ours.recv(MESSAGE_BYTES) != b"ready":
        raise RuntimeError("the fork server cannot import the scripts")
    return ours, environment


def start(words: list[str], **options: Any) -> subprocess.Popen:
    """`subprocess.Popen(words, **options)`, forked where that is the same."""
    python = words[4:] if words[:3] == NETWORK else words
    if sys.platform != "linux" or python[0] != sys.executable or python[1] == "-c":
        return subprocess.Popen(words, **options)
    channel, environment = server()
    if read_by_imports(options["env"]) != read_by_imports(environment):
        return subprocess.Popen(words, **options)
    return Popen(words, channel=channel, **options)


# ------ in the server and what it forks


def leave_out_deepspeeds_extension() -> None:
    """On a CPU, DeepSpeed compiles an all-reduce for inference, which training never calls.

    It asks compilers what it can build, and then builds, for a minute, in the first run under ZeRO.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}


def serve(channel: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork for each request; returns, in the process that is to carry it out, it and its files."""
    call_libc("prctl", PR_SET_NAME, SERVER.encode())
    while True:
        content, files, *_ = socket.recv_fds(channel, MESSAGE_BYTES, 3)
        if not content:
            os._exit(0)
        if not (parent := os.fork()):
            parent = os.getpid()
            if not os.fork():
                break
            os._exit(0)  # leaves an orphan
        os.waitpid(parent, 0)
        for file in files:
            os.close(file)
    while os.getppid() == parent:
        time.sleep(0.001)
    channel.send(str(os.getpid()).encode())
    channel.close()
    call_libc("prctl", PR_SET_NAME, b"python")
    return json.loads(content), files


def become(request: dict[str, Any], files: list[int]) -> list[str]:
    """Take over what the request gives a process; its command, without Python."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    if request["new_session"]:
        os.setsid()
    if request["network"]:
        with Path("/var/run/netns", request["network"]).open() as namespace:
            call_libc("setns", namespace.fileno(), CLONE_NEWNET)
    os.chdir(request["folder"])
    for name in os.environ.keys() - SET_BY_IMPORTS:
        del os.environ[name]
    os.environ.update(request["environment"])
    show_variables(request["environment"])
    tempfile.tempdir = None
    words = request["words"]
    if words[0] == "-u":
        sys.stdout.reconfigure(write_through=True)
        del words[0]
    return words


def show_variables(environment: dict[str, str]) -> None:
    """Have /proc show this process's own variables, not the server's, where there is room.

    It shows the memory that they were in when the program was loaded, proc(5); by now `os.environ`
    has put each of them elsewhere.
    """
    numbers = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = map(int, numbers[47:49])  # fields 50 and 51
    content = b"".join(os.fsencode(f"{name}={environment[name]}\0") for name in environment)
    ctypes.memmove(start, content.ljust(end - start, b"\0")[: end - start], end - start)


def fork_a_server() -> socket.socket | None:
    """Fork what this process starts, as torch's launcher or otherwise; the child gets its channel.

    It starts Python for nothing else, and with variables that do not change what is tested.
    """
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork():
        theirs.close()
        cold = subprocess.Popen

        def begin(args: list[str], **options: Any) -> subprocess.Popen:
            if args[0] != sys.executable:
                return cold(args, **options)
            return Popen(args, channel=ours, **options)

        subprocess.Popen = subprocess_handler.Popen = begin
        return None
    ours.close()
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)
    os.close(nothing)
    return theirs


def run(words: list[str]) -> None:
    """Run `script ...`, `-m module ...` or `-c code ...` as this process's `__main__`."""
    main = types.ModuleType("__main__")
    if words[0] == "-c":
        main.__file__, sys.path[0] = "-c", ""
        words, code = words[1:], words[1]
    elif words[0] == "-m":
        words = words[1:]
        main.__spec__ = importlib.util.find_spec(words[0])
        code = main.__spec__.loader.get_code(words[0])
        main.__file__, sys.path[0] = main.__spec__.origin, str(Path.cwd())
    else:
        code = compile(Path(words[0]).read_bytes(), words[0], "exec")
        main.__file__, sys.path[0] = words[0], str(Path(words[0]).resolve().parent)
    sys.argv = [main.__file__, *words[1:]]
    sys.modules["warm"], sys.modules["__main__"] = sys.modules["__main__"], main
    exec(code, main.__dict__)


def run_to_the_end(words: list[str]) -> None:
    """`run`, then what the interpreter does at the end of a process.

    It would also take down all modules, which copies the server's memory: half a CPU second, more
    than most scripts need. A process of a group does, for its threads could crash there.
    """
    try:
        run(words)
    except SystemExit as error:
        if not isinstance(error.code, int | None):
            raise
        code = error.code or 0
    else:
        code = 0
    if "RANK" in os.environ:
        sys.exit(code)
    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    before = dict(os.environ)
    for name in IMPORTS:
        importlib.import_module(name)
    SET_BY_IMPORTS = {name for name in os.environ if os.environ[name] != before.get(name)}
    leave_out_deepspeeds_extension()
    gc.freeze()
    requests = socket.socket(fileno=int(sys.argv[1]))
    requests.send(b"ready")
    command = become(*serve(requests))
    starts_others = command[:2] == ["-m", LAUNCHER]
    if command[0] == container.__file__:
        _, ml, python, *command = command
        container.enter(ml)
        if python != sys.executable:
            os.execvp(python, [python, *command])
        starts_others = True
    while starts_others and (requests := fork_a_server()):
        command = become(*serve(requests))
        starts_others = command[:2] == ["-m", LAUNCHER]
    run_to_the_end(command)
