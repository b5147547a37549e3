"""`auto` degrees. Pure: configuration and world size in, degrees out.

The rule, until a planner weighs speed as well:

1. The sequence degree cp = ring x ulysses is the smallest divisor of the world (over the fixed
   degrees) for which the memory estimate fits a GPU *and* no group of ranks idles: there are at
   least as many microbatches in a global batch as data-parallel groups. Where no divisor keeps
   all busy, the largest that fits is taken.
2. ulysses = gcd(cp, num_heads / tp, ranks of a node / tp), so heads divide evenly and the exchange of
   heads stays inside a node; ring is the rest.
3. dp_shard is what these leave.

CPU processes of one machine share its memory, so only "no group idles" decides there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd, prod

from parallel.config import ParallelConfig

from ..errors import ConfigError
from .memory import FILL, MemoryEstimate, estimate, vocab_estimate
from .schema import Config, DegreesConfig
from .units import format_bytes, format_tokens

ASSUMED_GPU_BYTES = 80 * 1024**3


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What the degrees are chosen for."""

    world_size: int
    """Processes."""
    device_type: str
    """`cpu` or `cuda`."""
    node_ranks: int
    """Processes of one node."""


def choose(config: Config, machine: Machine) -> ParallelConfig:
    """Degrees for `machine` with every `auto` replaced.

    Args:
        config: `train.microbatch_tokens` and `train.dtype` already resolved.
        machine: world size, device and node size.

    Raises:
        ConfigError: no degrees multiply to the world size, or none fits the memory.
    """
    candidates = list(_candidates(config, machine))
    if not candidates:
        raise ConfigError(_no_product(config.parallel, machine.world_size))
    fitting = [each for each in candidates if fits(config, each, machine)]
    if not fitting:
        raise ConfigError(_no_memory(config, candidates[-1], machine))
    busy = (each for each in fitting if data_groups(each) <= microbatches(config))
    return next(busy, fitting[-1])


def data_groups(degrees: ParallelConfig) -> int:
    """Groups of ranks that each take whole microbatches."""
    return degrees.dp_replicate * degrees.dp_shard


def microbatches(config: Config) -> int:
    """Whole microbatches in one global batch."""
    assert isinstance(config.train.microbatch_tokens, int), "resolve microbatch_tokens first"
    return max(1, config.train.global_batch_tokens // config.train.microbatch_tokens)


def memory(config: Config, degrees: ParallelConfig) -> MemoryEstimate:
    """The estimate for one rank of a layout."""
    assert isinstance(config.train.microbatch_tokens, int), "resolve microbatch_tokens first"
    return estimate(
        config.model,
        vocab_size=vocab_estimate(config.model, config.data.tokenizer),
        rank_tokens=rank_tokens(config, degrees),
        shards=degrees.fsdp * degrees.pp,
        dtype=config.train.dtype,
        tp=degrees.tp,
    )


def rank_tokens(config: Config, degrees: ParallelConfig) -> float:
    """Most tokens of a microbatch that one rank holds."""
    if config.step_plan.groups == "adaptive" and isinstance(config.step_plan.capacity_tokens, int):
        return config.step_plan.capacity_tokens
    assert isinstance(config.train.microbatch_tokens, int), "resolve microbatch_tokens first"
    return config.train.microbatch_tokens / degrees.cp


def memory_limit(config: Config, machine: Machine) -> int:
    """Bytes that the estimate may reach on one GPU; 0: no limit."""
    if machine.device_type == "cpu":
        return 0
    return ASSUMED_GPU_BYTES if config.run.device_memory == "auto" else config.run.device_memory


def fits(config: Config, degrees: ParallelConfig, machine: Machine) -> bool:
    """Whether the estimate leaves the usual room on a GPU."""
    limit = memory_limit(config, machine)
    return not limit or memory(config, degrees).total <= FILL * limit


def _candidates(config: Config, machine: Machine) -> Iterator[ParallelConfig]:
    """Every layout that the fixed degrees allow, by rising sequence degree."""
    asked = config.parallel
    left, rest = divmod(machine.world_size, asked.pp * asked.dp_replicate * asked.tp)
    if rest:
        return
    for cp in range(1, left + 1):
        ring, ulysses = _split(cp, config, machine)
        dp_shard, rest = divmod(left, cp)
        if rest or ring * ulysses != cp or asked.dp_shard not in ("auto", dp_shard):
            continue
        yield ParallelConfig(
            pp=asked.pp,
            dp_replicate=asked.dp_replicate,
            dp_shard=dp_shard,
            ring=ring,
            ulysses=ulysses,
            tp=asked.tp,
            ep=asked.ep,
        )


def _split(cp: int, config: Config, machine: Machine) -> tuple[int, int]:
    """(ring, ulysses) for a sequence degree; their product differs from `cp` where none exists."""
    ring, ulysses = config.parallel.ring, config.parallel.ulysses
    strategy = config.attention.strategy
    heads = max(1, config.model.num_heads // config.parallel.tp)  # of one rank
    if ring == "auto" and strategy in ("local", "ulysses"):
        ring = 1
    if ulysses == "auto" and strategy in ("local", "ring"):
        ulysses = 1
    if ulysses == "auto" and ring == "auto":
        ulysses = gcd(cp, heads, max(1, machine.node_ranks // config.parallel.tp))
    if ulysses == "auto":
        assert ring != "auto"
        ulysses = cp // ring
        if ulysses > heads:
            return 0, 0
    return (cp // ulysses if ring == "auto" else ring), ulysses


def _no_product(asked: DegreesConfig, world_size: int) -> str:
    names = ("pp", "dp_replicate", "dp_shard", "ring", "ulysses", "tp")
    fixed = prod(d for d in (getattr(asked, name) for name in names) if d != "auto")
    spelled = " x ".join(f"parallel.{name}={getattr(asked, name)}" for name in names)
    free = "" if asked.dp_shard == "auto" else "set parallel.dp_shard=auto, or "
    return (
        f"{spelled} cannot multiply to {world_size} processes; {free}choose degrees whose product divides "
        f"{world_size}, or start a multiple of {fixed} processes"
    )


def _no_memory(config: Config, degrees: ParallelConfig, machine: Machine) -> str:
    need = memory(config, degrees)
    largest = max(("state", "gathered", "activations", "logits"), key=lambda term: getattr(need, term))
    assert isinstance(config.train.microbatch_tokens, int)
    return (
        f"train.microbatch_tokens={format_tokens(config.train.microbatch_tokens)} needs about "
        f"{format_bytes(need.total)} on each of {machine.world_size} GPUs even with the sequence split over "
        f"{degrees.cp} (most of it {largest}: {format_bytes(getattr(need, largest))}), more than "
        f"{FILL:.0%} of {format_bytes(memory_limit(config, machine))}; use more processes, a shorter "
        "data.seq_len and train.microbatch_tokens, a smaller model, or set run.device_memory to what the "
        "GPU has (0: no limit)"
    )
