"""Exchanging heads of q, k and v one by one, so that each exchange overlaps the next projection.

    stream = attend.stream(layout=layout, num_heads=H, num_kv_heads=K)
    stream.send("q", wq(x)); stream.send("k", wk(x)); stream.send("v", wv(x))
    out = stream.attend()

In the backward pass the gradients of v, k and q set out as soon as attention has them, and the
projections' backward passes run while the others travel.

Cost: the bytes of the synchronous exchange, in three calls instead of one.

Source: VeOmni's asynchronous Ulysses (idea; only its feature list was read).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..comm import Pending, all_to_all
from ..errors import ConfigError
from .heads import HeadShare
from .ulysses import HeadExchange

Tensor = torch.Tensor

NAMES = ("q", "k", "v")
"""What a stream sends; each label in `comm.Counter` is "ulysses_" and the name."""


class _Box:
    """A message under way between two autograd nodes, which see an empty token instead of it."""

    def __init__(self, name: str, num_heads: int, exchange: HeadExchange) -> None:
        self.name, self.num_heads, self.exchange = name, num_heads, exchange
        self._message: tuple[Tensor, Pending] | None = None

    def heads(self, share: HeadShare) -> tuple[int, int]:
        return share.q if self.name == "q" else share.kv

    def width(self, share: HeadShare) -> int:
        first, last = self.heads(share)
        return last - first

    def start(self, send: Tensor, counts: list[int], receive: list[int]) -> None:
        kind = f"ulysses_{self.name}"
        self._message = all_to_all(send, counts, receive, self.exchange.group, kind=kind)

    def wait(self) -> Tensor:
        assert self._message is not None
        (received, pending), self._message = self._message, None
        pending.wait()
        return received


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, box: _Box) -> Tensor:
        ctx.box, ctx.rows, ctx.dim = box, x.shape[0], x.shape[2]
        exchange = box.exchange
        # [t, H, D] -> per rank [t, h_u, D] -> [T_r, h, D]
        parts = [x[:, slice(*box.heads(share))].reshape(-1) for share in exchange.heads]
        width = box.width(exchange.mine)
        box.start(
            torch.cat(parts), [p.numel() for p in parts], [t * width * x.shape[2] for t in exchange.tokens]
        )
        return x.new_zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token: Tensor) -> tuple[Tensor, None]:
        box: _Box = ctx.box
        sizes = [ctx.rows * box.width(share) * ctx.dim for share in box.exchange.heads]
        received = box.wait()
        parts = [
            part.view(ctx.rows, box.width(share), ctx.dim)
            for part, share in zip(received.split(sizes), box.exchange.heads, strict=True)
        ]
        if sum(box.width(share) for share in box.exchange.heads) == box.num_heads:
            return torch.cat(parts, 1), None
        exact = torch.promote_types(received.dtype, torch.float32)
        total = received.new_zeros(ctx.rows, box.num_heads, ctx.dim, dtype=exact)
        for part, share in zip(parts, box.exchange.heads, strict=True):
            total[:, slice(*box.heads(share))] += part
        return total.to(received.dtype), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, box: _Box, dim: int) -> Tensor:
        ctx.box = box
        return box.wait().view(-1, box.width(box.exchange.mine), dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        box: _Box = ctx.box
        exchange, rows = box.exchange, box.exchange.tokens[box.exchange.group.rank]
        row = grad.shape[1] * grad.shape[2]
        box.start(
            grad.reshape(-1),
            [t * row for t in exchange.tokens],
            [rows * box.width(share) * grad.shape[2] for share in exchange.heads],
        )
        return grad.new_zeros(0), None, None


class HeadStream:
    """q, k and v on their way; made by `Attention.stream`, used once."""

    def __init__(
        self,
        exchange: HeadExchange | None,
        check: Callable[[str, Tensor], int],
        finish: Callable[..., Any],
    ) -> None:
        self._exchange, self._check, self._finish = exchange, check, finish
        self._sent: dict[str, tuple[Tensor, _Box | None, int]] = {}

    def send(self, name: str, x: Tensor) -> None:
        """Start the exchange of one projection.

        Args:
            name: "q", "k" or "v", in the same order on every rank.
            x: [t, H or K, D].

        Raises:
            ConfigError: unknown name, sent twice, or a tensor that does not fit the layout.
        """
        if name not in NAMES or name in self._sent:
            left = [n for n in NAMES if n not in self._sent]
            raise ConfigError(f"cannot send {name!r}; this stream still waits for {left}")
        num_heads = self._check(name, x)
        if self._exchange is None:
            self._sent[name] = x, None, x.shape[2]
            return
        box = _Box(name, num_heads, self._exchange)
        token = _Start.apply(x, box)  # type: ignore[no-untyped-call]
        self._sent[name] = token, box, x.shape[2]

    def attend(self, **options: Any) -> Any:
        """Wait for all three and attend; options and results are those of `Attention.__call__`.

        Raises:
            ConfigError: something was not sent yet.
        """
        missing = [name for name in NAMES if name not in self._sent]
        if missing:
            raise ConfigError(f"cannot attend yet; send {missing} first")
        tensors = [
            x if box is None else _Wait.apply(x, box, dim)  # type: ignore[no-untyped-call]
            for x, box, dim in (self._sent[name] for name in NAMES)
        ]
        return self._finish(*tensors, **options)
