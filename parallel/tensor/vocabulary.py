"""Embedding, head and cross entropy split along the vocabulary.

Shapes: t = tokens of the data rank, n = rows of one tp rank, E = width, V = vocabulary rows,
v = this tp rank's rows of it, R = tp ranks.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import comm
from ..comm import Group
from ..errors import ConfigError
from ..mesh import Mesh
from .linear import local, split_parameter
from .tokens import gather_tokens, scatter_tokens

CHUNK_ELEMENTS = 1 << 26
"""Logits handled at a time (256 MiB in float32)."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VocabShard:
    """Rows of the vocabulary that one tp rank holds."""

    first: int
    """First row."""
    size: int
    """Number of rows, v."""
    group: Group
    """The tp ranks."""

    @classmethod
    def of(cls, num_rows: int, mesh: Mesh) -> "VocabShard":
        """This rank's share of `num_rows` rows, in torch's chunks.

        Raises:
            ConfigError: a rank would have none.
        """
        group = mesh.group("tp")
        chunk = -(-num_rows // group.size)
        if chunk * (group.size - 1) >= num_rows:
            raise ConfigError(
                f"model.vocab_size={num_rows} leaves a rank of parallel.tp={group.size} without rows; "
                "choose a smaller parallel.tp or model.vocab_size=auto"
            )
        first = chunk * group.rank
        return cls(first=first, size=min(chunk, num_rows - first), group=group)


class VocabEmbedding(nn.Module):
    """Each rank looks up the ids whose rows it holds; the sum over ranks is the embedding."""

    def __init__(self, whole: nn.Embedding, mesh: Mesh) -> None:
        super().__init__()
        self.shard = VocabShard.of(whole.num_embeddings, mesh)
        self.weight = split_parameter(whole.weight, 0, mesh)

    def forward(self, ids: Tensor) -> Tensor:
        """[t] -> [n, E]."""
        row = ids - self.shard.first
        held = (row >= 0) & (row < self.shard.size)
        x = F.embedding(torch.where(held, row, 0), local(self.weight)) * held[:, None]
        return scatter_tokens(x, self.shard.group)

    def project(self, x: Tensor) -> Tensor:
        """Logits of the rows this rank holds, where the head shares the weight: [n, E] -> [R n, v]."""
        return F.linear(gather_tokens(x, self.shard.group), local(self.weight))


class VocabHead(nn.Module):
    """The head's rows split over tp: [n, E] -> [R n, v]."""

    def __init__(self, whole: nn.Linear, mesh: Mesh) -> None:
        super().__init__()
        self.group = mesh.group("tp")
        self.weight = split_parameter(whole.weight, 0, mesh)
        self.bias = None if whole.bias is None else split_parameter(whole.bias, 0, mesh)

    def forward(self, x: Tensor) -> Tensor:
        """[n, E] -> [R n, v]."""
        bias = None if self.bias is None else local(self.bias)
        return F.linear(gather_tokens(x, self.group), local(self.weight), bias)


def split_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    loss_mask: Tensor,
    shard: VocabShard,
    *,
    losses: Tensor | None = None,
) -> Tensor:
    """Sum of the next-token losses of the trained tokens, from logits split along the vocabulary.

    Args:
        logits: [t, v] this rank's columns; the arithmetic is in at least float32.
        targets: [t] int64 in the whole vocabulary.
        loss_mask: [t] bool, True where the token is trained.
        shard: which columns these are.
        losses: [t] at least float32, overwritten with each token's loss, 0 where it is not trained.

    Returns:
        Scalar in nats, at least float32, equal on all tp ranks.

    Cost:
        One all-gather of 2 t numbers forward, nothing backward; saves the logits and [t] more.

    Source: Megatron-LM (Shoeybi et al. 2019), sec. 3.
    """
    loss: Tensor = _SplitCrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits, targets, loss_mask, shard, losses
    )
    return loss


class _SplitCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        loss_mask: Tensor,
        shard: VocabShard,
        kept: Tensor | None,
    ) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        row = targets - shard.first
        held = (row >= 0) & (row < shard.size) & loss_mask
        row = torch.where(held, row, 0)
        # Two numbers a token: log sum exp over the columns held, and the target's logit where held.
        mine = logits.new_zeros(2, len(targets), dtype=wide)
        for rows in _chunks(logits):
            part = logits[rows].to(wide)
            mine[0, rows] = part.logsumexp(-1)
            mine[1, rows] = part.gather(-1, row[rows, None])[:, 0] * held[rows]
        every = comm.all_gather(mine[None], shard.group)  # [R, 2, t]
        lse = every[:, 0].logsumexp(0)  # in rank order on every rank: the same bits
        ctx.save_for_backward(logits, row, held, loss_mask, lse)
        losses = torch.where(loss_mask, lse - every[:, 1].sum(0), 0.0)
        if kept is not None:
            kept.copy_(losses)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, row, held, loss_mask, lse = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        weights = (loss_mask * grad)[:, None]  # [t, 1]
        for rows in _chunks(logits):
            probs = (logits[rows].to(lse.dtype) - lse[rows, None]).exp_()
            probs.scatter_add_(-1, row[rows, None], -held[rows, None].to(probs.dtype))
            torch.mul(probs, weights[rows], out=grad_logits[rows])
        return grad_logits, None, None, None, None


def _chunks(logits: Tensor) -> list[slice]:
    num_tokens, width = logits.shape
    size = max(1, CHUNK_ELEMENTS // width)
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]
