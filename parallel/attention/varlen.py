"""Batches of tiles as calls of a flash-attention library's variable-length functions.

Those functions take packed rows, int32 offsets, `causal`, and a window (left, right) that is
counted from the bottom right corner: row i of n sees column j of m if
i + m - n - left <= j <= i + m - n + right. A tile's band low <= i - j <= high is therefore
left = high + m - n and right = n - m - low; a trimmed tile has neither below 0. Tiles of one
batch whose m - n differs go to separate calls.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import torch

from .kernels import Backward, Forward, Packing, packed, packing
from .tiles import Tile, TileBatch, batches

Tensor = torch.Tensor

HALF = frozenset({torch.bfloat16, torch.float16})
"""Dtypes of every flash-attention library."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What one call of a variable-length function computes, beside its tensors."""

    packing: Packing
    """Offsets and largest lengths."""
    causal: bool
    """Causal squares; `left` and `right` are then None."""
    left: int | None
    """Keys seen before the bottom-right diagonal; None for all."""
    right: int | None
    """Keys seen behind it; None for all."""
    scale: float
    """Factor on the logits."""
    deterministic: bool
    """Whether torch was told to use deterministic algorithms."""


class LaunchForward(Protocol):
    """Packed q [n, H, D], k and v [m, K, D] -> out [n, H, D], lse [H, n] float32."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, launch: Launch) -> tuple[Tensor, Tensor]:
        """Attend."""


class LaunchBackward(Protocol):
    """The same tensors with dout, out and a contiguous lse -> dq, dk, dv, packed."""

    def __call__(  # noqa: PLR0913 -- the arguments of the formula
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, launch: Launch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Differentiate."""


def varlen_forward(call: LaunchForward) -> Forward:
    """A kernel's forward function that makes one call per `launches` entry."""

    def forward(q: Tensor, k: Tensor, v: Tensor, *, batch: TileBatch, scale: float) -> tuple[Tensor, Tensor]:
        results = []
        for part in launches(batch):
            rows = _rows(q, part, keys=False), _rows(k, part, keys=True), _rows(v, part, keys=True)
            out, lse = call(*rows, launch_of(part, scale, q.device))
            if lse.shape != (q.shape[1], out.shape[0]):
                raise RuntimeError(
                    f"the library returned lse {tuple(lse.shape)} for {out.shape[0]} rows and {q.shape[1]} "
                    "heads, not [heads, rows]; its version is not one that this adapter was written for"
                )
            results.append((out, lse))
        out, lse = _in_tile_order(batch, results, keys=(False, False), dims=(0, 1))
        return out, lse

    return forward


def varlen_backward(call: LaunchBackward) -> Backward:
    """A kernel's backward function that makes one call per `launches` entry."""

    def backward(  # noqa: PLR0913 -- see Backward
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        batch: TileBatch,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        results = []
        for part in launches(batch):
            d, o, rows = (_rows(x, part, keys=False) for x in (dout, out, q))
            keys, values = _rows(k, part, keys=True), _rows(v, part, keys=True)
            sums = packed(lse, part, keys=False, dim=1).contiguous()  # libraries index it as [H, n]
            results.append(call(d, rows, keys, values, o, sums, launch_of(part, scale, q.device)))
        dq, dk, dv = _in_tile_order(batch, results, keys=(False, True, True), dims=(0, 0, 0))
        return dq, dk, dv

    return backward


def launches(batch: TileBatch) -> tuple[TileBatch, ...]:
    """The batch as batches that one window describes; itself unless a band's tiles differ in shape."""
    if batch.form != "band":
        return (batch,)
    if "launches" not in batch.cache:
        groups: dict[int, list[Tile]] = {}
        for tile in batch.tiles:
            groups.setdefault(tile.columns - tile.rows, []).append(tile)
        parts = [part for group in groups.values() for part in batches(group, batch.heads)]
        batch.cache["launches"] = (batch,) if len(parts) == 1 else tuple(parts)
    found: tuple[TileBatch, ...] = batch.cache["launches"]
    return found


def launch_of(batch: TileBatch, scale: float, device: torch.device) -> Launch:
    """The arguments of the call for one of `launches`."""
    left: int | None = None
    right: int | None = None
    if batch.form == "band":
        wider = batch.tiles[0].columns - batch.tiles[0].rows
        left = None if batch.high is None else batch.high + wider
        right = None if batch.low is None else -batch.low - wider
        assert min(left or 0, right or 0) >= 0, f"{batch.tiles[0]} is not trimmed"
    return Launch(
        packing=packing(batch, device),
        causal=batch.form == "causal",
        left=left,
        right=right,
        scale=scale,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def gpu_reason(module: str | None, low: int, high: int = 99) -> Callable[[], str | None]:
    """Why a library cannot run here: no CUDA device, its capability, or the import's error.

    Args:
        module: what must import, or None for torch itself.
        low: least major compute capability.
        high: largest major compute capability.
    """

    def reason() -> str | None:
        if not torch.cuda.is_available():
            return "no CUDA device is visible"
        major, minor = torch.cuda.get_device_capability()
        if not low <= major <= high:
            return f"needs compute capability {low}.x{'' if high == low else ' or more'}, not {major}.{minor}"
        return None if module is None else import_reason(module)

    return reason


def import_reason(module: str) -> str | None:
    """Why a module does not import, or None if it does."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a wheel built for another torch fails in many ways
        absent = isinstance(error, ModuleNotFoundError)
        return f"{module} is not installed" if absent else f"{module} does not import ({error})"
    return None


def library(module: str) -> ModuleType:
    """The imported module; `gpu_reason` has seen that it imports."""
    return importlib.import_module(module)


def _rows(x: Tensor, batch: TileBatch, *, keys: bool) -> Tensor:
    rows = packed(x, batch, keys=keys)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _in_tile_order(
    batch: TileBatch, results: Sequence[tuple[Tensor, ...]], *, keys: tuple[bool, ...], dims: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """Join the results of several launches so that rows lie in the order of the batch's tiles."""
    if len(results) == 1:
        return results[0]
    order = {id(tile): index for index, tile in enumerate(batch.tiles)}
    joined = []
    for index, (of_keys, dim) in enumerate(zip(keys, dims, strict=True)):
        pieces: list[Tensor | None] = [None] * len(batch.tiles)
        for part, result in zip(launches(batch), results, strict=True):
            lengths = [tile.columns if of_keys else tile.rows for tile in part.tiles]
            for tile, piece in zip(part.tiles, result[index].split(lengths, dim), strict=True):
                pieces[order[id(tile)]] = piece
        joined.append(torch.cat([piece for piece in pieces if piece is not None], dim))
    return tuple(joined)
