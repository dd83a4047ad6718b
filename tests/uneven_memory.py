"""The script that SCRIPT names, train_lora or eval_wer; its last process has less free memory."""

import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import cli, memory

script = importlib.import_module(os.environ["SCRIPT"])
FREE = {"train_lora": (100.0, 7.0), "eval_wer": (100.0, 1e-3)}[script.__name__]  # by rank


def free_of_this_process(*_given):
    return FREE[int(os.environ["RANK"])]


def seconds_like_memory(*_given, memory_gib, **_options):
    """A plan that no process can share with one that has other memory."""
    return memory.MemoryPlan(memory_gib, False, memory_gib)


if __name__ == "__main__":
    script.device_memory_gib = free_of_this_process
    script.held_gib = lambda _device: 0.0
    script.plan_memory = seconds_like_memory
    cli.run(script.main, script.Config)
