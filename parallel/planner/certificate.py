"""How far a step plan can be from the best one: a mixed integer program whose bound HiGHS proves.

The program is a relaxation that every valid plan satisfies, so its bound holds for all plans:

- per microbatch and degree, pieces fit the memory of that degree's groups, each of which can hold no more
  than the largest multiple of the pieces' common divisor;
- per microbatch, the groups take all ranks;
- per microbatch, the ranks' time pays for its pieces: num_ranks (T - beta) >= sum of degree x time
  (the area cut: without it the bound is about half the best value);
- a microbatch is no shorter than its longest piece at the degree it gets.

The longest pieces are placed one by one, the others as fractions. With every piece placed by itself
the only thing left out is how pieces of one degree share its groups.

Source: FlexSP, sec. 4, whose program has one microbatch; the area cut and several microbatches are ours.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, gcd, inf
from typing import Any

import numpy as np

from .sequence import SequenceCost, lower_bound, usable_degrees


def certified_bound(
    lengths: Sequence[int],
    *,
    num_ranks: int,
    cost: SequenceCost,
    limit_ms: float,
    whole: int = 12,
    seconds: float = 20.0,
) -> float:
    """A time in ms that no plan with pp = 1 beats, at most `limit_ms`.

    Args:
        lengths: tokens of each piece, at least 1.
        num_ranks: data ranks.
        cost: time and memory.
        limit_ms: the plan in question; numbers of microbatches that cannot beat it are not examined.
        whole: longest pieces that are placed one by one.
        seconds: HiGHS's limit for each number of microbatches; its bound so far counts then.

    Needs scipy.
    """
    total = sum(lengths) / (cost.capacity_tokens * num_ranks)
    least = lower_bound(lengths, num_ranks=num_ranks, cost=cost)
    base = least - max(1, ceil(total)) * cost.beta_ms  # ms of any plan beside beta
    best, number = limit_ms, max(1, ceil(total))
    while number * cost.beta_ms + base < best:
        found = _solve(lengths, num_ranks, cost, number, whole, seconds)
        best = min(best, max(found, base) + number * cost.beta_ms)
        number += 1
    return max(best, least)


@dataclass(slots=True)
class _Program:
    """Variables by name, and rows of the program."""

    columns: dict[tuple[Any, ...], int] = field(default_factory=dict)
    entries: list[tuple[int, int, float]] = field(default_factory=list)
    bounds: list[tuple[float, float]] = field(default_factory=list)

    def column(self, *name: Any) -> int:
        """A variable, made when first named."""
        return self.columns.setdefault(name, len(self.columns))

    def row(self, terms: Sequence[tuple[int, float]], low: float, high: float) -> None:
        """Low <= sum of coefficient x variable <= high."""
        self.entries += [(len(self.bounds), column, value) for column, value in terms]
        self.bounds.append((low, high))


def _solve(
    lengths: Sequence[int], num_ranks: int, cost: SequenceCost, microbatches: int, whole: int, seconds: float
) -> float:
    """The proven least sum of (T - beta) for this many microbatches; infinite if there is no plan."""
    degrees = usable_degrees(num_ranks, cost)
    order = sorted(lengths, reverse=True)
    kinds = [((n, i), n, 1) for i, n in enumerate(order[:whole])]
    kinds += [((n, -1), n, count) for n, count in Counter(order[whole:]).items()]
    program = _Program()
    for name, length, count in kinds:
        places = [(d, m) for d in degrees if length <= cost.capacity_tokens * d for m in range(microbatches)]
        program.row([(program.column("piece", name, d, m), 1.0) for d, m in places], count, count)
    for number in range(microbatches):
        _microbatch(program, kinds, degrees, num_ranks, cost, number)
    return _minimum(program, microbatches, seconds)


def _microbatch(
    program: _Program,
    kinds: Sequence[tuple[tuple[int, int], int, int]],
    degrees: list[int],
    num_ranks: int,
    cost: SequenceCost,
    number: int,
) -> None:
    """Rows of one microbatch: ranks, memory by degree, area, longest piece, and order of times."""
    time = program.column("time", number)
    area: list[tuple[int, float]] = [(time, -float(num_ranks))]
    unit = gcd(*(length for _, length, _ in kinds))
    for degree in degrees:
        room = cost.capacity_tokens * degree // unit * unit  # sums of pieces are multiples of it
        memory = [(program.column("groups", degree, number), -float(room))]
        for name, length, _ in kinds:
            column = program.columns.get(("piece", name, degree, number))
            if column is not None:
                memory.append((column, length))
                area.append((column, degree * cost.piece_ms(length, degree)))
        program.row(memory, -inf, 0.0)
    program.row(area, -inf, 0.0)
    program.row([(program.column("groups", d, number), float(d)) for d in degrees], num_ranks, num_ranks)
    for name, length, count in kinds:
        places = {d: program.columns.get(("piece", name, d, number)) for d in degrees}
        if count == 1:
            terms = [(c, cost.piece_ms(length, d)) for d, c in places.items() if c is not None]
            program.row([*terms, (time, -1.0)], -inf, 0.0)
    if number:  # microbatches are alike: the slower first
        program.row([(program.column("time", number - 1), 1.0), (time, -1.0)], 0.0, inf)


def _minimum(program: _Program, microbatches: int, seconds: float) -> float:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_matrix

    size = len(program.columns)
    objective, integral, most = np.zeros(size), np.zeros(size), np.full(size, np.inf)
    for number in range(microbatches):
        objective[program.column("time", number)] = 1.0
    for name, column in program.columns.items():
        if name[0] == "groups" or (name[0] == "piece" and name[1][1] >= 0):
            integral[column] = 1
            most[column] = 1 if name[0] == "piece" else np.inf
    rows, columns, values = zip(*program.entries, strict=True)
    matrix = coo_matrix((values, (rows, columns)), shape=(len(program.bounds), size)).tocsr()
    low, high = zip(*program.bounds, strict=True)
    found = milp(
        objective,
        integrality=integral,
        bounds=Bounds(0, most),
        constraints=LinearConstraint(matrix, low, high),
        options={"time_limit": seconds, "mip_rel_gap": 1e-3},
    )
    if found.status == 2:
        return inf
    return float(found.mip_dual_bound or 0.0)
