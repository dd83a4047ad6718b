"""Be a container: a faked /opt/ml in a mount and process namespace of its own, then the command.

    unshare --mount --pid --fork --mount-proc python tests/container.py ML_FOLDER COMMAND ...

Input channels are read-only, as SageMaker has them; ML_FOLDER/hosts, where there is one, is the
list of names. The command is process 1.
"""

import os
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    ml, *command = sys.argv[1:]
    mounts = [
        ["--make-rprivate", "/"],
        ["--bind", ml, "/opt/ml"],
        ["--bind", f"{ml}/input", "/opt/ml/input"],
        ["-o", "remount,bind,ro", "/opt/ml/input"],
    ]
    if Path(ml, "hosts").is_file():
        mounts.append(["--bind", f"{ml}/hosts", "/etc/hosts"])
    for words in mounts:
        subprocess.run(["mount", *words], check=True)
    os.execvp(command[0], command)
