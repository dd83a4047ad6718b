"""The loss that never holds a batch's logits: values and gradients of the plain one."""

import pytest
import torch
import torch.nn.functional as F

from training import loss


def example(tokens, dtype=torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(3, 100, 16, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 50, (3, 100))
    positions = torch.randperm(300)[:tokens].sort().values
    return hidden, torch.randn(50, 16, dtype=dtype), labels, positions


@pytest.mark.parametrize("tokens", [1, 127, 128, 300])
def test_loss_and_gradient_are_those_of_cross_entropy(tokens):
    hidden, weight, labels, positions = example(tokens)
    weight.requires_grad = True
    ignored = torch.full_like(labels.flatten(), -100)
    ignored[positions] = labels.flatten()[positions]
    plain = F.cross_entropy((hidden @ weight.T).flatten(0, 1), ignored, reduction="sum")
    expected = torch.autograd.grad(plain * 0.3, (hidden, weight))

    own = loss.token_loss_sum(hidden, weight, labels, positions)
    got = torch.autograd.grad(own * 0.3, (hidden, weight))
    assert own.item() == pytest.approx(plain.item(), rel=1e-5)
    for one, other in zip(got, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-4), (one - other).abs().max()


def test_a_batch_of_nothing_but_filler_has_no_loss_and_no_gradient():
    hidden, weight, labels, positions = example(0)
    own = loss.token_loss_sum(hidden, weight, labels, positions)
    (got,) = torch.autograd.grad(own, hidden)
    assert own.item() == 0.0
    assert not got.any()


def test_bfloat16_weights_give_the_loss_to_their_precision():
    hidden, weight, labels, positions = example(200, torch.float32)
    exact = loss.token_loss_sum(hidden, weight, labels, positions)
    rounded = loss.token_loss_sum(hidden, weight.bfloat16(), labels, positions)
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)
