"""Cross-field checks, and the replacement of `auto`, for a given world. Pure, without torch."""

from dataclasses import replace
from importlib.util import find_spec
from math import gcd
from typing import Literal, cast

from parallel.config import ParallelConfig

from ..errors import ConfigError
from .curriculum import check_curriculum, check_step_plan, resolve_step_plan
from .degrees import Machine, choose, fits, memory, memory_limit
from .eval import check_eval
from .keys import value_of
from .memory import FILL
from .pipeline import check_pipeline, resolve_pipeline
from .rope import check_rope, with_head_dim
from .schema import Config, DegreesConfig, ModelConfig
from .units import format_bytes, format_tokens

ONE_RANK_AXES = {"local": ("ring", "ulysses"), "ulysses": ("ring",), "ring": ("ulysses",)}
"""Axes that a strategy does not serve; the others serve both."""
LATER = {"ep": "expert"}


def resolve(config: Config, world_size: int, device_type: str, *, node_ranks: int = 8) -> Config:
    """Replace every `auto` that the world decides, and refuse what cannot run.

    `model.vocab_size: auto` stays: the tokenizer decides it.

    Args:
        config: as loaded.
        world_size: processes.
        device_type: `cpu` or `cuda`.
        node_ranks: processes of one node; heads are exchanged inside a node.

    Raises:
        ConfigError: naming the keys, their values and what to change.
    """
    if world_size < 1:
        raise ConfigError(f"a world of {world_size} processes cannot run anything; choose at least 1")
    if device_type not in ("cpu", "cuda"):
        raise ConfigError(f"device {device_type!r} is unknown; choose cpu or cuda")
    check_values(config)
    check_model(config.model)
    check_degrees(config.parallel)
    config = resolve_pipeline(_fill(config, cast(Literal["cpu", "cuda"], device_type)))
    config = resolve_step_plan(config, node_ranks=min(node_ranks, world_size))
    check_positions(config.model)
    check_tokens(config)
    check_curriculum(config)
    check_eval(config)
    machine = Machine(world_size=world_size, device_type=device_type, node_ranks=min(node_ranks, world_size))
    degrees = choose_or_check(config, machine)
    check_attention(config, degrees)
    check_step_plan(config, degrees)
    check_tensor(config.model, degrees)
    check_node(config, degrees, machine)
    check_fsdp(config, degrees)
    check_pipeline(config, degrees)
    chosen = replace(config.parallel, dp_shard=degrees.dp_shard, ring=degrees.ring, ulysses=degrees.ulysses)
    return replace(config, parallel=chosen)


def check_replicas(config: Config, world_size: int) -> None:
    """Refuse more copies of a rank's state than there are other ranks; only training keeps any."""
    if config.recovery.mode == "replicate" and 1 < world_size <= config.recovery.replicas:
        raise ConfigError(
            f"recovery.replicas={config.recovery.replicas} needs as many other ranks, and there are "
            f"{world_size} processes; set it to at most {world_size - 1}"
        )


def parallel_config(config: Config) -> ParallelConfig:
    """The mesh degrees of a resolved configuration."""
    asked = config.parallel
    if "auto" in (asked.dp_shard, asked.ring, asked.ulysses):
        raise ConfigError("parallel.* is still auto; call check.resolve with the world size first")
    return ParallelConfig(
        pp=asked.pp,
        dp_replicate=asked.dp_replicate,
        dp_shard=int(asked.dp_shard),
        ring=int(asked.ring),
        ulysses=int(asked.ulysses),
        tp=asked.tp,
        ep=asked.ep,
    )


def microbatch_tokens(config: Config) -> int:
    """`train.microbatch_tokens` of a resolved configuration, as a number of tokens."""
    value = config.train.microbatch_tokens
    return config.data.seq_len if value == "auto" else value


def choose_or_check(config: Config, machine: Machine) -> ParallelConfig:
    """Chosen degrees where one is `auto`; given degrees are checked as they stand."""
    asked = config.parallel
    if "auto" in (asked.dp_shard, asked.ring, asked.ulysses):
        return choose(config, machine)
    degrees = parallel_config(config)
    degrees.check(machine.world_size)
    if not fits(config, degrees, machine):
        tokens, need = microbatch_tokens(config), memory(config, degrees).total
        raise ConfigError(
            f"data.seq_len={format_tokens(config.data.seq_len)} with train.microbatch_tokens="
            f"{format_tokens(tokens)} over parallel.ring={degrees.ring} x parallel.ulysses={degrees.ulysses} "
            f"needs about {format_bytes(need)} a GPU, more than {FILL:.0%} of "
            f"{format_bytes(memory_limit(config, machine))}; set parallel.ring=auto and "
            "parallel.ulysses=auto, use more processes, or set run.device_memory to what the GPU has "
            "(0: no limit)"
        )
    return degrees


def _fill(config: Config, device_type: Literal["cpu", "cuda"]) -> Config:
    dtype = config.train.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device_type == "cuda" else "float32"
    train = replace(config.train, microbatch_tokens=microbatch_tokens(config), dtype=dtype)
    rope = with_head_dim(config.model.rope, config.model.head_dim)
    run = replace(config.run, device=device_type)
    return replace(config, train=train, model=replace(config.model, rope=rope), run=run)


_LOWEST = {
    "recovery.every": 1,
    "recovery.replicas": 1,
    "recovery.compare_every": 0,
    "recovery.spares": 0,
    "recovery.heartbeat_s": 1,
    "recovery.hang_s": 1,
    "recovery.connect_s": 1,
    "recovery.max_failures": 0,
    "train.spike_z": 0,
    "train.max_spikes": 0,
    "train.steps": 1,
    "curriculum.cycles": 1,
    "curriculum.reweight_every": 0,
    "train.global_batch_tokens": 1,
    "data.seq_len": 1,
    "data.min_len": 1,
    "checkpoint.keep": 0,
    "checkpoint.milestone_every": 0,
    "metrics.log_every": 1,
    "run.processes": 0,
    "run.port": 0,
    "data.workers": 0,
    "train.warmup_steps": 0,
    "train.eval_every": 0,
    "train.eval_tokens": 0,
    "train.lr": 0,
    "train.max_grad_norm": 0,
    "train.weight_decay": 0,
    "checkpoint.every": 0,
    "checkpoint.grace_s": 0,
}
_BELOW_ONE = ("data.held_out", "model.dropout", "train.beta1", "train.beta2")
_UP_TO_ONE = ("train.min_lr_ratio", "train.decay_fraction")


def check_values(config: Config) -> None:
    """Ranges of single values."""
    for name, lowest in _LOWEST.items():
        if not value_of(config, name) >= lowest:  # also refuses nan
            raise ConfigError(f"{name}={value_of(config, name)}; choose at least {lowest}")
    for name in _BELOW_ONE:
        if not 0 <= value_of(config, name) < 1:
            raise ConfigError(f"{name}={value_of(config, name)}; choose at least 0 and less than 1")
    for name in _UP_TO_ONE:
        if not 0 <= value_of(config, name) <= 1:
            raise ConfigError(f"{name}={value_of(config, name)}; choose a fraction from 0 to 1")
    if any(batch < 0 for batch in config.train.skip_batches):
        raise ConfigError(f"train.skip_batches={config.train.skip_batches}; batches are counted from 0")
    if config.checkpoint.codec == "zstd" and find_spec("zstandard") is None:
        raise ConfigError(
            "checkpoint.codec=zstd needs the package zstandard; install longctx-runtime[zstd], or set "
            "checkpoint.codec=none"
        )
    if config.run.port > 65535:
        raise ConfigError(f"run.port={config.run.port}; choose 0 (any free port) or 1024 to 65535")


def check_model(model: ModelConfig) -> None:
    """Sizes and heads."""
    for name in ("num_layers", "hidden_size", "ffn_size", "num_heads", "num_kv_heads", "head_dim"):
        if getattr(model, name) < 1:
            raise ConfigError(f"model.{name}={getattr(model, name)}; choose at least 1")
    if model.vocab_size != "auto" and model.vocab_size < 1:
        raise ConfigError(f"model.vocab_size={model.vocab_size}; choose auto or at least 1")
    if model.num_heads % model.num_kv_heads:
        raise ConfigError(
            f"model.num_kv_heads={model.num_kv_heads} does not divide model.num_heads={model.num_heads}; "
            f"choose one of {_divisors(model.num_heads)}"
        )
    if model.head_dim % 2:
        raise ConfigError(
            f"model.head_dim={model.head_dim} is odd, but RoPE turns pairs of dims; "
            f"choose {model.head_dim + 1}"
        )
    if model.sliding_window is not None and model.sliding_window < 1:
        raise ConfigError(f"model.sliding_window={model.sliding_window}; choose null or at least 1")


def check_positions(model: ModelConfig) -> None:
    """The rotary method, and the layers that go without."""
    check_rope(model.rope)
    beyond = [layer for layer in model.rope.none_layers if layer >= model.num_layers]
    if beyond:
        raise ConfigError(
            f"model.rope.none_layers names layer {beyond[0]}, but model.num_layers={model.num_layers}; "
            f"choose from 0 to {model.num_layers - 1}"
        )


def check_degrees(degrees: DegreesConfig) -> None:
    """Single degrees, and axes that nothing implements."""
    for name, kind in LATER.items():
        if getattr(degrees, name) > 1:
            raise ConfigError(
                f"parallel.{name}={getattr(degrees, name)}: {kind} parallelism is not supported yet; "
                f"set parallel.{name}=1 and use parallel.dp_shard, parallel.ring or parallel.ulysses"
            )
    for name in ("pp", "dp_replicate", "dp_shard", "ring", "ulysses", "tp", "ep"):
        degree = getattr(degrees, name)
        if degree != "auto" and degree < 1:
            raise ConfigError(f"parallel.{name}={degree}; choose at least 1")


def check_tokens(config: Config) -> None:
    """A sequence fits a microbatch, a microbatch the global batch."""
    seq_len, microbatch = config.data.seq_len, microbatch_tokens(config)
    batch = config.train.global_batch_tokens
    if config.data.min_len > seq_len:
        raise ConfigError(
            f"data.min_len={config.data.min_len} exceeds data.seq_len={seq_len}; choose at most {seq_len}"
        )
    if seq_len > microbatch:
        raise ConfigError(
            f"data.seq_len={format_tokens(seq_len)} exceeds train.microbatch_tokens="
            f"{format_tokens(microbatch)}, and a sequence is never split between microbatches; "
            f"set train.microbatch_tokens={format_tokens(seq_len)} or more (and train.global_batch_tokens "
            "with it), or shorten data.seq_len"
        )
    if microbatch > batch:
        raise ConfigError(
            f"train.global_batch_tokens={format_tokens(batch)} is below train.microbatch_tokens="
            f"{format_tokens(microbatch)}; set train.global_batch_tokens={format_tokens(microbatch)} "
            "or more, or shorten data.seq_len"
        )


def check_attention(config: Config, degrees: ParallelConfig) -> None:
    """The strategy serves the degrees, and there are heads for them."""
    heads = config.model.num_heads
    if degrees.ulysses > heads:
        raise ConfigError(
            f"parallel.ulysses={degrees.ulysses} exceeds model.num_heads={heads}; "
            f"choose at most {heads}, or add parallel.ring"
        )
    for axis in ONE_RANK_AXES.get(config.attention.strategy, ()):
        if getattr(degrees, axis) > 1:
            raise ConfigError(
                f"attention.strategy={config.attention.strategy} needs parallel.{axis}=1, "
                f"not {getattr(degrees, axis)}; set attention.strategy=usp, or parallel.{axis}=1"
            )


def check_tensor(model: ModelConfig, degrees: ParallelConfig) -> None:
    """Tensor-parallel ranks get equal shares of heads and of the feed-forward."""
    tp = degrees.tp
    for name in ("ffn_size", "num_heads"):
        if getattr(model, name) % tp:
            raise ConfigError(
                f"parallel.tp={tp} does not divide model.{name}={getattr(model, name)}; choose one of "
                f"{_divisors(gcd(model.ffn_size, model.num_heads))}"
            )
    keys = model.num_kv_heads
    if keys % tp and tp % keys:
        valid = [d for d in range(1, model.num_heads + 1) if keys % d == 0 or d % keys == 0]
        valid = [d for d in valid if gcd(model.ffn_size, model.num_heads) % d == 0]
        raise ConfigError(
            f"parallel.tp={tp} neither divides model.num_kv_heads={keys} nor is a multiple of it; "
            f"choose one of {', '.join(map(str, valid))}"
        )
    if model.num_heads // tp < degrees.ulysses:
        raise ConfigError(
            f"parallel.tp={tp} leaves {model.num_heads // tp} of model.num_heads={model.num_heads} to each "
            f"rank, fewer than parallel.ulysses={degrees.ulysses}; lower one of them, or use parallel.ring"
        )


def check_node(config: Config, degrees: ParallelConfig, machine: Machine) -> None:
    """Tensor parallelism stays inside a node: it communicates four times a layer and waits each time."""
    tp, node = degrees.tp, machine.node_ranks
    if tp == 1 or node % tp == 0:
        return
    rows = microbatch_tokens(config) / degrees.cp
    item = 2 if config.train.dtype == "bfloat16" else 4
    sent = 8 * rows * config.model.hidden_size * item * (tp - 1) / tp * config.model.num_layers
    valid = ", ".join(str(d) for d in range(1, node + 1) if node % d == 0)
    raise ConfigError(
        f"parallel.tp={tp} does not divide the {node} ranks of a node, so it would send about "
        f"{format_bytes(sent)} a rank and microbatch over the network, none of it hidden; choose one of "
        f"{valid}, and use parallel.ring or parallel.dp_shard across nodes"
    )


def check_fsdp(config: Config, degrees: ParallelConfig) -> None:
    """The group that keeps parameters after forward, and the recomputed blocks."""
    group = config.parallel.reshard_after_forward
    if not isinstance(group, bool):
        if degrees.tp > 1 or degrees.pp > 1:
            # torch makes the groups inside each fsdp mesh, which then differ between the ranks.
            raise ConfigError(
                f"parallel.reshard_after_forward={group} works with parallel.tp=1 and parallel.pp=1, not "
                f"tp={degrees.tp}, pp={degrees.pp}; choose true or false"
            )
        valid = [d for d in range(2, degrees.fsdp) if degrees.fsdp % d == 0]
        if group not in valid:
            raise ConfigError(
                f"parallel.reshard_after_forward={group} must be a smaller group of the dp_shard x ring x "
                f"ulysses = {degrees.fsdp} ranks; choose {', '.join(map(str, ['true', 'false', *valid]))}"
            )
    every = config.train.recompute
    if isinstance(every, int) and not 1 <= every <= config.model.num_layers:
        raise ConfigError(
            f"train.recompute={every}; choose none, full, or n for every n-th of "
            f"model.num_layers={config.model.num_layers} blocks, at most {config.model.num_layers}"
        )


def _divisors(number: int) -> str:
    return ", ".join(str(each) for each in range(1, number + 1) if number % each == 0)
