"""From a config and a world to a run: process groups, mesh, model, optimizer, data.

`build` may be called again in the same process: it keeps no module state, prefixes the store with
the membership epoch, and `Run.close` drops the groups. Nothing below this file sees the whole config.
"""

import gc
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore
from torch.distributed.tensor import DTensor

from parallel.apply import BlockPolicy, parallelize
from parallel.attention import make_attention
from parallel.attention.kept import Buffers, Kept
from parallel.fsdp import FsdpPolicy
from parallel.grads import Replicas
from parallel.layout import SequenceLayout
from parallel.mesh import Mesh, build_mesh
from parallel.noise import TokenNoise
from parallel.pipeline.deferred import Deferred
from parallel.pipeline.runtime import Pipeline
from parallel.planner.sequence import split_degree
from parallel.slices import slice_bounds, slice_layouts
from parallel.tensor.vocabulary import VocabShard

from .config.check import parallel_config
from .config.pipeline import token_cost
from .config.schema import Config, ModelConfig, TrainConfig
from .data.batch import LocalBatch, PackedBatch
from .data.held_out import HeldOutBatch
from .data.loader import StepLoader
from .data.mixture import MixturePacks
from .data.sources import open_data
from .data.tokens import Tokens
from .errors import ConfigError
from .feed import held_out, make_packs, step_loader
from .model.decoder import Decoder
from .model.init import init_parameters_
from .model.parts import Parts
from .pulse import Pulse
from .spike import SpikeWatch
from .stages import Stages
from .world import Progress as Progress
from .world import World as World

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(kw_only=True, slots=True)
class Run:
    """Everything that a training step needs, on this rank."""

    config: Config
    """The resolved config."""
    world: World
    """The processes."""
    mesh: Mesh
    """The axes."""
    model: Decoder
    """Wrapped model, this rank's shards."""
    optimizer: torch.optim.AdamW
    """Optimizer of the shards."""
    store: Tokens
    """Tokens of all documents."""
    loader: StepLoader
    """This sequence group's microbatches by step."""
    held_out: list[HeldOutBatch]
    """This sequence group's microbatches of an evaluation."""
    progress: Progress
    """How far the run is."""
    watch: SpikeWatch
    """What counts as a loss spike."""
    mixture: MixturePacks | None
    """What draws the steps of a curriculum; None: whole documents are packed."""
    vocab_shard: VocabShard | None
    """Columns of the logits that this rank computes; None: all."""
    stages: Stages
    """Which layers are on which pipeline stage."""
    pipeline: Pipeline | None
    """What moves microbatches through the stages; None: there is one."""
    replicas: list[Replicas]
    """Parameters that several stages hold."""
    pulse: Pulse = field(default_factory=Pulse)
    """What this rank is doing, for its heartbeat."""

    def layout(self, cu_seqlens: torch.Tensor, degree: int | None = None) -> SequenceLayout:
        """Which tokens of a packed batch this rank holds.

        Args:
            cu_seqlens: [N+1] document offsets.
            degree: ranks of the group that shares the batch; None: the configured ring x ulysses.
        """
        ring, ulysses = self.mesh.size("ring"), self.mesh.size("ulysses")
        if degree is not None:
            ring, ulysses = self._split(degree)
        groups = self.mesh.sequence(ring, ulysses)
        return SequenceLayout.build(
            cu_seqlens,
            ring=ring,
            ulysses=ulysses,
            ring_rank=groups.ring_rank,
            ulysses_rank=groups.ulysses_rank,
            kind=self.config.attention.layout,
        )

    def forward(
        self, batch: PackedBatch, *, training: bool = False
    ) -> tuple[torch.Tensor, LocalBatch, SequenceLayout]:
        """This rank's share of a packed batch through the model.

        Args:
            batch: whole.
            training: whether dropout applies, with the mask of the step that is under way.

        Returns:
            logits [t, V] (with tp this rank's columns of V), the share [t], and the layout that says
            which tokens it holds.

        Raises:
            ConfigError: this rank has only some of the layers.
        """
        if self.pipeline is not None:
            raise ConfigError(
                f"parallel.pp={self.mesh.size('pp')}: this needs the whole model on every rank; set "
                "parallel.pp=1 and divide it by parallel.ring, parallel.ulysses or parallel.dp_shard"
            )
        layout = self.layout(batch.cu_seqlens, batch.degree)
        local = batch.take(layout.token_index).to(self.world.device)
        noise = self.noise(batch, layout) if training else TokenNoise.none()
        logits = self.model(local.input_ids, local.position_ids, local.rope_id, layout=layout, noise=noise)
        return logits, local, layout

    def noise(self, batch: PackedBatch, layout: SequenceLayout) -> TokenNoise:
        """Dropout of some tokens of a batch in the step that is under way."""
        rate = self.config.model.dropout
        if not rate:
            return TokenNoise.none()
        token_id = batch.token_id()[layout.token_index].to(self.world.device)
        return TokenNoise.of(token_id, seed=self.config.run.seed, step=self.progress.step, rate=rate)

    def slices(self, whole: SequenceLayout, count: int) -> tuple[SequenceLayout, ...]:
        """The sequence in slices of equal work, which share what their layers keep."""
        if count == 1:
            return (whole,)
        bounds = slice_bounds(whole.cu_seqlens, count, token_cost=token_cost(self.config.model))
        found = slice_layouts(whole, bounds)
        rank, buffers = whole.ring_rank, Buffers()
        total = sum(each.ring_tokens(rank) for each in found)
        return tuple(replace(each, kept=Kept(each.past_rows(rank), total, buffers)) for each in found)

    def _split(self, degree: int) -> tuple[int, int]:
        model = self.config.model
        tp = self.mesh.size("tp")
        return split_degree(
            degree,
            num_heads=model.num_heads // tp,
            num_kv_heads=max(1, model.num_kv_heads // tp),
            node_ranks=max(1, self.config.step_plan.node_ranks // tp),
        )

    def close(self) -> None:
        """Stop the loader and drop every process group; `build` may follow."""
        self.loader.close()
        self.mesh.close()
        dist.destroy_process_group()


def build(config: Config, world: World, shards: Mapping[str, torch.Tensor] | None = None) -> Run:
    """Build a run on this rank.

    Args:
        config: resolved for `world.size` processes; equal on all ranks.
        world: the processes; no default process group may exist.
        shards: this rank's local parameter shards by global name. None initializes parameters from
            `run.seed`, identically whatever the layout; an empty mapping leaves them for the caller
            to fill.

    Raises:
        ConfigError: the tokenizer does not fit the model, a weight is for no length or source (both before
            any process group exists), or shards do not fit the layout.
    """
    opened = open_data(config.data)
    rows = vocabulary(config.model, opened.vocab_size)
    config = replace(config, model=replace(config.model, vocab_size=rows))
    packs = make_packs(config, opened)
    _make_deterministic(config.run.deterministic)
    join(world)
    mesh = build_mesh(parallel_config(config), world.device.type)
    stages = Stages.of(config, mesh)
    deferred = stages.deferred() if mesh.size("pp") > 1 else None
    model = _model(config, mesh, world.device, stages.held(), deferred)
    if shards is None:
        init_parameters_(model, config.run.seed, config.model)
    elif shards:
        _adopt(model, shards)
    return Run(
        config=config,
        world=world,
        mesh=mesh,
        model=model,
        optimizer=_optimizer(model, config.train),
        store=opened.tokens,
        loader=step_loader(config, mesh, opened, packs),
        held_out=held_out(config, mesh, opened),
        progress=Progress(skipped=sorted(set(config.train.skip_batches))),
        watch=SpikeWatch(config.train.spike_z),
        mixture=packs if isinstance(packs, MixturePacks) else None,
        vocab_shard=VocabShard.of(rows, mesh) if mesh.size("tp") > 1 else None,
        stages=stages,
        pipeline=_pipeline(config, mesh, world.device, stages, deferred),
        replicas=stages.replicas(model, mesh),
    )


def vocabulary(config: ModelConfig, tokenizer_size: int) -> int:
    """Rows of the embedding: as configured, or the tokenizer's rounded up to a multiple of 64."""
    if config.vocab_size == "auto":
        return -(-tokenizer_size // 64) * 64
    if config.vocab_size < tokenizer_size:
        raise ConfigError(
            f"model.vocab_size={config.vocab_size} is below the tokenizer's {tokenizer_size} ids; "
            f"set model.vocab_size=auto or at least {tokenizer_size}, or choose another data.tokenizer"
        )
    return config.vocab_size


def compute_dtype(config: TrainConfig) -> torch.dtype:
    """Dtype of the gathered parameters and the activations."""
    return _DTYPES[config.dtype]


def _make_deterministic(wanted: bool) -> None:
    if wanted:
        # cuBLAS reads this when it is first used; without it its results may differ between runs.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if torch.are_deterministic_algorithms_enabled() != wanted:  # the call imports the compiler: seconds
        torch.use_deterministic_algorithms(wanted)


def join(world: World) -> None:
    """Make the default process group of a world."""
    gc.collect()  # an earlier run's wrapped model is full of cycles that keep its groups and their threads
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    # The count names the store's keys; a rendezvous that failed leaves it ahead of the other ranks'.
    dist.distributed_c10d._world.group_count = 0
    dist.init_process_group(
        world.backend or ("cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"),
        store=PrefixStore(f"epoch-{world.epoch}", world.store),
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=world.timeout_s),
    )


def _pipeline(
    config: Config, mesh: Mesh, device: torch.device, stages: Stages, deferred: Deferred | None
) -> Pipeline | None:
    if mesh.size("pp") == 1:
        return None
    return stages.pipeline(config, mesh, deferred, dtype=compute_dtype(config.train), device=device)


def _model(
    config: Config, mesh: Mesh, device: torch.device, parts: Parts, deferred: Deferred | None
) -> Decoder:
    """The sharded model with storage but no values; parameters are kept at least float32."""
    attend = make_attention(config.attention.strategy, mesh, kernel=config.attention.kernel)
    compute = compute_dtype(config.train)
    stored = torch.promote_types(compute, torch.float32)
    with torch.device("meta"):
        model = Decoder(config.model, attend, parts).to(stored)
    reshard = config.parallel.reshard_after_forward
    policy = FsdpPolicy(
        param_dtype=compute,
        reduce_dtype=stored,
        reshard_after_forward=True if reshard == "auto" else reshard,
    )
    block_policy = replace(_block_policy(config.train), deferred=deferred, sliced=config.pipeline.slices > 1)
    parallelize(model, model.layers.values(), mesh=mesh, policy=policy, block_policy=block_policy)
    model.to_empty(device=device)
    return model


def _block_policy(config: TrainConfig) -> BlockPolicy:
    words = {"none": 0, "full": 1}
    every = words[config.recompute] if isinstance(config.recompute, str) else config.recompute
    return BlockPolicy(recompute_every=every, compile=config.compile)


@torch.no_grad()
def _adopt(model: Decoder, shards: Mapping[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    if parameters.keys() != shards.keys():
        differ = sorted(parameters.keys() ^ shards.keys())
        raise ConfigError(f"shards do not fit the model: {differ[:3]} are on one side only")
    for name, parameter in parameters.items():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter.data
        if local.shape != shards[name].shape:
            raise ConfigError(
                f"shard {name} has shape {tuple(shards[name].shape)}, this layout wants {tuple(local.shape)}"
            )
        local.copy_(shards[name])


def _optimizer(model: Decoder, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; norms and biases (fewer than two dims) are not decayed."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
