"""Gradients across the mesh: one division by the step's token count, one norm, one clip."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from . import comm
from .mesh import Mesh


def normalize_(parameters: Iterable[nn.Parameter], *, mesh: Mesh, sums: torch.Tensor) -> torch.Tensor:
    """Turn summed gradients into gradients of the mean loss over the step's trained tokens.

    Args:
        parameters: the model's parameters; their gradients are sums of token losses' gradients,
            already reduced over dp_shard x cp and dp_replicate.
        mesh: the world.
        sums: [n] float64: this rank's sum of token losses, its number of trained tokens, and
            whatever else the caller wants summed along, over the step's microbatches.

    Returns:
        [n] the same sums over all data ranks.

    Cost:
        One all-reduce of n numbers; after backward, so the count need not be known before.
    """
    total = comm.all_reduce(sums.clone(), group=mesh.group("data"))
    # A step in which every token is masked has zero gradients: divide by 1, not by 0.
    torch._foreach_div_(_local_gradients(parameters), total[1].clamp(min=1))
    return total


def clip_(parameters: Iterable[nn.Parameter], max_norm: float, *, mesh: Mesh) -> torch.Tensor:
    """Scale gradients so that their global 2-norm is at most `max_norm` (0: only measure).

    Args:
        parameters: parameters whose gradients are normalized, sharded over dp_shard x cp.
        max_norm: the bound; 0 leaves the gradients as they are.
        mesh: the world.

    Returns:
        [] the norm before clipping, at least float32, equal on all ranks.

    Cost:
        One all-reduce of one number over the ranks that hold different shards.
    """
    gradients = _local_gradients(parameters)
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    norms = torch._foreach_norm([g.to(dtype) for g in gradients], 2)
    square = torch.stack(norms).square().sum()
    norm = comm.all_reduce(square, group=mesh.group("fsdp")).sqrt()
    if max_norm > 0:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _local(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _local_gradients(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    return [_local(p.grad) for p in parameters if p.grad is not None]
