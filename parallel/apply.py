"""The one order in which a model is made parallel; later axes join this list.

tensor -> checkpointing -> compile -> FSDP -> pipeline. Today: tensor, FSDP.
"""

from collections.abc import Iterable

from torch import nn

from . import fsdp
from .fsdp import FsdpPolicy
from .mesh import Mesh
from .tensor.split import split


def parallelize(model: nn.Module, blocks: Iterable[nn.Module], *, mesh: Mesh, policy: FsdpPolicy) -> None:
    """Make `model` parallel in place, over every axis of `mesh`.

    A model is always FSDP-wrapped, also on one rank, so that there is one path.

    Args:
        model: built, possibly on the meta device; parameters in the optimizer's dtype.
        blocks: its repeated blocks, in order.
        mesh: the world.
        policy: dtypes and resharding of FSDP.
    """
    blocks = list(blocks)
    split(model, blocks, mesh=mesh)
    fsdp.shard(model, blocks, mesh=mesh, policy=policy)
