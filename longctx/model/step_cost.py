"""What a piece costs in a sequence group, for the step planner: given constants, or nominal ones. No torch.

The planner only compares groups, so nominal constants already choose sensible ones: they count the
model's FLOPs at a nominal rate and its exchanges at nominal bandwidths. Measured constants (from a
calibration, or FlexSP's published tables) make the predicted times those of the machine.
"""

from parallel.planner.sequence import SequenceCost

from ..config.schema import ModelConfig, StepPlanConfig
from ..errors import ConfigError
from .flops import causal_flops

NOMINAL_FLOPS = {"cuda": 300e12, "cpu": 30e9}
"""Nominal FLOP/s of one rank."""
NODE_BYTES_PER_S, NETWORK_BYTES_PER_S = 100e9, 10e9
"""Nominal bandwidth of one rank inside a node and across nodes (FlexSP's table: 120 to 97, then 10 to 5)."""


def sequence_cost(
    model: ModelConfig, plan: StepPlanConfig, *, device: str, itemsize: int, num_ranks: int
) -> SequenceCost:
    """Constants of the planner.

    Args:
        model: `vocab_size` a number.
        plan: section `step_plan`, resolved; what it gives is taken as it is.
        device: "cuda" or "cpu".
        itemsize: bytes of an activation element.
        num_ranks: data ranks.
    """
    assert isinstance(plan.capacity_tokens, int), "call check.resolve first"
    once, twice = causal_flops(model, [1 << 10]), causal_flops(model, [1 << 11])
    square = (twice - 2 * once) / (2 * (1 << 20))  # a n^2 + b n through two points
    linear = once / (1 << 10) - square * (1 << 10)
    per_ms = NOMINAL_FLOPS[device] / 1e3
    return SequenceCost(
        alpha1_ms=square / per_ms if plan.alpha1_ms is None else plan.alpha1_ms,
        alpha2_ms=linear / per_ms if plan.alpha2_ms is None else plan.alpha2_ms,
        beta_ms=plan.beta_ms,
        comm_ms_per_token=_given(plan, num_ranks) or _nominal(model, plan, itemsize, num_ranks),
        capacity_tokens=plan.capacity_tokens,
    )


def _given(plan: StepPlanConfig, num_ranks: int) -> dict[int, float]:
    given = {int(degree): float(ms) for degree, ms in plan.comm_ms_per_token.items()}
    wrong = sorted(d for d in given if d < 1 or d & (d - 1))
    if wrong:
        raise ConfigError(f"step_plan.comm_ms_per_token: degrees {wrong} are no powers of two")
    return {degree: ms for degree, ms in sorted(given.items()) if degree <= num_ranks}


def _nominal(model: ModelConfig, plan: StepPlanConfig, itemsize: int, num_ranks: int) -> dict[int, float]:
    """q, k, v and output exchanged forward and backward: 2 (2 H + 2 K) D elements a token and layer."""
    elements = 2 * (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim * model.num_layers
    costs = {}
    for degree in (1 << k for k in range(num_ranks.bit_length())):
        rate = NODE_BYTES_PER_S if degree <= plan.node_ranks else NETWORK_BYTES_PER_S
        costs[degree] = 1e3 * elements * itemsize * (degree - 1) / degree / degree / rate
    return costs
