"""Cross-field checks of curricula, sources and step plans. Pure."""

from collections.abc import Sequence
from dataclasses import replace
from math import inf, isfinite

from parallel.config import ParallelConfig

from ..errors import ConfigError
from .schema import Config, StepPlanConfig
from .units import format_tokens
from .weights import class_weights, source_points


def check_curriculum(config: Config) -> None:
    """Lengths are powers of two and fill a step exactly; sources have a curriculum that mixes them.

    Args:
        config: `train.microbatch_tokens` already a number.

    Raises:
        ConfigError: naming the keys and what to change.
    """
    if config.curriculum.kind == "none":
        if config.data.sources:
            raise ConfigError(
                "data.sources are mixed by a curriculum, and curriculum.kind=none; set curriculum.kind="
                "natural (lengths as the sources have them), or name one data.path instead"
            )
        return
    seq_len, batch = config.data.seq_len, config.train.global_batch_tokens
    if seq_len & (seq_len - 1):
        below = 1 << (seq_len.bit_length() - 1)
        raise ConfigError(
            f"data.seq_len={seq_len} is no power of two, and a curriculum draws pieces of power-of-two "
            f"lengths; set data.seq_len={format_tokens(below)} or {format_tokens(2 * below)}, or "
            "curriculum.kind=none"
        )
    low = 1 << max(0, config.data.min_len - 1).bit_length()
    if low > seq_len:
        raise ConfigError(
            f"data.min_len={config.data.min_len} is above data.seq_len={seq_len} once rounded up to a power "
            f"of two ({low}); set data.min_len to at most {seq_len}"
        )
    if batch % seq_len:
        near = max(1, round(batch / seq_len)) * seq_len
        raise ConfigError(
            f"train.global_batch_tokens={format_tokens(batch)} is no multiple of data.seq_len="
            f"{format_tokens(seq_len)}, and every step of a curriculum has exactly that many tokens; set "
            f"train.global_batch_tokens={format_tokens(near)}"
        )
    micro = config.train.microbatch_tokens
    if isinstance(micro, int) and micro % seq_len:
        raise ConfigError(
            f"train.microbatch_tokens={format_tokens(micro)} is no multiple of data.seq_len="
            f"{format_tokens(seq_len)}, so microbatches could not be filled; set "
            f"train.microbatch_tokens={format_tokens(-(-micro // seq_len) * seq_len)}"
        )
    classes = [1 << k for k in range(low.bit_length() - 1, seq_len.bit_length())]
    if config.curriculum.kind == "weights":
        weights = class_weights(config.curriculum.weights, classes, "curriculum.weights")
        if not any(weights.values()):
            raise ConfigError(
                "curriculum.kind=weights needs curriculum.weights, a weight for at least one length class; "
                f"set for example curriculum.weights.{format_tokens(seq_len)}=1"
            )
    _check_sources(config, classes)


def _check_sources(config: Config, classes: Sequence[int]) -> None:
    if config.curriculum.reweight_every and len(config.data.sources) < 2:
        raise ConfigError(
            f"curriculum.reweight_every={config.curriculum.reweight_every} changes the weights of "
            f"data.sources, and there are {len(config.data.sources)}; name two or more, or set it to 0"
        )
    names = [source.name for source in config.data.sources]
    for number, source in enumerate(config.data.sources):
        where = f"data.sources[{number}]"
        if not source.name or not source.path or names.count(source.name) > 1:
            raise ConfigError(
                f"{where} has name {source.name!r} and path {source.path!r}; give every source a path and a "
                "name of its own"
            )
        for name in ("weight", "max_epochs"):
            if not 0 <= getattr(source, name) < inf:
                raise ConfigError(
                    f"{where} ({source.name}): {name}={getattr(source, name)}; choose 0 or more, and a "
                    "finite number"
                )
        if not isfinite(source.reference_loss):
            raise ConfigError(
                f"{where} ({source.name}): reference_loss={source.reference_loss}; choose a finite number of "
                "nats per token"
            )
        class_weights(source.lengths, classes, f"data.sources[{source.name}].lengths")
    if config.data.sources:
        source_points(config.data.sources)


def resolve_step_plan(config: Config, *, node_ranks: int) -> Config:
    """Replace what `step_plan` leaves open, and free the data ranks for adaptive groups.

    Args:
        config: `train.microbatch_tokens` already a number.
        node_ranks: processes of one node.

    Raises:
        ConfigError: a value out of range, or adaptive groups beside a fixed ring or ulysses.
    """
    check_plan_values(config.step_plan)
    plan, degrees = config.step_plan, config.parallel
    micro = config.train.microbatch_tokens
    assert isinstance(micro, int), "resolve microbatch_tokens first"
    capacity = micro if plan.capacity_tokens == "auto" else plan.capacity_tokens
    plan = replace(plan, capacity_tokens=capacity, node_ranks=plan.node_ranks or node_ranks)
    if plan.groups == "static":
        return replace(config, step_plan=plan)
    if degrees.ring not in ("auto", 1) or degrees.ulysses not in ("auto", 1):
        raise ConfigError(
            f"step_plan.groups=adaptive chooses the split of every sequence itself, and parallel.ring="
            f"{degrees.ring}, parallel.ulysses={degrees.ulysses} fix it; set both to 1 (dp_shard takes their "
            "ranks), or step_plan.groups=static"
        )
    if config.attention.strategy != "usp":
        raise ConfigError(
            f"step_plan.groups=adaptive needs attention.strategy=usp, which serves every split, not "
            f"{config.attention.strategy}"
        )
    return replace(config, step_plan=plan, parallel=replace(degrees, ring=1, ulysses=1))


def check_plan_values(plan: StepPlanConfig) -> None:
    """Ranges of single values.

    Raises:
        ConfigError: naming the key.
    """
    for name in ("alpha1_ms", "alpha2_ms", "beta_ms", "node_ranks"):
        value = getattr(plan, name)
        if value is not None and not 0 <= value < inf:
            raise ConfigError(f"step_plan.{name}={value}; choose at least 0")
    if not 0 < plan.effort < inf:
        raise ConfigError(f"step_plan.effort={plan.effort}; choose more than 0, usually 1")
    if plan.capacity_tokens != "auto" and plan.capacity_tokens < 1:
        raise ConfigError(f"step_plan.capacity_tokens={plan.capacity_tokens}; choose auto or at least 1")
    for degree, cost in plan.comm_ms_per_token.items():
        number = int(degree) if degree.isdecimal() else 0
        if number < 1 or number & (number - 1) or not 0 <= cost < inf:
            raise ConfigError(
                f"step_plan.comm_ms_per_token: {cost} ms for degree {degree}; degrees are powers of two, "
                "costs 0 or more"
            )


def check_step_plan(config: Config, degrees: ParallelConfig) -> None:
    """The longest sequence fits all ranks together, and groups that run at their own pace can.

    Raises:
        ConfigError: it does not, naming the longest that fits, or they cannot.
    """
    _check_pace(config, degrees)
    plan, capacity = config.step_plan, config.step_plan.capacity_tokens
    if plan.groups == "static" or not isinstance(capacity, int):
        return
    capacity //= degrees.pp  # as many microbatches are in flight
    largest = 1 << (degrees.data_ranks.bit_length() - 1)
    allowed = [int(d) for d in plan.comm_ms_per_token if int(d) <= largest] or [largest]
    if config.data.seq_len > capacity * max(allowed):
        raise ConfigError(
            f"data.seq_len={format_tokens(config.data.seq_len)} exceeds what {max(allowed)} data ranks hold "
            f"at step_plan.capacity_tokens={format_tokens(capacity)} each: the longest that fits is "
            f"{format_tokens(capacity * max(allowed))}; shorten data.seq_len, raise "
            "step_plan.capacity_tokens, or use more processes"
        )


def _check_pace(config: Config, degrees: ParallelConfig) -> None:
    """Without lockstep nothing may meet ranks of other groups in the middle of a step."""
    if config.step_plan.lockstep:
        return
    if degrees.pp > 1:
        raise ConfigError(
            f"step_plan.lockstep=false does not work with parallel.pp={degrees.pp}, whose stages exchange "
            "every microbatch; set step_plan.lockstep=true, or parallel.pp=1"
        )
    if config.parallel.reshard_after_forward is not False:
        raise ConfigError(
            "step_plan.lockstep=false keeps parameters gathered for a whole step; set "
            "parallel.reshard_after_forward=auto or false, not "
            f"{str(config.parallel.reshard_after_forward).lower()}, or step_plan.lockstep=true"
        )
