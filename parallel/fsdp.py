"""Fully sharded data parallelism over dp_shard x cp (FSDP2), with gradients that are sums.

A sequence group's ranks hold different tokens of the same microbatch, and groups may hold
different numbers of tokens, so no per-rank mean is ever right: FSDP reduces with SUM, and
`grads.normalize_` divides once by the step's token count.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from .mesh import Mesh


@dataclass(frozen=True, kw_only=True, slots=True)
class FsdpPolicy:
    """How parameters are stored, computed with and reduced."""

    param_dtype: torch.dtype
    """Dtype of the gathered parameters, hence of the computation."""
    reduce_dtype: torch.dtype
    """Dtype of the gradient reduction; also of the sharded gradient."""
    reshard_after_forward: bool | int = True
    """After forward free a block's gathered parameters (ZeRO-3), keep them until backward (False,
    ZeRO-2), or keep a copy sharded over so many consecutive ranks (ZeRO++'s secondary shard)."""


def shard(model: nn.Module, blocks: Iterable[nn.Module], *, mesh: Mesh, policy: FsdpPolicy) -> None:
    """Wrap each block, then the root, so that parameters become shards over dp_shard x cp.

    Args:
        model: the root, in the dtype of the optimizer's parameters.
        blocks: the modules that are gathered one at a time (the decoder's layers).
        mesh: the world; with dp_replicate > 1 this is HSDP.
        policy: dtypes and resharding.

    Cost:
        Per microbatch 2 all-gathers and one reduce-scatter of each block's parameters.
    """
    mixed = MixedPrecisionPolicy(
        param_dtype=policy.param_dtype, reduce_dtype=policy.reduce_dtype, cast_forward_inputs=False
    )
    for block in blocks:
        fully_shard(
            block, mesh=mesh.fsdp_mesh, mp_policy=mixed, reshard_after_forward=policy.reshard_after_forward
        )
    fully_shard(model, mesh=mesh.fsdp_mesh, mp_policy=mixed, reshard_after_forward=False)
    for module in fsdp_modules(model):
        # Neither setter recurses, and a factor on the root alone is silently wrong. Without the
        # second one the reduction is PREMUL_SUM, which gloo does not have.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """Every FSDP-wrapped module below `model`, the root included."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def forward_only(model: nn.Module) -> Iterator[None]:
    """Run forwards that no backward follows.

    FSDP keeps the root gathered after its forward, for a backward that never comes here: until it
    is sharded again, `model.parameters()` are whole plain tensors that no optimizer knows, and a
    checkpoint taken then would miss their moments.
    """
    with torch.no_grad():
        yield
    reshard(model)  # not after an error, which this would hide by another


def set_gradient_sync(model: nn.Module, sync: bool) -> None:
    """Reduce gradients at the next backward (the step's last microbatch) or only accumulate."""
    if not isinstance(model, FSDPModule):
        raise TypeError(f"{type(model).__name__} is not FSDP-wrapped; call parallel.apply.parallelize first")
    model.set_requires_gradient_sync(sync)


def set_last_backward(model: nn.Module, last: bool) -> None:
    """Say whether the next backward is the last one of a step that has several under way.

    Before it gradients only accumulate and parameters stay gathered. Resharding must follow the last
    one: an optimizer step on shards whose gathered copy stays would never reach the next forward.
    """
    if not isinstance(model, FSDPModule):
        raise TypeError(f"{type(model).__name__} is not FSDP-wrapped; call parallel.apply.parallelize first")
    model.set_requires_gradient_sync(last)
    model.set_reshard_after_backward(last)
    model.set_is_last_backward(last)  # not recursive: it is of the root's shared state


def gather(model: nn.Module) -> None:
    """Gather every parameter, before ranks go on at their own pace; all ranks call it together."""
    for module in fsdp_modules(model):
        module.unshard()


def reshard(model: nn.Module) -> None:
    """Free every gathered parameter."""
    for module in fsdp_modules(model):
        module.reshard()
