"""The one order in which a model is made parallel; later axes join this list.

tensor -> deferred weight gradients -> compile -> checkpointing -> FSDP. A compiled block has gaps
(communication stays out of its graphs), and torch compiles nothing inside a checkpoint with gaps: so
checkpointing goes around.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from . import fsdp
from .blocks import compile_blocks, recompute, separate_attention
from .fsdp import FsdpPolicy
from .mesh import Mesh
from .pipeline.deferred import Deferred
from .tensor.split import split


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockPolicy:
    """What happens to each block before FSDP."""

    recompute_every: int = 0
    """Activation checkpointing of every n-th block; 0: none, 1: all."""
    compile: bool = False
    """Whether each block is compiled with torch.compile."""
    deferred: Deferred | None = None
    """Where the blocks' weight gradients are put off to; None: they are computed in backward."""
    sliced: bool = False
    """Whether sequences come in slices, so that every layer keeps keys of its own."""


def parallelize(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    *,
    mesh: Mesh,
    policy: FsdpPolicy,
    block_policy: BlockPolicy = BlockPolicy(),
) -> None:
    """Make `model` parallel in place, over every axis of `mesh`.

    A model is always FSDP-wrapped, also on one rank, so that there is one path.

    Args:
        model: built, possibly on the meta device; parameters in the optimizer's dtype.
        blocks: its repeated blocks, in order.
        mesh: the world.
        policy: dtypes and resharding of FSDP.
        block_policy: recomputation and compilation.
    """
    blocks = list(blocks)
    split(model, blocks, mesh=mesh)
    if block_policy.sliced:
        separate_attention(blocks)
    if block_policy.deferred is not None:
        block_policy.deferred.attach(blocks)
    if block_policy.compile:
        compile_blocks(blocks)
    recompute(blocks, block_policy.recompute_every)
    fsdp.shard(model, blocks, mesh=mesh, policy=policy)
