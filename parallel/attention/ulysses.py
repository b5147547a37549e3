"""Exchanging heads for tokens: each ulysses rank ends with all tokens and some heads.

t tokens of this rank, T_r of its ring rank; H, K query and key/value heads of the layer, h, j those
of this ulysses rank. One all-to-all takes q, k and v there, one takes the result back.

Cost: each way (U - 1) / U of the rank's tokens times its heads; key heads that several ranks use
are sent to each of them.

Source: DeepSpeed Ulysses (Jacobs et al.), extended to uneven heads and tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..comm import Group, all_to_all
from .heads import HeadShare

Tensor = torch.Tensor

QKV, OUT = "ulysses_qkv", "ulysses_out"
"""Labels of the two exchanges in `comm.Counter`; their gradients count under the same labels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadExchange:
    """The division of tokens and heads among the ranks of a ulysses group."""

    group: Group
    """The ranks."""
    tokens: tuple[int, ...]
    """Tokens of each rank; they sum to T_r."""
    heads: tuple[HeadShare, ...]
    """Heads of each rank."""

    @property
    def mine(self) -> HeadShare:
        """Heads of this rank."""
        return self.heads[self.group.rank]


def scatter_heads(q: Tensor, k: Tensor, v: Tensor, exchange: HeadExchange) -> tuple[Tensor, Tensor, Tensor]:
    """[t, H | K | K, D] -> [T_r, h | j | j, D] of this rank's heads."""
    return _Scatter.apply(q, k, v, exchange)  # type: ignore[no-untyped-call, no-any-return]


def gather_heads(out: Tensor, exchange: HeadExchange) -> Tensor:
    """[T_r, h, D] -> [t, H, D] of this rank's tokens."""
    return _Gather.apply(out, exchange)  # type: ignore[no-untyped-call, no-any-return]


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, exchange: HeadExchange) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.num_heads, ctx.num_kv_heads = exchange, q.shape[1], k.shape[1]
        own, dim = exchange.mine, q.shape[2]
        widths = [s.num_q + 2 * s.num_kv for s in exchange.heads]
        counts = [q.shape[0] * width * dim for width in widths]
        send = q.new_empty(sum(counts))
        for part, width, share in zip(send.split(counts), widths, exchange.heads, strict=True):
            parts = (q[:, slice(*share.q)], k[:, slice(*share.kv)], v[:, slice(*share.kv)])
            torch.cat(parts, 1, out=part.view(-1, width, dim))
        # per rank [t, h_u + 2 j_u, D], flat one after another -> [T_r, h + 2 j, D]
        width = widths[exchange.group.rank]
        received, pending = all_to_all(
            send, counts, [t * width * dim for t in exchange.tokens], exchange.group, kind=QKV
        )
        pending.wait()
        rows = received.view(-1, width, dim)
        q, k, v = rows.split((own.num_q, own.num_kv, own.num_kv), dim=1)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        exchange: HeadExchange = ctx.exchange
        rows, dim = exchange.tokens[exchange.group.rank], dq.shape[2]
        packed = torch.cat((dq, dk, dv), 1)  # [T_r, h + 2 j, D]
        widths = [s.num_q + 2 * s.num_kv for s in exchange.heads]
        received, pending = all_to_all(
            packed.view(-1),
            [t * packed.shape[1] * dim for t in exchange.tokens],
            [rows * width * dim for width in widths],
            exchange.group,
            kind=QKV,
        )
        pending.wait()
        parts = received.split([rows * width * dim for width in widths])
        blocks = [part.view(rows, width, dim) for part, width in zip(parts, widths, strict=True)]
        return *_assemble(blocks, exchange, ctx.num_kv_heads), None


def _assemble(
    blocks: list[Tensor], exchange: HeadExchange, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Per rank [t, h_u + 2 j_u, D] -> dq [t, H, D], dk and dv [t, K, D], summed where heads were shared."""
    pairs = list(zip(blocks, exchange.heads, strict=True))
    dq = torch.cat([block[:, : share.num_q] for block, share in pairs], 1)
    if sum(share.num_kv for share in exchange.heads) == num_kv_heads:
        dk = torch.cat([block[:, share.num_q : share.num_q + share.num_kv] for block, share in pairs], 1)
        dv = torch.cat([block[:, share.num_q + share.num_kv :] for block, share in pairs], 1)
        return dq, dk, dv
    exact = torch.promote_types(dq.dtype, torch.float32)
    dkv = dq.new_zeros(2, dq.shape[0], num_kv_heads, dq.shape[2], dtype=exact)
    for block, share in pairs:
        first, last = share.num_q, share.num_q + share.num_kv
        dkv[0][:, slice(*share.kv)] += block[:, first:last]
        dkv[1][:, slice(*share.kv)] += block[:, last:]
    return dq, dkv[0].to(dq.dtype), dkv[1].to(dq.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, exchange: HeadExchange) -> Tensor:
        ctx.exchange = exchange
        rows, dim, own = exchange.tokens[exchange.group.rank], out.shape[2], exchange.mine
        # [T_r, h, D] by tokens -> per rank [t, h_u, D] -> [t, H, D]
        sizes = [rows * share.num_q * dim for share in exchange.heads]
        received, pending = all_to_all(
            out.contiguous().view(-1),
            [t * own.num_q * dim for t in exchange.tokens],
            sizes,
            exchange.group,
            kind=OUT,
        )
        pending.wait()
        parts = zip(received.split(sizes), exchange.heads, strict=True)
        return torch.cat([part.view(rows, share.num_q, dim) for part, share in parts], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        exchange: HeadExchange = ctx.exchange
        dim, own = dout.shape[2], exchange.mine
        packed = [dout[:, slice(*share.q)].reshape(-1) for share in exchange.heads]
        received, pending = all_to_all(
            torch.cat(packed),
            [p.numel() for p in packed],
            [t * own.num_q * dim for t in exchange.tokens],
            exchange.group,
            kind=OUT,
        )
        pending.wait()
        return received.view(-1, own.num_q, dim), None
