"""A script of the project that tells, as the last thing it does, which threads of gloo still live.

python tests/threads_at_exit.py train_lora|eval_wer --key value ...
"""

import atexit
import importlib
import sys
import time
from pathlib import Path


def gloo_threads() -> list[str]:
    names = []
    for task in Path("/proc/self/task").iterdir():
        try:
            names.append((task / "comm").read_text().strip())
        except OSError:  # it has just ended
            continue
    return sorted(name for name in names if "gloo" in name)


def tell() -> None:
    deadline = time.monotonic() + 2  # a joined thread may be listed a moment longer
    while gloo_threads() and time.monotonic() < deadline:
        time.sleep(0.05)
    print(f"threads of gloo at exit: {gloo_threads()}", flush=True)


if __name__ == "__main__":
    atexit.register(tell)  # before all others, so that it is called after them
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import cli  # noqa: E402

if __name__ == "__main__":
    script = importlib.import_module(sys.argv.pop(1))
    cli.run(script.main, script.Config)
