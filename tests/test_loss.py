"""ops/loss.py against torch's own cross-entropy of whole logits."""

import pytest
import torch
import torch.nn.functional as F

from ops.loss import CrossEntropy, entropies


@pytest.mark.parametrize("chunk", [1, 7, 50, 1024])
def test_loss_and_gradients_equal_those_of_whole_logits(chunk):
    generator = torch.Generator().manual_seed(0)
    x, head = (torch.randn(n, 16, generator=generator).requires_grad_() for n in (50, 90))
    ids = torch.randint(90, (50,), generator=generator)
    weights = torch.rand(50, generator=generator)
    expected = (F.cross_entropy(x @ head.T, ids, reduction="none") * weights).sum()
    wanted = torch.autograd.grad(expected / 3, (x, head))
    found = CrossEntropy.apply(x, head, ids, weights, chunk)
    assert abs(found - expected) / expected < 1e-6
    for ours, theirs in zip(torch.autograd.grad(found / 3, (x, head)), wanted, strict=True):
        assert (ours - theirs).abs().max() < 1e-6


def test_a_gradient_in_16_bit_is_rounded_once():
    logits = torch.tensor([[9.0, 0.5, -1.0, 2.0], [0.0, 7.0, 7.0, -3.0]]).bfloat16()
    due = torch.tensor([0, 1])
    expected = logits.double().softmax(-1) - F.one_hot(due, 4)
    losses, gradient = entropies(logits, due)
    assert torch.equal(gradient, expected.bfloat16())
    assert expected[0, 0].abs() < 2e-3  # a softmax in 16 bit would leave nothing of it
    assert (losses - F.cross_entropy(logits.double(), due, reduction="none")).abs().max() < 1e-6
