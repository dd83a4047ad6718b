"""Cross entropy of label tokens without ever holding the logits of a whole batch.

A batch's logits are the largest tensor of a Whisper step: 52,000 numbers a token. Here they are
computed a few rows at a time, for the rows with a label only, and their gradient with them.

Legend: N label tokens of a batch, n of them at once, D width, V vocabulary.
"""

from typing import Any

import torch

ROWS_ON_CPU = 128  # n: 26 MB of logits, which the allocator reuses instead of returning
ROWS_ON_GPU = 2048  # n: large enough to fill a GPU, 425 MB


class TokenLossSum(torch.autograd.Function):
    """Sum of the cross entropies of `hidden @ weight.T` against `targets`.

    The gradient of the loss by the logits is softmax - one-hot, known once the logits are; those by
    `hidden` and, where it is trained, by `weight` follow from it.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Args: hidden (N, D), weight (V, D), targets (N). Returns a float32 scalar."""
        rows = ROWS_ON_CPU if hidden.device.type == "cpu" else ROWS_ON_GPU
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        by_hidden = torch.empty_like(hidden)
        by_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), rows):
            piece = hidden[start : start + rows].to(weight.dtype)  # (n, D)
            wanted = targets[start : start + rows, None]  # (n, 1)
            logits = torch.mm(piece, weight.T).float()  # (n, V)
            logits -= logits.amax(dim=1, keepdim=True)
            of_target = logits.gather(1, wanted)
            sums = logits.exp_().sum(dim=1, keepdim=True)  # logits are exponentials from here on
            total += (sums.log() - of_target).sum()
            if not any(ctx.needs_input_grad):
                continue
            logits /= sums
            by_logits = logits.scatter_add_(1, wanted, -torch.ones_like(sums)).to(weight.dtype)
            by_hidden[start : start + rows] = torch.mm(by_logits, weight)
            if by_weight is not None:
                by_weight.addmm_(by_logits.T, piece)
        ctx.save_for_backward(by_hidden, by_weight)
        return total

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        by_hidden, by_weight = ctx.saved_tensors
        scaled = None if by_weight is None else by_weight * outer.to(by_weight.dtype)
        return by_hidden * outer.to(by_hidden.dtype), scaled, None


def token_loss_sum(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, label_positions: torch.Tensor
) -> torch.Tensor:
    """Cross entropy summed over the label tokens of a batch.

    Args:
        hidden: (B, T, D) the decoder's last states.
        weight: (V, D) of the projection to the vocabulary.
        labels: (B, T).
        label_positions: (N) where in the flattened `labels` the label tokens are.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        rows = hidden.flatten(0, 1)[label_positions]
        return TokenLossSum.apply(rows, weight, labels.flatten()[label_positions])
