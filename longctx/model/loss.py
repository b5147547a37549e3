"""Cross entropy as a sum and a count, never a mean: the mean is taken once per step, over all ranks.

Shapes: t = this rank's tokens (possibly none), V = vocab_size.
"""

from typing import Any

import torch
from torch import Tensor

from parallel.tensor.vocabulary import VocabShard, split_cross_entropy

CHUNK_ELEMENTS = 1 << 26
"""Logits handled at a time (256 MiB in float32): bounds the temporaries, which [t, V] would not."""


def token_loss(
    logits: Tensor,
    targets: Tensor,
    loss_mask: Tensor,
    shard: VocabShard | None = None,
    *,
    losses: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of the next-token losses of the trained tokens, and how many there are.

    Args:
        logits: [t, V], any floating dtype; the arithmetic is in at least float32.
        targets: [t] int64; any value where `loss_mask` is False.
        loss_mask: [t] bool, True where the token is trained.
        shard: the columns that `logits` are, where the vocabulary is split; None: all V.
        losses: [t] at least float32, overwritten with each token's loss, 0 where it is not trained.

    Returns:
        loss_sum: scalar in nats, at least float32; zero, with zero gradients, without trained tokens.
        num_tokens: scalar int64.

    Cost: saves the logits themselves and [t] more; two passes over the logits, one in backward.
    """
    targets = torch.where(loss_mask, targets, 0)
    if shard is not None:
        return split_cross_entropy(logits, targets, loss_mask, shard, losses=losses), loss_mask.sum()
    loss_sum: Tensor = _TokenLoss.apply(logits, targets, loss_mask, losses)  # type: ignore[no-untyped-call]
    return loss_sum, loss_mask.sum()


class _TokenLoss(torch.autograd.Function):
    """Cross entropy that keeps no [t, V] tensor beside the logits it was given."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, loss_mask: Tensor, kept: Tensor | None) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        losses = logits.new_zeros(len(targets), dtype=wide)
        for rows in _chunks(logits):
            log_probs = torch.log_softmax(logits[rows], dim=-1, dtype=wide)
            losses[rows] = log_probs.gather(-1, targets[rows, None])[:, 0].neg_()
        ctx.save_for_backward(logits, targets, loss_mask)
        losses = torch.where(loss_mask, losses, 0.0)
        if kept is not None:
            kept.copy_(losses)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, targets, loss_mask = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        weights = (loss_mask * grad)[:, None]  # [t, 1]
        for rows in _chunks(logits):
            probs = torch.softmax(logits[rows], dim=-1, dtype=grad.dtype)
            probs.scatter_add_(-1, targets[rows, None], probs.new_full((1, 1), -1.0).expand(len(probs), 1))
            torch.mul(probs, weights[rows], out=grad_logits[rows])
        return grad_logits, None, None, None


def _chunks(logits: Tensor) -> list[slice]:
    num_tokens, vocab_size = logits.shape
    size = max(1, CHUNK_ELEMENTS // vocab_size)
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]
