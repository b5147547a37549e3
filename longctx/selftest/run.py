"""Run cells on the ranks at hand: each against one process, on rank 0 of the same ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

from torch.distributed import PrefixStore

from ..build import Run, World, build
from ..config.check import resolve
from ..config.load import load
from ..config.schema import Config
from ..train.schedule import learning_rate
from ..train.step import train_step
from ..train.verify import Reference, build_alone, compare, reference_of
from .cells import Cell
from .result import Result

TOLERANCES = {"float32": 1e-5, "float64": 1e-10, "bfloat16": 0.05}
"""Largest difference over a tensor's scale. bfloat16 has 8 bits: a bound on rounding, not a proof."""
_BASE = {
    "run.seed": 1,
    "data.held_out": 0.1,
    "data.workers": 1,
    "model.num_layers": 2,
    "model.hidden_size": 32,
    "model.ffn_size": 48,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.head_dim": 8,
    "train.steps": 10,
    "train.lr": 3e-4,
    "train.warmup_steps": 2,
    "train.eval_tokens": 0,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Alone:
    """What one process computes; on rank 0."""

    reference: Reference
    """Loss, logits and gradients of the first step."""
    losses: list[float]
    """Loss and gradient norm of each of the steps."""


def base_config(folder: Path, device: str) -> Config:
    """What all cells have in common: the model and a corpus below `folder`."""
    where = {
        "run.dir": folder / "run",
        "data.path": folder / "docs",
        "data.cache_dir": folder / "cache",
        "run.device": device,
        "run.device_memory": 0,
    }
    return load([], [f"{key}={value}" for key, value in (_BASE | where).items()]).config


def run_cells(cells: Sequence[Cell], folder: Path, world: World) -> Iterator[Result]:
    """Run each cell on the first `cell.size` of the ranks; every rank passes the same cells.

    Args:
        cells: none larger than the world.
        folder: holds the corpus; all ranks see it.
        world: all the ranks.

    Yields:
        A result per cell that this rank takes part in.
    """
    base = base_config(folder, world.device.type)
    known: dict[tuple[object, ...], Alone] = {}
    for index, cell in enumerate(cells):
        key = f"selftest-{index}"
        if world.rank < cell.size:
            config = resolve(cell.config(base), cell.size, world.device.type)
            if world.rank == 0 and cell.computes not in known:
                known[cell.computes] = _run_alone(config, world, cell.steps)
            store = PrefixStore(key, world.store)
            yield _run_cell(
                cell, config, replace(world, size=cell.size, store=store), known.get(cell.computes)
            )
        if world.rank == 0:
            world.store.set(key, "done")
        world.store.wait([key], timedelta(seconds=world.timeout_s))


def _run_alone(config: Config, world: World, steps: int) -> Alone:
    run = build_alone(config, world)
    try:
        reference = reference_of(run)
        return Alone(reference=reference, losses=_losses(run, steps))
    finally:
        run.close()


def _run_cell(cell: Cell, config: Config, world: World, alone: Alone | None) -> Result:
    run = build(config, world)
    try:
        found = compare(run, alone.reference if alone else None)
        losses = _losses(run, cell.steps)
    finally:
        run.close()
    worst = max(found, key=lambda d: d.error)
    expected = alone.losses if alone else losses
    errors = [abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)]
    return Result(
        cell=cell,
        error=worst.error,
        tensor=worst.name,
        steps_error=max(errors, default=0.0),
        tolerance=TOLERANCES[cell.dtype],
    )


def _losses(run: Run, steps: int) -> list[float]:
    """Loss and gradient norm of each of the first steps, whatever gradients a comparison left behind."""
    run.optimizer.zero_grad()
    values = []
    for step in range(steps):
        result = train_step(run, learning_rate(step, run.config.train))
        values += [result.loss, result.grad_norm]
    return values
