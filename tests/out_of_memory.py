"""train_lora.py whose last process has no memory for two clips at once, from its second step on."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import train_lora
from common import cli
from training import step

stock_step, stock_loss = train_lora.train_step, step.batch_loss
begun = []


def step_that_counts(state, *given):
    if state.accelerator.is_last_process:
        begun.append(state)
    stock_step(state, *given)


def loss_of_one_clip(model, inputs):
    if model.training and len(begun) > 1 and len(inputs["labels"]) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return stock_loss(model, inputs)


if __name__ == "__main__":
    train_lora.train_step, step.batch_loss = step_that_counts, loss_of_one_clip
    cli.run(train_lora.main, train_lora.Config)
