"""Gradients across the mesh: one division by the step's token count, one norm, one clip."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from . import comm
from .comm import Group
from .mesh import Mesh


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replicas:
    """Parameters that several pipeline stages hold, such as a tied embedding."""

    parameters: tuple[nn.Parameter, ...]
    """This rank's shards of them; the same ones in the same order on every member of the group."""
    group: Group
    """The stages' ranks that hold the same shards."""


def normalize_(
    parameters: Iterable[nn.Parameter],
    *,
    mesh: Mesh,
    sums: torch.Tensor,
    replicas: Sequence[Replicas] = (),
) -> torch.Tensor:
    """Turn summed gradients into gradients of the mean loss over the step's trained tokens.

    Args:
        parameters: the model's parameters; their gradients are sums of token losses' gradients,
            already reduced over dp_shard x cp and dp_replicate.
        mesh: the world.
        sums: [n] float64: this rank's sum of token losses, its number of trained tokens, and
            whatever else the caller wants summed along, over the step's microbatches.
        replicas: parameters on several stages, each of which has seen some uses of them.

    Returns:
        [n] the same sums over all data ranks and stages.

    Cost:
        One all-reduce of n numbers; after backward, so the count need not be known before. With tp
        also one of this rank's shards of the parameters that tp leaves whole (norms), once a step
        however many microbatches it has.
    """
    parameters = list(parameters)
    total = comm.all_reduce(sums.clone(), group=mesh.group("data"))
    total = comm.all_reduce(total, group=mesh.group("pp"))
    _sum_whole_over_tp(parameters, mesh)
    for shared in replicas:
        _sum_(_local_gradients(shared.parameters), shared.group)
    # A step in which every token is masked has zero gradients: divide by 1, not by 0.
    torch._foreach_div_(_local_gradients(parameters), total[1].clamp(min=1))
    return total


def clip_(
    parameters: Iterable[nn.Parameter],
    max_norm: float,
    *,
    mesh: Mesh,
    replicas: Sequence[Replicas] = (),
) -> torch.Tensor:
    """Scale gradients so that their global 2-norm is at most `max_norm` (0: only measure).

    Args:
        parameters: parameters whose gradients are normalized, sharded over dp_shard x cp.
        max_norm: the bound; 0 leaves the gradients as they are.
        mesh: the world.
        replicas: parameters on several stages, whose norm the first of them counts.

    Returns:
        [] the norm before clipping, at least float32, equal on all ranks.

    Cost:
        One all-reduce of two numbers over the ranks that hold different shards; with tp one more, and
        with pp one more.
    """
    parameters = [p for p in parameters if p.grad is not None]
    gradients = _local_gradients(parameters)
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    norms = torch.stack(torch._foreach_norm([g.to(dtype) for g in gradients], 2))
    # tp ranks hold different parts of a split parameter, but the same whole ones: count those once.
    split = torch.tensor([is_split(p) for p in parameters], device=norms.device)
    repeated = {id(p) for shared in replicas if shared.group.rank for p in shared.parameters}
    counted = torch.tensor([id(p) not in repeated for p in parameters], device=norms.device)
    squares = torch.stack((norms[~split & counted].square().sum(), norms[split & counted].square().sum()))
    comm.all_reduce(squares, group=mesh.group("fsdp"))
    total = squares[0] + comm.all_reduce(squares[1:], group=mesh.group("tp"))[0]
    norm = comm.all_reduce(total, group=mesh.group("pp")).sqrt()
    if max_norm > 0:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def is_split(parameter: torch.Tensor) -> bool:
    """Whether tp ranks hold different parts of a parameter (else each holds the same)."""
    return isinstance(parameter, DTensor) and "tp" in (parameter.device_mesh.mesh_dim_names or ())


def _sum_whole_over_tp(parameters: list[nn.Parameter], mesh: Mesh) -> None:
    """Each tp rank has seen its tokens or heads only: add up the gradients of whole parameters."""
    if mesh.size("tp") == 1:
        return
    gradients = _local_gradients(p for p in parameters if not is_split(p))
    if not gradients:
        return
    _sum_(gradients, mesh.group("tp"))


def _sum_(gradients: list[torch.Tensor], group: Group) -> None:
    """Add up equally shaped tensors of all ranks, in place."""
    flat = comm.all_reduce(torch.cat([g.flatten() for g in gradients]), group=group)
    torch._foreach_copy_(gradients, [f.view_as(g) for f, g in _parts(flat, gradients)])


def _parts(flat: torch.Tensor, like: list[torch.Tensor]) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    return zip(flat.split([g.numel() for g in like]), like, strict=True)


def _local(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _local_gradients(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    return [_local(p.grad) for p in parameters if p.grad is not None]
