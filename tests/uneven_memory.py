"""The script that SCRIPT names, train_lora or eval_wer; its last process has less free memory."""

import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import cli, memory, predictions

FREE = {"train_lora": (100.0, 7.0), "eval_wer": (100.0, 1e-3)}  # GiB by rank, or seconds


def seconds_like_memory(*_given, memory_gib, **_options):
    """A plan that no process can share with one that has other memory."""
    return memory.MemoryPlan(memory_gib, False, memory_gib)


if __name__ == "__main__":
    script = importlib.import_module(os.environ["SCRIPT"])
    free = FREE[script.__name__][int(os.environ["RANK"])]
    memory.device_memory_gib = predictions.device_memory_gib = lambda *_given: free
    memory.held_gib = lambda _device: 0.0
    memory.plan_memory = seconds_like_memory
    cli.run(script.main, script.Config)
