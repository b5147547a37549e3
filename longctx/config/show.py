"""A configuration as text: YAML to save, a table with sources, the layout in words."""

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from .check import microbatch_tokens, parallel_config
from .degrees import Machine, data_groups, memory, memory_limit, microbatches
from .keys import all_keys, value_of
from .load import LoadedConfig
from .memory import total_params, vocab_estimate
from .schema import Config
from .units import format_bytes, format_tokens

RESOLVED = "config.resolved.yaml"


def to_yaml(config: Config) -> str:
    """The whole configuration as a file that `load` reads back to an equal `Config`."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def save(config: Config, folder: Path) -> Path:
    """Write `config.resolved.yaml` into a run folder, whole or not at all."""
    target = folder / RESOLVED
    partial = target.with_name(f".{RESOLVED}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(to_yaml(config))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(target)
    return target


def values(loaded: LoadedConfig) -> dict[str, dict[str, Any]]:
    """Every key with its value and its source, in the order of the schema."""
    return {key: {"value": value_of(loaded.config, key), "source": loaded.sources[key]} for key in all_keys()}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Keys, values and sources in aligned columns."""
    spelled = {key: "null" if row["value"] is None else str(row["value"]) for key, row in rows.items()}
    left = max(map(len, spelled))
    middle = max(map(len, spelled.values()))
    lines = (f"{key:<{left}}  {text:<{middle}}  {rows[key]['source']}" for key, text in spelled.items())
    return "\n".join(lines)


def describe(config: Config) -> str:
    """The layout of a resolved configuration in a few lines for people."""
    degrees = parallel_config(config)
    axes = ("pp", "dp_replicate", "dp_shard", "ring", "ulysses", "tp")
    product = " x ".join(f"{axis} {getattr(degrees, axis)}" for axis in axes if getattr(degrees, axis) > 1)
    plural = "" if degrees.world_size == 1 else "es"
    micro, batch = microbatch_tokens(config), config.train.global_batch_tokens
    share = f", {format_tokens(-(-micro // degrees.cp))} on each process" if degrees.cp > 1 else ""
    lines = [
        f"layout    {product or 'one process'} on {degrees.world_size} {config.run.device} process{plural}, "
        f"{config.train.dtype}, attention {config.attention.strategy}",
        f"sequence  up to {format_tokens(config.data.seq_len)} tokens in microbatches of "
        f"{format_tokens(micro)}{share}",
        f"step      {format_tokens(batch)} tokens: {microbatches(config)} microbatch(es) over "
        f"{data_groups(degrees)} data-parallel group(s)",
        _model_line(config),
        _memory_line(config),
    ]
    if data_groups(degrees) > microbatches(config):
        lines.append(
            "note      some groups have no microbatch; raise train.global_batch_tokens or parallel.ring"
        )
    return "\n".join(lines)


def _model_line(config: Config) -> str:
    model = config.model
    vocab = vocab_estimate(model, config.data.tokenizer)
    params = total_params(model, vocab)
    spelled = f"{params / 1e9:.2f} B" if params >= 1e9 else f"{params / 1e6:.2f} M"
    assumed = ", vocabulary assumed" if model.vocab_size == "auto" else ""
    return (
        f"model     {model.num_layers} layers, {model.num_heads} heads on {model.num_kv_heads} kv heads, "
        f"{spelled} parameters{assumed}"
    )


def _memory_line(config: Config) -> str:
    degrees = parallel_config(config)
    need = memory(config, degrees)
    machine = Machine(
        world_size=degrees.world_size, device_type=config.run.device, node_ranks=degrees.world_size
    )
    limit = memory_limit(config, machine)
    of = f" of {format_bytes(limit)}" if limit else ""
    terms = ", ".join(f"{name} {format_bytes(value)}" for name, value in asdict(need).items())
    return f"memory    about {format_bytes(need.total)}{of} a process: {terms}"
