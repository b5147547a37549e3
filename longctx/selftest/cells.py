"""The cells of the parity matrix, and a small cover of all their pairs. Pure, without torch."""

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from ..config.schema import Config, DegreesConfig

Dtype = Literal["float32", "float64", "bfloat16"]
DTYPES: tuple[Dtype, ...] = ("float32", "float64")
AXES = ("pp", "dp_replicate", "dp_shard", "ring", "ulysses", "tp")
STEPS = 10
"""Optimizer steps that must stay together in float64."""
MICROBATCH = 256

FACTORS: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        **{axis: (1, 2) for axis in AXES},
        "dtype": DTYPES,
        "recompute": ("none", "full", 2),
        "batch": ("one", "three", "empty"),
        "model": ("tied", "untied", "dropout"),
        "reshard": (True, False, 2),
        "compile": (False, True),
        "schedule": ("1f1b", "zb-h1"),
    }
)
"""What a cell chooses: degrees, and how the step is computed."""

MODELS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "tied": {"tied_embeddings": True},
        "untied": {"tied_embeddings": False, "attention_bias": True, "qk_norm": True},
        "dropout": {"dropout": 0.25},
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One combination."""

    degrees: tuple[int, ...]
    """Degree of each of `AXES`."""
    dtype: Dtype = "float64"
    """float32, float64, or bfloat16 with float32 reductions."""
    recompute: int | Literal["none", "full"] = "none"
    """train.recompute."""
    batch: str = "one"
    """one or three microbatches a sequence group, or `empty`: two tokens in all."""
    model: str = "tied"
    """tied, tied with dropout, or untied with biases and query/key norms."""
    reshard: bool | int = True
    """parallel.reshard_after_forward."""
    compile: bool = False
    """train.compile."""
    schedule: Literal["1f1b", "zb-h1"] = "1f1b"
    """pipeline.schedule; says nothing without pp."""

    @property
    def size(self) -> int:
        """Processes."""
        size = 1
        for degree in self.degrees:
            size *= degree
        return size

    @property
    def layout(self) -> str:
        """Its axes in words."""
        axes = [f"{axis} {n}" for axis, n in zip(AXES, self.degrees, strict=True) if n > 1]
        return " x ".join(axes) or "one process"

    @property
    def name(self) -> str:
        """Layout and options in words."""
        reshard = f"reshard {str(self.reshard).lower()}"
        words = [self.dtype, f"recompute {self.recompute}", f"batch {self.batch}", self.model, reshard]
        words += ["compiled"] if self.compile else []
        return ", ".join([self.layout, *words, *([self.schedule] if self.degree("pp") > 1 else [])])

    def degree(self, axis: str) -> int:
        """Degree of one axis."""
        return self.degrees[AXES.index(axis)]

    @property
    def steps(self) -> int:
        """Optimizer steps to compare after the gradients."""
        return STEPS if self.dtype == "float64" and self.batch == "one" and self.reshard is True else 0

    @property
    def tokens(self) -> int:
        """Token budget of a microbatch."""
        return 2 if self.batch == "empty" else MICROBATCH

    @property
    def packs(self) -> int:
        """Microbatches of a step over all sequence groups."""
        groups = self.degree("dp_replicate") * self.degree("dp_shard")
        return {"one": groups, "three": 3 * groups, "empty": 1}[self.batch]

    @property
    def computes(self) -> tuple[object, ...]:
        """What one process computes for it; cells with the same share a reference."""
        return self.dtype, self.model, self.tokens, self.packs, self.steps

    def config(self, base: Config) -> Config:
        """`base` with what the cell chooses."""
        degrees = dict(zip(AXES, self.degrees, strict=True))
        train = replace(
            base.train,
            dtype=self.dtype,
            recompute=self.recompute,
            compile=self.compile,
            microbatch_tokens=self.tokens,
            global_batch_tokens=self.tokens * self.packs,
        )
        return replace(
            base,
            model=replace(base.model, **MODELS[self.model]),
            data=replace(base.data, seq_len=self.tokens),
            parallel=DegreesConfig(**degrees, reshard_after_forward=self.reshard),
            train=train,
            pipeline=replace(base.pipeline, schedule=self.schedule),
        )

    def legal(self, processes: int) -> bool:
        """Whether it fits the processes and asks for something that exists."""
        fsdp = self.degree("dp_shard") * self.degree("ring") * self.degree("ulysses")
        alone = self.degree("tp") == self.degree("pp") == 1
        sharded_copy = isinstance(self.reshard, bool) or (fsdp > self.reshard and alone)
        gathered = self.degree("pp") > 1 and self.reshard is False and not self.compile
        splits = self.schedule == "1f1b" or gathered
        static = not (self.compile and self.batch == "empty")
        return self.size <= processes and sharded_copy and splits and static


def write_corpus(folder: Path) -> None:
    """Made-up documents with a long tail of lengths: 10 to about 1500 characters."""
    chooser = random.Random(0)
    words = ["long", "context", "runs", "exact", "fast", "ring", "token", "shard", "a", "of", "the"]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(60):
        count = int(2 + 250 * chooser.random() ** 3)
        text = " ".join(chooser.choice(words) for _ in range(count))
        (folder / f"doc{number:03d}.txt").write_text(text)


def layouts(processes: int) -> Iterator[tuple[int, ...]]:
    """Every choice of degree 1 or 2 on each axis that fits, fewest axes first; then tp 4 alone."""
    for count in range(1, len(AXES) + 1):
        if 2**count <= processes:
            for chosen in combinations(range(len(AXES)), count):
                yield tuple(2 if i in chosen else 1 for i in range(len(AXES)))
    if processes >= 4:
        yield (1, 1, 1, 1, 1, 4)


def matrix(processes: int) -> list[Cell]:
    """The whole matrix: every layout, both dtypes, recomputation, accumulation, empty shares, resharding."""
    cells = []
    for degrees, dtype in product(layouts(processes), DTYPES):
        schedule: Literal["1f1b", "zb-h1"] = "zb-h1" if degrees[0] > 1 else "1f1b"
        cells += [
            Cell(degrees=degrees, dtype=dtype, batch="three", model="untied"),
            Cell(degrees=degrees, dtype=dtype, batch="one", recompute="full", model="dropout"),
            Cell(degrees=degrees, dtype=dtype, batch="empty", recompute=2, reshard=False, schedule=schedule),
            Cell(degrees=degrees, dtype=dtype, batch="one", reshard=2),
        ]
    return [cell for cell in cells if cell.legal(processes)]


def rounded(processes: int) -> list[Cell]:
    """Every layout in bfloat16, as GPUs train: the difference is bounded by its rounding."""
    cells = [Cell(degrees=degrees, dtype="bfloat16", batch="three") for degrees in layouts(processes)]
    return [cell for cell in cells if cell.legal(processes)]


def compiled(processes: int) -> list[Cell]:
    """Three layouts with compiled blocks, one in float32; they take minutes."""
    chosen: list[tuple[tuple[int, ...], Dtype]] = [
        ((1, 1, 1, 1, 1, 2), "float64"),
        ((1, 1, 1, 1, 2, 1), "float32"),
        ((1, 1, 2, 2, 1, 1), "float64"),
    ]
    shared = {"compile": True, "recompute": "full", "batch": "three", "model": "dropout"}
    cells = [Cell(degrees=d, dtype=t, **shared) for d, t in chosen]  # type: ignore[arg-type]
    return [cell for cell in cells if cell.legal(processes)]


def pairwise(processes: int, seed: int = 0, *, fixed: Mapping[str, object] | None = None) -> list[Cell]:
    """Few cells in which every two values of two factors that can meet do meet.

    Greedy: of many random cells, the one that shows most new pairs, until none shows any.

    Args:
        processes: the most that a cell may use.
        seed: of the choice.
        fixed: factors held at a value, such as `{"compile": False}`.
    """
    chooser = random.Random(seed)
    values = {name: ((fixed or {})[name],) if name in (fixed or {}) else v for name, v in FACTORS.items()}
    pool = [c for c in (_draw(chooser, values) for _ in range(4000)) if c.legal(processes)]
    missing = set().union(*(_pairs(cell) for cell in pool))
    chosen: list[Cell] = []
    while missing:
        best = max(pool, key=lambda cell: len(_pairs(cell) & missing))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def _draw(chooser: random.Random, values: Mapping[str, tuple[object, ...]]) -> Cell:
    drawn = {name: chooser.choice(options) for name, options in values.items()}
    degrees = tuple(int(str(drawn.pop(axis))) for axis in AXES)
    return Cell(degrees=degrees, **drawn)  # type: ignore[arg-type]


def _pairs(cell: Cell) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    options: Iterable[str] = [name for name in FACTORS if name not in AXES]
    shown = [(axis, str(n)) for axis, n in zip(AXES, cell.degrees, strict=True)]
    shown += [(name, str(getattr(cell, name))) for name in options]
    return set(combinations(shown, 2))
