"""What the step planner predicts for the steps of a curriculum: adaptive groups against static ones."""

from dataclasses import dataclass, replace

from parallel.errors import PlanError
from parallel.planner.sequence import SequenceCost, plan_step

from ..config.check import microbatch_tokens, resolve
from ..config.schema import Config
from ..data.mixture import make_mixture
from ..data.sources import open_data
from ..model.step_cost import sequence_cost

STEPS = 8
"""Steps that are planned; the mean of their predictions stands for the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """Predicted milliseconds of a step, by the planner's own cost model."""

    ranks: int
    """Data ranks."""
    adaptive_ms: float
    """With groups planned anew for every step."""
    static_ms: dict[int, float]
    """With all groups of one degree: degree -> milliseconds; degrees that cannot hold a piece are absent."""


def forecast(config: Config, ranks: int) -> Forecast:
    """Plan the run's steps under `step_plan`'s constants, or nominal ones.

    The steps are those of a run of `STEPS` steps and one cycle: it goes through the same lengths and
    schedules as the whole run, and no step has to be reached by replaying thousands before it.

    Args:
        config: as loaded; without a curriculum, `natural` stands in.
        ranks: data ranks.

    Raises:
        ConfigError: the configuration does not resolve for so many ranks.
    """
    kind = "natural" if config.curriculum.kind == "none" else config.curriculum.kind
    degrees = replace(config.parallel, pp=1, tp=1, dp_replicate=1, dp_shard="auto", ring=1, ulysses=1)
    config = replace(
        config,
        curriculum=replace(config.curriculum, kind=kind),
        step_plan=replace(config.step_plan, groups="adaptive"),
        parallel=degrees,
    )
    device = "cpu" if config.run.device == "auto" else config.run.device
    config = resolve(config, ranks, device)
    opened = open_data(config.data)
    rows = config.model.vocab_size if config.model.vocab_size != "auto" else opened.vocab_size
    model = replace(config.model, vocab_size=rows)
    cost = sequence_cost(model, config.step_plan, device=device, itemsize=2, num_ranks=ranks)
    tokens = (microbatch_tokens(config), config.train.global_batch_tokens)
    steps = min(STEPS, config.train.steps)
    mixture = make_mixture(
        opened,
        config.data,
        replace(config.curriculum, cycles=1),
        seed=config.run.seed,
        tokens=tokens,
        steps=steps,
    )
    drawn = [mixture.bucketed.pieces.length[mixture.numbers(step)].tolist() for step in range(steps)]
    return predict(drawn, ranks, cost)


def predict(steps: list[list[int]], ranks: int, cost: SequenceCost) -> Forecast:
    """Mean predicted times of steps with pieces of these lengths."""
    static = {}
    for degree in cost.comm_ms_per_token:
        try:
            static[degree] = _mean_ms(steps, ranks, _only(cost, degree))
        except PlanError:
            continue
    return Forecast(ranks=ranks, adaptive_ms=_mean_ms(steps, ranks, cost), static_ms=static)


def forecast_text(found: Forecast) -> str:
    """The prediction in a line or two."""
    line = f"step on {found.ranks} data ranks, predicted: adaptive groups {found.adaptive_ms:,.1f} ms"
    if not found.static_ms:
        return f"{line}; no single degree holds the longest piece"
    degree = min(found.static_ms, key=lambda d: found.static_ms[d])
    each = ", ".join(f"{d}: {ms:,.1f}" for d, ms in found.static_ms.items())
    ratio = found.static_ms[degree] / found.adaptive_ms
    return f"{line}, best static degree {degree} takes {ratio:.2f} times that (ms by degree: {each})"


def _only(cost: SequenceCost, degree: int) -> SequenceCost:
    return replace(cost, comm_ms_per_token={degree: cost.comm_ms_per_token[degree]})


def _mean_ms(steps: list[list[int]], ranks: int, cost: SequenceCost) -> float:
    return sum(plan_step(lengths, num_ranks=ranks, cost=cost).time_ms for lengths in steps) / len(steps)
