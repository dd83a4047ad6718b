"""train_lora.py that gets a SIGTERM in its second step, in whichever process is the last."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_lora
from common import cli

stock = train_lora.train_step


def step_with_signal(state, step, *given):
    stock(state, step, *given)
    if step.number == 1 and state.accelerator.is_last_process:
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    train_lora.train_step = step_with_signal
    cli.run(train_lora.main, train_lora.Config)
