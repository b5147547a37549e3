"""From pieces in files into a rank's shard of a tensor, whatever boxes they are."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import CheckpointError
from .dtypes import ITEM_BYTES, torch_dtype
from .header import Piece
from .index import TensorIndex, read_piece
from .shard import Shard

CHUNK_BYTES = 32 << 20
"""Bytes of a tensor beside its destination at a time."""


@torch.no_grad()
def fill(index: TensorIndex, name: str, shard: Shard) -> None:
    """Copy what a rank holds of a tensor out of its files, cast to the shard's dtype.

    Raises:
        CheckpointError: the tensor is not there, has another shape, or its file is damaged.

    Cost:
        Reads the bytes of the rows that the shard needs, rounded up to blocks with a checksum;
        `CHUNK_BYTES` of memory where the shard cannot be read into directly.
    """
    stored = index.tensors.get(name)
    if stored is None or stored.shape != shard.shape:
        found = "absent" if stored is None else f"of shape {list(stored.shape)}"
        raise CheckpointError(
            f"{index.folder.where}: {name} is {found}, this model has it with shape {list(shard.shape)}; "
            "use the config that belongs to these weights"
        )
    local = shard.local.detach()
    filled = 0
    for piece in stored.pieces if local.numel() else ():
        box = _overlap(piece.offset, piece.shape, shard.offset, tuple(local.shape))
        if box is not None:
            _fill_box(index, piece, local, shard.offset, box)
            filled += math.prod(map(len, box))
    if filled != local.numel():
        raise CheckpointError(
            f"{index.folder.where}: files hold {filled} of this rank's {local.numel()} elements of {name}"
        )


def read_tensor(index: TensorIndex, name: str) -> Tensor:
    """A whole tensor on the CPU, in its own dtype."""
    stored = index.tensors[name]
    whole = torch.empty(stored.shape, dtype=torch_dtype(stored.dtype), device="cpu")
    fill(index, name, Shard(local=whole, shape=stored.shape, offset=(0,) * whole.ndim))
    return whole


def _overlap(
    a: Sequence[int], a_shape: Sequence[int], b: Sequence[int], b_shape: Sequence[int]
) -> list[range] | None:
    """Indices in the whole tensor that two boxes share, per dim."""
    box = [range(max(i, j), min(i + m, j + n)) for i, m, j, n in zip(a, a_shape, b, b_shape, strict=True)]
    return box if all(box) else None


def _fill_box(
    index: TensorIndex, piece: Piece, local: Tensor, offset: tuple[int, ...], box: list[range]
) -> None:
    source = [slice(r.start - o, r.stop - o) for r, o in zip(box, piece.offset, strict=True)]
    target = local[tuple(slice(r.start - o, r.stop - o) for r, o in zip(box, offset, strict=True))]
    item, dtype = ITEM_BYTES.get(piece.dtype, 1), _dtype(piece, index)
    piece_shape = piece.shape or (1,)
    if not source:  # a number
        source, target = [slice(0, 1)], target.view(1)
    width = math.prod(piece_shape[1:])  # elements of a row
    whole_rows = source[1:] == [slice(0, size) for size in piece_shape[1:]]
    rows = source[0]
    if whole_rows and target.dtype == dtype and target.device.type == "cpu" and target.is_contiguous():
        read_piece(index.folder, piece, rows.start * width * item, raw_bytes(target))
        return
    # A coded piece is decoded whole at every read, so it is read once.
    step = len(target) if piece.coded else max(1, CHUNK_BYTES // max(1, width * item))
    for first in range(rows.start, rows.stop, step):
        count = min(step, rows.stop - first)
        chunk = torch.empty((count, *piece_shape[1:]), dtype=dtype, device="cpu")
        read_piece(index.folder, piece, first * width * item, raw_bytes(chunk))
        target[first - rows.start : first - rows.start + count].copy_(chunk[(slice(None), *source[1:])])


def _dtype(piece: Piece, index: TensorIndex) -> torch.dtype:
    if piece.dtype not in ITEM_BYTES:  # read_piece refuses it by name
        read_piece(index.folder, piece, 0, memoryview(bytearray()))
    return torch_dtype(piece.dtype)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data
