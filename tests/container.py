"""Be a container: a faked /opt/ml in a mount and process namespace of its own, then the command.

    python tests/container.py ML_FOLDER COMMAND ...

Input channels are read-only, as SageMaker has them; ML_FOLDER/hosts, where there is one, is the
list of names. The command is process 1, and the only child of this one, which ends as it does.
"""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

CLONE_NEWNS, CLONE_NEWPID = 0x0002_0000, 0x2000_0000  # linux/sched.h


def enter(ml: str) -> None:
    """Return as process 1 of the container; the process before waits for its end.

    Args:
        ml: the folder that is to be /opt/ml.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS | CLONE_NEWPID):
        raise OSError(ctypes.get_errno(), "unshare")
    if process_1 := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(process_1, 0)[1])
        os._exit(code if code >= 0 else 128 - code)
    mounts = [
        ["--make-rprivate", "/"],
        ["-t", "proc", "proc", "/proc"],
        ["--bind", ml, "/opt/ml"],
        ["--bind", f"{ml}/input", "/opt/ml/input"],
        ["-o", "remount,bind,ro", "/opt/ml/input"],
    ]
    if Path(ml, "hosts").is_file():
        mounts.append(["--bind", f"{ml}/hosts", "/etc/hosts"])
    for words in mounts:
        subprocess.run(["mount", *words], check=True)


if __name__ == "__main__":
    enter(sys.argv[1])
    os.execvp(sys.argv[2], sys.argv[2:])
