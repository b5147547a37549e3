"""Megatron-core's GPT tensors under our names: grouped query-key-value and fused SwiGLU taken apart.

Shapes: K = key and value heads, G = query heads of each, D = head_dim, E = hidden_size, F = ffn_size.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..config.schema import ModelConfig
from ..errors import ConfigError
from ..hf.importing import Imported, write_weights
from ..hf.importing import Tensor as Entry
from ..model.params import EMBEDDING, HEAD, parameter_shapes, vocab_rows
from ..tensors.dtypes import check_dtype, file_dtype
from ..tensors.fill import raw_bytes
from .reader import MegatronReader

_EMBEDDING = "embedding.word_embeddings.weight"
_FILE_TENSORS = 64
_QKV = "self_attention.linear_qkv"
_FC1 = "mlp.linear_fc1.weight"
_OUTER = {
    EMBEDDING: (_EMBEDDING,),
    HEAD: ("output_layer.weight",),
    "norm.weight": ("decoder.final_layernorm.weight", "decoder.final_norm.weight"),
}
_INNER = {
    "attention.wq.weight": (f"{_QKV}.weight",),
    "attention.wk.weight": (f"{_QKV}.weight",),
    "attention.wv.weight": (f"{_QKV}.weight",),
    "attention.wq.bias": (f"{_QKV}.bias",),
    "attention.wk.bias": (f"{_QKV}.bias",),
    "attention.wv.bias": (f"{_QKV}.bias",),
    "attention.wo.weight": ("self_attention.linear_proj.weight",),
    "attention.q_norm.weight": ("self_attention.q_layernorm.weight",),
    "attention.k_norm.weight": ("self_attention.k_layernorm.weight",),
    "attention_norm.weight": ("input_layernorm.weight", f"{_QKV}.layer_norm_weight"),
    "ffn_norm.weight": ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    "ffn.gate.weight": (_FC1,),
    "ffn.up.weight": (_FC1,),
    "ffn.down.weight": ("mlp.linear_fc2.weight",),
}
"""Our names inside a layer -> theirs; the second ones are Transformer Engine's fused layers."""
_PARTS: dict[str, Callable[[Tensor, ModelConfig], Tensor]] = {
    "attention.wq": lambda x, c: _groups(x, c)[:, : c.num_heads // c.num_kv_heads].flatten(0, 2),
    "attention.wk": lambda x, c: _groups(x, c)[:, -2].flatten(0, 1),
    "attention.wv": lambda x, c: _groups(x, c)[:, -1].flatten(0, 1),
    "ffn.gate": lambda x, c: x[: c.ffn_size],
    "ffn.up": lambda x, c: x[c.ffn_size :],
}


def import_megatron(folder: Path, model: ModelConfig, target: Path) -> Imported:
    """Write the weights of a Megatron-core GPT as a checkpoint of ours.

    Args:
        folder: with `.metadata`.
        model: what the weights are of; a vocabulary of `auto` takes all rows, padding included.
        target: folder that does not exist yet.

    Raises:
        ConfigError: tensors that the model section does not describe, or the target exists.
        CheckpointError: a file is damaged.

    Source: Megatron-LM (Shoeybi et al. 2019), sec. 3, for the layout of the fused matrices.
    """
    reader = MegatronReader(folder)
    prefix = _prefix(reader)
    if model.vocab_size == "auto":
        model = replace(model, vocab_size=reader.shape(prefix + _EMBEDDING)[0])
    places = {name: _find(reader, prefix, name) for name in parameter_shapes(model)}
    _check_unused(reader, prefix, {theirs for theirs, _ in places.values()})
    for name, place in places.items():
        _check_shape(reader, place, name=name, model=model)
    return write_weights(
        target, model, _files(reader, places, model), carried={}, tokenizer="bytes", seq_len=0
    )


def _prefix(reader: MegatronReader) -> str:
    found = [name for name in reader.names() if name.endswith(_EMBEDDING) and "optimizer" not in name]
    if not found:
        raise ConfigError(
            f"{reader.path} holds no {_EMBEDDING}; only checkpoints of Megatron-core's GPTModel are read"
        )
    return min(found, key=len).removesuffix(_EMBEDDING)


def _find(reader: MegatronReader, prefix: str, name: str) -> tuple[str, int | None]:
    """Their tensor, and the layer of it where all layers are stacked in one."""
    known = set(reader.names())
    if name in _OUTER:
        candidates: list[tuple[str, int | None]] = [(prefix + each, None) for each in _OUTER[name]]
    else:
        _, number, inner = name.split(".", 2)
        stacked = [(f"{prefix}decoder.layers.{each}", int(number)) for each in _INNER[inner]]
        single = [(f"{prefix}decoder.layers.{number}.{each}", None) for each in _INNER[inner]]
        candidates = [*stacked, *single]
    for theirs, layer in candidates:
        if theirs in known:
            return theirs, layer
    raise ConfigError(
        f"{reader.path} holds no {candidates[0][0]} for our {name}; check num_layers, attention_bias, "
        "qk_norm and tied_embeddings in the model section of --model"
    )


def _check_unused(reader: MegatronReader, prefix: str, used: set[str]) -> None:
    own = tuple(prefix + each for each in ("decoder.", "embedding.", "output_layer."))
    spare = [n for n in reader.names() if n.startswith(own) and n not in used and "_extra_state" not in n]
    if spare:
        raise ConfigError(
            f"{reader.path} holds {spare[0]} ({len(spare)} such), which the model section of --model has no "
            "place for; check attention_bias, qk_norm and tied_embeddings. LayerNorm, biases elsewhere, "
            "learned positions and experts are not supported"
        )


def _check_shape(
    reader: MegatronReader, place: tuple[str, int | None], *, name: str, model: ModelConfig
) -> None:
    (theirs, layer), shape = place, parameter_shapes(model)[name]
    whole = reader.shape(theirs)
    found = whole if layer is None else whole[1:]
    expected = shape
    if ".attention.w" in name and ".wo." not in name:
        rows = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
        expected = (rows, *shape[1:])
    elif ".ffn.gate." in name or ".ffn.up." in name:
        expected = (2 * shape[0], *shape[1:])
    padded = name in (EMBEDDING, HEAD) and found[0] >= vocab_rows(model) and found[1:] == shape[1:]
    if layer is not None and whole[0] != model.num_layers:
        raise ConfigError(f"{theirs} has {whole[0]} layers, --model has num_layers={model.num_layers}")
    if found != expected and not padded:
        raise ConfigError(
            f"{theirs} has shape {list(found)}, the model section of --model asks for {list(expected)}; "
            "set it to the model's own sizes"
        )


def _files(
    reader: MegatronReader, places: dict[str, tuple[str, int | None]], model: ModelConfig
) -> Iterator[list[Entry]]:
    entries = []
    for name, shape in parameter_shapes(model).items():
        theirs, layer = places[name]
        dtype = reader.dtype(theirs)
        if not dtype.is_floating_point or dtype.itemsize < 2:
            check_dtype(str(dtype), f"{reader.path}: {theirs}")
        chunks = _bytes(reader, theirs, layer, name=name, model=model)
        entries.append(Entry(name=name, dtype=file_dtype(dtype), shape=shape, chunks=chunks))
    for first in range(0, len(entries), _FILE_TENSORS):
        yield entries[first : first + _FILE_TENSORS]


def _bytes(
    reader: MegatronReader, theirs: str, layer: int | None, *, name: str, model: ModelConfig
) -> Iterator[memoryview]:
    whole = reader.read(theirs, layer)
    for part, take in _PARTS.items():
        if f".{part}." in name:
            whole = take(whole, model)
    if name in (EMBEDDING, HEAD):
        whole = whole[: vocab_rows(model)]  # rows that only round the vocabulary up
    yield raw_bytes(whole.contiguous())


def _groups(x: Tensor, model: ModelConfig) -> Tensor:
    """[K (G + 2) D, ...] -> [K, G + 2, D, ...]: each key head stands behind the query heads it serves."""
    per_group = model.num_heads // model.num_kv_heads + 2
    return torch.unflatten(x, 0, (model.num_kv_heads, per_group, model.head_dim))
