"""From the pipeline's keys to its schedule and stages, and what is refused. Pure, without torch."""

from dataclasses import replace

from parallel.config import ParallelConfig
from parallel.pipeline.routes import Placement
from parallel.pipeline.schedule import Spec, check_spec
from parallel.pipeline.stages import equal_layers, split_layers

from ..errors import ConfigError
from .memory import layer_params, vocab_estimate
from .schema import Config, ModelConfig


def spec_of(config: Config) -> Spec:
    """The schedule that a configuration asks for."""
    asked = config.pipeline
    if config.parallel.pp == 1:
        return Spec(ranks=1)
    return Spec(
        name=asked.schedule,
        ranks=config.parallel.pp,
        chunks=asked.chunks,
        slices=asked.slices,
        swap_ends=asked.swap_ends,
    )


def stage_layers(config: Config, placement: Placement) -> tuple[range, ...]:
    """Layers of every stage.

    Raises:
        ConfigError: more stages than layers, or speeds that do not fit the ranks.
    """
    layers, ranks = config.model.num_layers, placement.stage_ranks
    if len(ranks) == 1:
        return (range(layers),)
    if config.pipeline.split == "equal":
        if config.pipeline.speeds:
            raise ConfigError("pipeline.speeds is for pipeline.split=cost, not equal; remove one of them")
        return equal_layers(layers, ranks)
    if config.pipeline.swap_ends:
        return equal_layers(layers, ranks)
    return split_layers(layers, ranks, ends=(0.0, head_cost(config)), speeds=config.pipeline.speeds)


def head_cost(config: Config) -> float:
    """FLOPs of the output head over those of one layer, at sequences of `data.seq_len` tokens."""
    model = config.model
    seen = min(config.data.seq_len / 2, model.sliding_window or config.data.seq_len)
    attention = 2 * model.num_heads * model.head_dim * seen
    return (
        vocab_estimate(model, config.data.tokenizer) * model.hidden_size / (layer_params(model) + attention)
    )


def token_cost(model: ModelConfig) -> float:
    """FLOPs of a token in a layer beside attention, over those of one query-key pair."""
    return layer_params(model) / (2 * model.num_heads * model.head_dim)


def resolve_pipeline(config: Config) -> Config:
    """`parallel.reshard_after_forward: auto`: kept gathered for a step by pipelines and without lockstep."""
    if config.parallel.reshard_after_forward != "auto":
        return config
    kept = replace(
        config.parallel, reshard_after_forward=config.parallel.pp == 1 and config.step_plan.lockstep
    )
    return replace(config, parallel=kept)


def check_pipeline(config: Config, degrees: ParallelConfig) -> None:
    """Refuse what a pipeline of this kind does not compute exactly, or at all.

    Raises:
        ConfigError: naming the keys and what to set.
    """
    asked = config.pipeline
    if degrees.pp == 1:
        plain = {"slices": 1, "swap_ends": False, "speeds": []}
        for key, default in plain.items():
            value = getattr(asked, key)
            if value != default:
                needed = "at least 4" if key == "swap_ends" else "2 or more"
                raise ConfigError(
                    f"pipeline.{key}={str(value).lower()} does nothing with parallel.pp=1; set parallel.pp "
                    f"to {needed}, or pipeline.{key}={str(default).lower()}"
                )
        return
    spec = spec_of(config)
    check_spec(spec, config.model.num_layers)
    stage_layers(config, spec.placement())
    if asked.swap_ends and asked.speeds:
        raise ConfigError("pipeline.swap_ends=true needs equal stages; remove pipeline.speeds")
    if spec.splits_backward:
        _check_split(config)
    tokens = config.train.microbatch_tokens
    if asked.slices > 1 and isinstance(tokens, int) and asked.slices > tokens:
        raise ConfigError(
            f"pipeline.slices={asked.slices} exceeds train.microbatch_tokens={tokens}: most slices would be "
            "empty; choose a few for each stage, such as 4 x parallel.pp"
        )
    if asked.slices > 1 and config.attention.strategy == "allgather":
        raise ConfigError(
            f"pipeline.slices={asked.slices} does not work with attention.strategy=allgather; set "
            "attention.strategy=usp, or pipeline.slices=1"
        )


def _check_split(config: Config) -> None:
    """FSDP frees resharded parameters, and a compiled block computes both gradients in one graph."""
    name = config.pipeline.schedule
    if config.parallel.reshard_after_forward is not False:
        raise ConfigError(
            f"pipeline.schedule={name} computes weight gradients after backward has left the layer, which "
            "would be lost with resharded parameters; set parallel.reshard_after_forward=auto or false, not "
            f"{str(config.parallel.reshard_after_forward).lower()}"
        )
    if config.train.compile:
        raise ConfigError(
            f"pipeline.schedule={name} does not work with train.compile=true, whose graphs compute both "
            "gradients at once; set train.compile=false, or pipeline.schedule=1f1b"
        )
