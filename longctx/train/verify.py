"""`longctx verify`: one step's batch of the user's data, one process against the layout.

Loss, logits and the gradient of every parameter. Rank 0 first computes the step alone, then all
ranks build the layout and compute it together. What differs first on the way back through the
model is named, with its pipeline stage and the rank whose share differs most.
"""

import os
from dataclasses import dataclass, replace

import torch
from torch.distributed import HashStore
from torch.distributed.tensor import DTensor, distribute_tensor

from parallel import comm, fsdp
from parallel.layout import SequenceLayout

from ..build import Run, World, build, compute_dtype
from ..config.check import microbatch_tokens
from ..config.memory import FILL, estimate, vocab_estimate
from ..config.schema import Config, DegreesConfig, StepPlanConfig
from ..data.batch import LocalBatch, PackedBatch, build_batch
from ..errors import ConfigError
from ..model.params import parameter_shapes
from ..staged import forward_all
from .losses import Losses
from .step import backward

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
# Tensors that are tiny as a whole are judged on the scale of the others.
FLOOR = 1e-3
LOGIT_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """What one process computes."""

    loss: float
    """Mean loss of the step."""
    logits: torch.Tensor
    """[n, V] logits of the first n tokens of the step's first microbatch."""
    gradients: dict[str, torch.Tensor]
    """Whole gradients by parameter name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One compared tensor."""

    name: str
    """`loss`, `logits` or `gradient of <parameter>`."""
    error: float
    """Largest absolute difference / scale."""
    scale: float
    """Largest absolute value of the reference, floored at 1e-3 of the median over tensors."""
    rank: int
    """Rank whose share differs most."""
    stage: int
    """Pipeline stage that holds the tensor."""


def verify(config: Config, world: World) -> int:
    """Compare the layout with one process.

    Args:
        config: resolved for `world.size`; `train.dtype` float32 or float64.
        world: this process among the others.

    Returns:
        0 when everything agrees within the tolerance of the dtype, else 1.

    Raises:
        ConfigError: the pipeline computes another function than one process does.
    """
    if config.pipeline.swap_ends:
        raise ConfigError(
            "pipeline.swap_ends=true sends odd microbatches through the layers in another order, so one "
            "process computes something else; set pipeline.swap_ends=false to verify the rest"
        )
    config = _reduced(config, world)
    found = differences(config, world)
    tolerance = tolerance_of(config)
    if world.rank == 0:
        _print(found, tolerance, config)
    return int(any(not d.error <= tolerance for d in found))


def differences(config: Config, world: World) -> list[Difference]:
    """Compare every tensor of the first step.

    Args:
        config: resolved for `world.size`.
        world: this process among the others.

    Returns:
        The differences, equal on all ranks.
    """
    reference = None
    if world.rank == 0:
        run = build_alone(config, world)
        try:
            reference = reference_of(run)
        finally:
            run.close()
    run = build(config, replace(world, epoch=world.epoch + 1))
    try:
        return compare(run, reference)
    finally:
        run.close()


def tolerance_of(config: Config) -> float:
    """The largest difference over the tensor's scale that counts as equal."""
    return TOLERANCE[torch.float64 if config.train.dtype == "float64" else torch.float32]


def _reduced(config: Config, world: World) -> Config:
    """The config with as many layers as one process can hold."""
    layers = _fitting_layers(config, _memory_bytes(world.device) * FILL)
    if layers < config.model.num_layers and world.rank == 0:
        print(
            f"one process holds {layers} of the {config.model.num_layers} layers: comparing those", flush=True
        )
    return replace(config, model=replace(config.model, num_layers=layers))


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _fitting_layers(config: Config, limit_bytes: float) -> int:
    """The most layers, at least one, whose training step one process is estimated to hold."""
    model, tokens = config.model, microbatch_tokens(config)
    vocab_size = vocab_estimate(model, config.data.tokenizer)
    for layers in range(model.num_layers, 1, -1):
        shape = replace(model, num_layers=layers)
        need = estimate(shape, vocab_size=vocab_size, rank_tokens=tokens, shards=1, dtype=config.train.dtype)
        if need.total <= limit_bytes:
            return layers
    return 1


def build_alone(config: Config, world: World) -> Run:
    """The same run in one process, without any axis, recomputation or compilation."""
    alone = World(rank=0, size=1, device=world.device, store=HashStore(), timeout_s=world.timeout_s)
    plain = replace(config.train, recompute="none", compile=False)
    degrees, groups = DegreesConfig(dp_shard=1, ring=1, ulysses=1), StepPlanConfig(groups="static")
    return build(replace(config, parallel=degrees, step_plan=groups, train=plain), alone)


def reference_of(run: Run) -> Reference:
    """What a run of one process computes in its first step."""
    with fsdp.forward_only(run.model):
        logits = run.forward(_first_batch(run))[0][: _logit_rows(run)].clone()
    loss, tokens = backward(run, run.loader.step(0)).tolist()
    gradients = {name: _gradient(p).full_tensor().clone() for name, p in run.model.named_parameters()}
    return Reference(loss=loss / max(1, tokens), logits=logits, gradients=gradients)


def _first_batch(run: Run) -> PackedBatch:
    """The step's first pack, whichever data group trains on it."""
    return build_batch(run.store, run.loader.packs(0)[0])


def _logit_rows(run: Run) -> int:
    """Tokens whose logits are compared: as many as fit 1 GiB."""
    return max(1, LOGIT_BYTES // (8 * int(run.config.model.vocab_size)))


def compare(run: Run, reference: Reference | None) -> list[Difference]:
    """Differences in the order in which a wrong value shows itself: forward, then backward.

    Args:
        run: on all ranks; its gradients are those of its first step afterwards.
        reference: what one process computes, on rank 0.
    """
    logits, layout = _logits(run, _first_batch(run))
    loss_sum, tokens = backward(run, run.loader.step(0)).tolist()
    mine = [
        _loss_error(run, reference, loss_sum / max(1, tokens)),
        _logit_error(run, reference, logits, layout.token_index),
    ]
    floor = _floor(run, reference)
    for name, shape in reversed(parameter_shapes(run.config.model).items()):
        mine.append(_gradient_error(run, reference, name, shape, floor=floor))
    everyone = comm.gather_json(mine, group=run.mesh.group("world"))
    return [_worst(run, [errors[index] for errors in everyone]) for index in range(len(mine))]


class _Logits(Losses):
    """Keeps the logits of the last microbatch, where this rank computes them."""

    kept: torch.Tensor | None = None

    def add(
        self, logits: torch.Tensor, local: LocalBatch, batch: PackedBatch, layout: SequenceLayout
    ) -> torch.Tensor:
        self.kept = logits
        return super().add(logits, local, batch, layout)


def _logits(run: Run, batch: PackedBatch) -> tuple[torch.Tensor | None, SequenceLayout]:
    """Logits [t, V] of this rank's tokens, on the last stage, and which tokens they are."""
    with fsdp.forward_only(run.model):
        losses = _Logits(run)
        forward_all(run, [batch], losses)
    return losses.kept, run.layout(batch.cu_seqlens, batch.degree)


def _worst(run: Run, errors: list[tuple[str, float, float]]) -> Difference:
    rank = max(range(len(errors)), key=lambda r: errors[r][1])
    name, error, scale = errors[rank]
    return Difference(name=name, error=error, scale=scale, rank=rank, stage=run.mesh.coordinate("pp"))


def _loss_error(run: Run, reference: Reference | None, loss: float) -> tuple[str, float, float]:
    expected = torch.tensor([reference.loss if reference else 0.0], dtype=torch.float64)
    expected = comm.broadcast(expected.to(run.world.device), src=0, group=run.mesh.group("world"))
    found = torch.tensor([loss], dtype=torch.float64, device=expected.device)
    return _error("loss", found, expected, scale=float(expected.abs().max()))


def _logit_error(
    run: Run, reference: Reference | None, logits: torch.Tensor | None, index: torch.Tensor
) -> tuple[str, float, float]:
    rows = min(_logit_rows(run), _first_batch(run).num_tokens)
    vocab_size = int(run.config.model.vocab_size)
    dtype = compute_dtype(run.config.train)
    empty = torch.empty(rows, vocab_size, dtype=dtype, device=run.world.device)
    expected = reference.logits if reference else empty
    expected = comm.broadcast(expected, src=0, group=run.mesh.group("world"))
    held = (index < rows).nonzero()[:, 0]
    scale = float(expected.abs().max())
    if logits is None:  # another stage has them
        return _error("logits", expected[:0], expected[:0], scale=scale)
    shard = run.vocab_shard
    columns = slice(shard.first, shard.first + shard.size) if shard else slice(None)
    mine = expected[index[held].to(expected.device), columns]
    return _error("logits", logits[held.to(logits.device)], mine, scale=scale)


def _gradient_error(
    run: Run, reference: Reference | None, name: str, shape: tuple[int, ...], *, floor: float
) -> tuple[str, float, float]:
    own = dict(run.model.named_parameters())
    stored = next(iter(own.values())).dtype
    whole = reference.gradients[name] if reference else torch.empty(shape, dtype=stored)
    # The parameter's mesh may leave rank 0 out (another tp rank's copy): all ranks get the whole.
    whole = comm.broadcast(whole.to(run.world.device), src=0, group=run.mesh.group("world"))
    scale = max(float(whole.abs().max()), floor)
    what = f"gradient of {name}"
    if name not in own:  # of another stage
        return _error(what, whole[:0], whole[:0], scale=scale)
    found = _gradient(own[name])
    expected = distribute_tensor(whole, found.device_mesh, found.placements, src_data_rank=None)
    return _error(what, found.to_local(), expected.to_local(), scale=scale)


def _floor(run: Run, reference: Reference | None) -> float:
    """1e-3 of the median over tensors of the largest absolute gradient."""
    median = 0.0
    if reference is not None:
        largest = torch.stack([g.abs().max().double() for g in reference.gradients.values()])
        median = float(largest.median())
    shared = torch.tensor(median, dtype=torch.float64, device=run.world.device)
    return FLOOR * float(comm.all_reduce(shared, group=run.mesh.group("world"), op="max"))


def _error(
    name: str, found: torch.Tensor, expected: torch.Tensor, *, scale: float
) -> tuple[str, float, float]:
    """Name, this rank's largest error over the scale, scale; NaN counts as the largest of all."""
    local = (found.double() - expected.double()).abs().nan_to_num(nan=torch.inf)
    return name, float(local.max()) / (scale or 1.0) if local.numel() else 0.0, scale


def _gradient(parameter: torch.nn.Parameter) -> DTensor:
    gradient = parameter.grad
    if not isinstance(gradient, DTensor):
        raise TypeError("verify compares FSDP-wrapped parameters; this one has no sharded gradient")
    return gradient


def _print(differences: list[Difference], tolerance: float, config: Config) -> None:
    wrong = [d for d in differences if not d.error <= tolerance]
    worst = max(differences, key=lambda d: d.error)
    print(f"compared loss, logits and {len(differences) - 2} gradients in {config.train.dtype}")
    print(
        f"largest difference {worst.error:.2e} of the tensor's scale ({worst.name}); allowed {tolerance:.0e}"
    )
    if wrong:
        first = wrong[0]
        print(
            f"DIFFERS: {first.name}, stage {first.stage}, rank {first.rank}: "
            f"{first.error:.2e} of its scale {first.scale:.2e}; {len(wrong)} tensors differ in all"
        )
    else:
        print("equal: the layout computes what one process computes")
