"""The loss is a sum and a count; its gradient is cross entropy's, also for no tokens at all."""

import math

import pytest
import torch
from torch.nn import functional as F

from longctx.model import loss as module
from longctx.model.loss import token_loss

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def example(dtype, num_tokens=37, vocab=50):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(num_tokens, vocab, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab, (num_tokens,), generator=generator)
    mask = torch.rand(num_tokens, generator=generator) > 0.3
    return logits.to(dtype).requires_grad_(), targets, mask


def reference(logits, targets, mask):
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, torch.where(mask, targets, -100), reduction="sum")


@pytest.mark.parametrize("chunk", [1 << 26, 64, 500])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_cross_entropy(dtype, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    logits, targets, mask = example(dtype)
    loss_sum, num_tokens = token_loss(logits, torch.where(mask, targets, -12345), mask)
    expected = reference(logits, targets, mask)
    assert loss_sum.dtype == dtype and num_tokens.dtype == torch.int64
    assert num_tokens == mask.sum()
    assert abs(loss_sum - expected) <= TOLERANCE[dtype] * expected
    ours, theirs = (torch.autograd.grad(2.5 * total, logits)[0] for total in (loss_sum, expected))
    assert (ours - theirs).abs().max() <= TOLERANCE[dtype] * theirs.abs().max()


def test_bfloat16_logits_are_summed_in_float32():
    logits, targets, mask = example(torch.bfloat16)
    loss_sum, _ = token_loss(logits, targets, mask)
    exact = logits.detach().double().requires_grad_()
    expected = reference(exact, targets, mask)
    assert loss_sum.dtype == torch.float32
    assert abs(loss_sum - expected) <= 1e-6 * expected
    (ours,), (theirs,) = torch.autograd.grad(loss_sum, logits), torch.autograd.grad(expected, exact)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, theirs.to(torch.float32).to(torch.bfloat16))


def test_nothing_trained_gives_zero_and_zero_gradients():
    logits, targets, mask = example(torch.float32)
    for rows in (slice(0, 0), slice(None)):
        loss_sum, num_tokens = token_loss(logits[rows], targets[rows], torch.zeros_like(mask[rows]))
        (grad,) = torch.autograd.grad(loss_sum, logits)
        assert loss_sum == 0 and num_tokens == 0
        assert torch.equal(grad, torch.zeros_like(logits))


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[300.0, 0.0], [-300.0, 300.0]], requires_grad=True)
    loss_sum, _ = token_loss(logits, torch.tensor([1, 1]), torch.tensor([True, True]))
    loss_sum.backward()
    assert loss_sum.item() == 300.0
    assert torch.isfinite(logits.grad).all()


def test_uniform_logits_cost_the_log_of_the_vocabulary():
    loss_sum, num_tokens = token_loss(torch.zeros(4, 64), torch.arange(4), torch.ones(4, dtype=torch.bool))
    assert (loss_sum / num_tokens).item() == pytest.approx(math.log(64), rel=1e-6)


def test_keeps_only_the_logits_for_backward():
    logits, targets, mask = example(torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        token_loss(logits, targets, mask)
    big = [x for x in saved if x.numel() >= logits.numel()]
    assert [x.data_ptr() for x in big] == [logits.data_ptr()]
