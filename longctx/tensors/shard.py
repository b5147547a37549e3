"""The part of a tensor that a rank holds, whatever splits it."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A box of a tensor."""

    local: Tensor
    """Its storage."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    offset: tuple[int, ...]
    """Index of the shard's first element in the whole."""


def shard_of(tensor: Tensor) -> Shard:
    """This rank's part of a DTensor; a plain tensor whole."""
    if not isinstance(tensor, DTensor):
        return Shard(local=tensor, shape=tuple(tensor.shape), offset=(0,) * tensor.ndim)
    with torch.no_grad():
        local, shape = tensor.to_local(), tuple(tensor.shape)
    if local.shape == tensor.shape:  # the search below takes 0.1 ms
        return Shard(local=local, shape=shape, offset=(0,) * tensor.ndim)
    _, offset = compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)
    return Shard(local=local, shape=shape, offset=tuple(offset))
