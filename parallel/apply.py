"""The one order in which a model is made parallel; later axes join this list.

tensor -> compile -> checkpointing -> FSDP -> pipeline. A compiled block has gaps (communication stays
out of its graphs), and torch compiles nothing inside a checkpoint with gaps: so checkpointing goes around.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from . import fsdp
from .blocks import compile_blocks, recompute
from .fsdp import FsdpPolicy
from .mesh import Mesh
from .tensor.split import split


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockPolicy:
    """What happens to each block before FSDP."""

    recompute_every: int = 0
    """Activation checkpointing of every n-th block; 0: none, 1: all."""
    compile: bool = False
    """Whether each block is compiled with torch.compile."""


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
    if block_policy.compile:
        compile_blocks(blocks)
    recompute(blocks, block_policy.recompute_every)
    fsdp.shard(model, blocks, mesh=mesh, policy=policy)
