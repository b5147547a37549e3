"""Refusing bad calls by name, on every rank, before any communication."""

import math

import torch

from ..errors import ConfigError
from ..layout import SequenceLayout
from .heads import check_heads

Tensor = torch.Tensor


def check_scale(scale: float | None) -> None:
    """Refuse a factor on the logits that makes everything NaN.

    Raises:
        ConfigError: it is not finite.
    """
    if scale is not None and not math.isfinite(scale):
        raise ConfigError(f"softmax_scale={scale} is not finite; leave it out for head_dim ** -0.5")


def check_tensors(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, *, device_type: str) -> None:
    """Check shapes, dtypes and devices of one call's tensors.

    Raises:
        ConfigError: naming the argument and a valid choice.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tokens(name, x, layout, device_type)
        if x.dtype != q.dtype:
            raise ConfigError(
                f"{name}.dtype={x.dtype} differs from q.dtype={q.dtype}; cast q, k and v to one dtype"
            )
    if not q.dtype.is_floating_point:
        raise ConfigError(
            f"q.dtype={q.dtype} is not a floating dtype; cast q, k and v to bfloat16, float32 or float64"
        )
    if k.shape != v.shape:
        raise ConfigError(f"v has shape {tuple(v.shape)}, k has {tuple(k.shape)}; they must be equal")
    if k.shape[2] != q.shape[2]:
        raise ConfigError(f"k has head_dim {k.shape[2]}, q has {q.shape[2]}; they must be equal")
    check_heads(q.shape[1], k.shape[1], layout.ulysses)


def check_stream_tensor(
    name: str, x: Tensor, layout: SequenceLayout, *, num_heads: int, device_type: str
) -> None:
    """Check one of q, k and v that are sent one by one.

    Raises:
        ConfigError: naming the argument and a valid choice.
    """
    _check_tokens(name, x, layout, device_type)
    if x.shape[1] != num_heads:
        raise ConfigError(f"{name} has {x.shape[1]} heads, but the stream was opened for {num_heads}")


def _check_tokens(name: str, x: Tensor, layout: SequenceLayout, device_type: str) -> None:
    tokens = layout.token_index.numel()
    if x.ndim != 3 or 0 in x.shape[1:]:
        raise ConfigError(
            f"{name} has shape {tuple(x.shape)}; give [tokens, heads, head_dim], without a batch dim"
        )
    if x.shape[0] != tokens:
        raise ConfigError(
            f"{name} has {x.shape[0]} tokens, but layout.token_index has {tokens} on ring_rank="
            f"{layout.ring_rank}, ulysses_rank={layout.ulysses_rank}; index {name} with "
            "layout.token_index, or build the layout from cu_seqlens that end at the number of tokens"
        )
    if x.device.type != device_type:
        raise ConfigError(
            f"{name} is on {x.device}, but the mesh was built for {device_type!r}; move {name} there"
        )
