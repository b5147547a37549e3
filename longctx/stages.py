"""From a config and a mesh to this rank's part of the pipeline: what it holds, shares and runs."""

from dataclasses import dataclass

import torch
from torch import nn

from parallel.grads import Replicas
from parallel.mesh import Mesh
from parallel.pipeline.deferred import Deferred
from parallel.pipeline.routes import Part
from parallel.pipeline.runtime import Pipeline
from parallel.pipeline.schedule import Spec

from .config.pipeline import spec_of, stage_layers
from .config.schema import Config
from .model.params import EMBEDDING, HEAD, NORM
from .model.parts import Parts


@dataclass(frozen=True, kw_only=True, slots=True)
class Stages:
    """Which stage is which layers, and where it lives."""

    spec: Spec
    """The schedule."""
    layers: tuple[range, ...]
    """Layers of every stage."""
    rank: int
    """This rank on the pp axis."""
    tied: bool
    """Whether the head uses the embedding's weight."""

    @classmethod
    def of(cls, config: Config, mesh: Mesh) -> "Stages":
        """The stages of a run."""
        spec = spec_of(config)
        layers = stage_layers(config, spec.placement())
        tied = config.model.tied_embeddings
        return cls(spec=spec, layers=layers, rank=mesh.coordinate("pp"), tied=tied)

    def held(self) -> Parts:
        """What this rank holds."""
        placement = self.spec.placement()
        stages = placement.stages_of(self.rank)
        return Parts(
            embed=self.rank in placement.hosts("embed"),
            layers=tuple(n for stage in stages for n in self.layers[stage]),
            head=self.rank in placement.hosts("head"),
        )

    def parts(self, parts: tuple[Part, ...]) -> Parts:
        """What some parts of the pipeline compute together."""
        layers = tuple(n for part in parts if isinstance(part, int) for n in self.layers[part])
        return Parts(embed="embed" in parts, layers=layers, head="head" in parts)

    def deferred(self) -> Deferred | None:
        """Where weight gradients are put off to, if the schedule splits backward."""
        return Deferred() if self.spec.splits_backward else None

    def pipeline(
        self,
        config: Config,
        mesh: Mesh,
        deferred: Deferred | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Pipeline:
        """The runtime."""
        return Pipeline(
            spec=self.spec,
            mesh=mesh,
            width=config.model.hidden_size,
            dtype=dtype,
            device=device,
            deferred=deferred,
        )

    def replicas(self, model: nn.Module, mesh: Mesh) -> list[Replicas]:
        """Parameters that several stages hold. Every rank calls it, for the groups that it makes."""
        placement = self.spec.placement()
        embed, head = set(placement.hosts("embed")), set(placement.hosts("head"))
        shared = {EMBEDDING: embed | head if self.tied else embed, NORM: head, HEAD: head}
        own = dict(model.named_parameters())
        found = []
        for hosts in sorted({tuple(sorted(ranks)) for ranks in shared.values() if len(ranks) > 1}):
            group = mesh.subgroup("pp", hosts)
            if group is not None:
                names = [name for name, ranks in shared.items() if tuple(sorted(ranks)) == hosts]
                parameters = tuple(own[name] for name in names if name in own)
                found.append(Replicas(parameters=parameters, group=group))
        return found
