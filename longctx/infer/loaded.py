"""A model without a run: no data, no optimizer; parameters streamed into this rank's shards."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallel.apply import parallelize
from parallel.attention import make_attention
from parallel.config import ParallelConfig
from parallel.fsdp import FsdpPolicy
from parallel.mesh import Mesh, build_mesh

from ..build import World, join
from ..hf.source import Source
from ..model.decoder import Decoder
from ..rope.tables import Attend
from ..tensors.fill import fill
from ..tensors.shard import shard_of
from .cache import CachedAttend


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A model and the processes that hold it."""

    mesh: Mesh
    """All ranks share the parameters (dp_shard) and compute the same."""
    model: Decoder
    """Sharded."""
    cache: CachedAttend
    """Its attention: remembers keys and values from call to call."""
    device: torch.device
    """Of this rank."""

    def close(self) -> None:
        """Drop the process groups."""
        self.mesh.close()
        dist.destroy_process_group()


def alone(device: torch.device) -> World:
    """A world of one process, without a port."""
    return World(rank=0, size=1, device=device, store=dist.HashStore())


def load_model(source: Source, world: World, dtype: torch.dtype) -> Loaded:
    """Load a model over the ranks of a world that has no process group yet.

    Args:
        source: opened model.
        world: the processes; each holds 1 / size of the parameters.
        dtype: of parameters and activations.

    Raises:
        CheckpointError: a file is damaged.
    """
    join(world)
    mesh = build_mesh(ParallelConfig(dp_shard=world.size), world.device.type)
    prefill: Attend = make_attention("local", mesh)
    cache = CachedAttend(prefill, source.model.num_layers)
    with torch.device("meta"):
        model = Decoder(source.model, cache).to(dtype)
    policy = FsdpPolicy(param_dtype=dtype, reduce_dtype=dtype)
    parallelize(model, model.layers.values(), mesh=mesh, policy=policy)
    model.to_empty(device=world.device)
    for name, parameter in model.named_parameters():
        fill(source.index, name, shard_of(parameter))
    return Loaded(mesh=mesh, model=model, cache=cache, device=world.device)
