"""The training loss: from a batch's waves and labels to the cross entropy summed over its tokens.

A batch's logits are the largest tensor of a Whisper step: 52,000 numbers a token. Here they are
computed a few rows at a time, for rows that have a label, and their gradient with them.

Why not torch's own functions: for 1,024 label tokens of whisper-base on a CPU `cross_entropy` takes
530 MiB in float32 where this takes 20, in the same time. `linear_cross_entropy` of torch 2.13 in
pieces of as many rows is 1.3 times as slow, 5 times with the sizes it chooses itself, and returns
the sum in bfloat16 where the weight is: 11,264 for 11,225.

Legend: B batch, T label tokens of a clip, N label tokens of a batch, n of them at once, D width,
V vocabulary.
"""

from typing import Any

import torch

from common.adapter import base_of
from common.memory import LOGIT_ROWS
from common.whisper import features, run_encoder
from training.augment import mask_features
from training.lora import DropoutMasks


class SpeechLoss(torch.nn.Module):
    """From waves and labels to the summed loss: the module that engines wrap and training calls.

    It is composed around Whisper, or PEFT's model around Whisper, so that features are computed on
    the model's device, the encoder takes windows of any length, and one call passes through DDP's,
    FSDP's or DeepSpeed's wrapper. The stock loss is the mean over a micro-batch, which weighs a
    token by how many others are in its batch.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.masks = DropoutMasks(model)
        base = base_of(model)
        base.set_output_embeddings(LossHead(base.proj_out.weight))

    def get_input_embeddings(self) -> torch.nn.Module:
        """FSDP2 asks for both embeddings, to keep the weight that they share in one group."""
        return base_of(self.model).get_input_embeddings()

    def get_output_embeddings(self) -> torch.nn.Module:
        return base_of(self.model).get_output_embeddings()

    def forward(
        self,
        *,
        labels: torch.Tensor,
        decoder_input_ids: torch.Tensor,
        label_positions: torch.Tensor,
        waves: torch.Tensor | None = None,
        encoder_states: torch.Tensor | None = None,
        clip_seeds: torch.Tensor | None = None,
        spec_masks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Cross entropy summed over the label tokens of a batch, a float32 scalar.

        Args:
            labels, decoder_input_ids: (B, T).
            label_positions: (N) indices of the label tokens in the flattened `labels`.
            waves: int16 (B, samples) at 16 kHz; not needed where `encoder_states` are given.
            encoder_states: (B, C, D) cached outputs of a frozen encoder.
            clip_seeds: (B) seeds of the dropout on the adapter's input.
            spec_masks: (B, 2, K, 2) masks of features, as `training.augment.spec_masks` draws them.
        """
        base = base_of(self.model)
        if clip_seeds is not None and self.training:
            self.masks.draw(clip_seeds)
        if encoder_states is None:
            mel = features(base, waves)
            if spec_masks is not None:
                mel = mask_features(mel, spec_masks)
            encoder_states = run_encoder(base.model.encoder, mel)
        hidden = base.model.decoder(
            input_ids=decoder_input_ids, encoder_hidden_states=encoder_states, use_cache=False
        ).last_hidden_state  # (B, T, D)
        return base.proj_out(hidden, labels, label_positions)


class LossHead(torch.nn.Linear):
    """Whisper's `proj_out`: hidden states to logits or, given labels, to their summed loss.

    The loss is computed in a module's call because sharded engines gather a weight when the module
    that holds it is called.
    """

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = weight  # (V, D), shared with the token embedding

    def forward(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor | None = None,
        label_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Args: hidden (B, T, D), labels (B, T), label_positions (N) as in `SpeechLoss`."""
        if labels is None:
            return super().forward(hidden)
        return token_loss_sum(hidden, self.weight, labels, label_positions)


def token_loss_sum(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, label_positions: torch.Tensor
) -> torch.Tensor:
    """Cross entropy summed over the label tokens of a batch.

    Args:
        hidden: (B, T, D) last states of the decoder.
        weight: (V, D) of the projection to the vocabulary.
        labels: (B, T).
        label_positions: (N) indices of the label tokens in the flattened `labels`.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        rows = hidden.flatten(0, 1)[label_positions]
        return TokenLossSum.apply(rows, weight, labels.flatten()[label_positions])


class TokenLossSum(torch.autograd.Function):
    """Sum of the cross entropies of `hidden @ weight.T` against `targets`.

    The gradient of the loss with respect to the logits is softmax - one-hot, which is known as soon
    as the logits are; those with respect to `hidden` and, where it is trained, `weight` follow.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Args: hidden (N, D), weight (V, D), targets (N). Returns a float32 scalar."""
        rows = LOGIT_ROWS["cpu" if hidden.device.type == "cpu" else "cuda"]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), rows):
            piece = hidden[start : start + rows].to(weight.dtype)  # (n, D)
            target = targets[start : start + rows, None]  # (n, 1)
            logits = torch.mm(piece, weight.T).float()  # (n, V)
            logits -= logits.amax(dim=1, keepdim=True)
            target_logits = logits.gather(1, target)
            sums = logits.exp_().sum(dim=1, keepdim=True)  # logits are exponentials from here on
            total += (sums.log() - target_logits).sum()
            if not any(ctx.needs_input_grad):
                continue
            logits /= sums
            grad_logits = logits.scatter_add_(1, target, -torch.ones_like(sums)).to(weight.dtype)
            grad_hidden[start : start + rows] = torch.mm(grad_logits, weight)
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.T, piece)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(
        ctx: Any, grad_output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight = grad_weight * grad_output.to(grad_weight.dtype)
        return grad_hidden * grad_output.to(grad_hidden.dtype), grad_weight, None
