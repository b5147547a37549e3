"""Run cells on the ranks at hand: each against one process, on rank 0 of the same ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

from torch.distributed import HashStore, PrefixStore

from ..build import World, build
from ..config.check import resolve
from ..config.load import load
from ..config.schema import Config, DegreesConfig
from ..train.schedule import learning_rate
from ..train.step import train_step
from ..train.verify import Reference, differences, tolerance_of
from .cells import AXES, Cell

CELL_TIMEOUT_S = 120.0
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
class Result:
    """What a cell showed; the same on every rank that took part."""

    cell: Cell
    """The combination."""
    error: float
    """Largest difference of loss, logits or a gradient, over its tensor's scale."""
    tensor: str
    """Where it is."""
    steps_error: float
    """Largest relative difference of loss or gradient norm over the optimizer steps; 0 without any."""
    tolerance: float
    """The most that either may be."""

    @property
    def good(self) -> bool:
        """Whether the cell equals one process (a NaN does not)."""
        return self.error <= self.tolerance and self.steps_error <= self.tolerance


def cell_config(cell: Cell, folder: Path, device: str) -> Config:
    """The resolved configuration of a cell on a corpus below `folder`."""
    where = {
        "run.dir": folder / "run",
        "data.path": folder / "docs",
        "data.cache_dir": folder / "cache",
        "run.device": device,
        "run.device_memory": 0,
    }
    values = [f"{key}={value}" for key, value in (_BASE | where).items()]
    return resolve(load([], [*values, *cell.overrides()]).config, cell.size, device)


def run_cells(cells: Sequence[Cell], folder: Path, world: World) -> Iterator[Result]:
    """Run each cell on the first `cell.size` of the ranks; every rank passes the same cells.

    Args:
        cells: none larger than the world.
        folder: holds the corpus; all ranks see it.
        world: all the ranks.

    Yields:
        A result per cell that this rank takes part in.
    """
    references: dict[tuple[str, ...], tuple[Reference | None, list[float]]] = {}
    for index, cell in enumerate(cells):
        key = f"selftest-{index}"
        if world.rank < cell.size:
            store = PrefixStore(key, world.store)
            yield _run_cell(cell, folder, replace(world, size=cell.size, store=store), references)
        if world.rank == 0:
            world.store.set(key, "done")
        world.store.wait([key], timedelta(seconds=world.timeout_s))


def _run_cell(
    cell: Cell,
    folder: Path,
    world: World,
    references: dict[tuple[str, ...], tuple[Reference | None, list[float]]],
) -> Result:
    config = cell_config(cell, folder, world.device.type)
    alone = _alone(config)
    # What one process computes does not depend on the degrees: equal cells share it.
    key = (*(o for o in cell.overrides() if not o.startswith("parallel.")), str(cell.steps))
    known, expected = references.get(key, (None, []))
    found, reference = differences(config, world, known)
    if world.rank == 0 and key not in references and cell.steps:
        single = replace(world, rank=0, size=1, store=HashStore(), epoch=0)
        expected = _losses(alone, single, cell.steps)
    references[key] = (reference, expected)
    worst = max(found, key=lambda d: d.error)
    steps_error = 0.0
    if cell.steps:
        losses = _losses(config, replace(world, epoch=7), cell.steps)
        if world.rank == 0:
            steps_error = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
    return Result(
        cell=cell,
        error=worst.error,
        tensor=worst.name,
        steps_error=steps_error,
        tolerance=tolerance_of(config),
    )


def _alone(config: Config) -> Config:
    degrees = DegreesConfig(**dict.fromkeys(AXES, 1))
    return replace(config, parallel=degrees, train=replace(config.train, compile=False, recompute="none"))


def _losses(config: Config, world: World, steps: int) -> list[float]:
    """Loss and gradient norm of each of the first steps."""
    run = build(config, world)
    try:
        values = []
        for step in range(steps):
            result = train_step(run, learning_rate(step, config.train))
            values += [result.loss, result.grad_norm]
        return values
    finally:
        run.close()
