"""What benchmarks/attention.py compares: ours and its peers, each as a function of one rank's share.

Patches that a peer needs on CPU are made here, in the measuring process, and named in `NOTES`.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from parallel.attention import make_attention
from parallel.layout import SequenceLayout
from parallel.mesh import Mesh

Tensor = torch.Tensor
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [t, H, D], k and v [t, K, D] of this rank -> out [t, H, D]."""

OURS = ("ulysses", "ring", "allgather")
NOTES = {
    "yunchang_ulysses": "local attention replaced by SDPA per document; as shipped it calls a CUDA operator",
    "yunchang_ring": "contiguous; its operators replaced by the CPU flash operator, and its backward returns "
    "one gradient more; packs: one call per document",
    "yunchang_zigzag": "its zigzag ring with the same operators; packs: one call per document; its float32 "
    "gradients are wrong (.to(float32) of a float32 buffer is that buffer, overwritten later): not compared",
    "deepspeed_ulysses": "DistributedAttention 0.19.8, its file loaded alone (the package's import needs "
    "more packages); local attention is SDPA per document",
    "sdpa": "one process, two threads, one call per document",
}
CANNOT = {
    "torch_context_parallel": "does not run on CPU: the flash operator for CPU has no sharding rule",
    "ring_flash_attn": "does not import without flash-attn, which has no CPU build",
}


def sdpa(offsets: Sequence[int]) -> Attend:
    """SDPA with one causal call per document."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        outs = []
        for a, b in pairwise(offsets):
            views = [x[a:b].transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
            out = F.scaled_dot_product_attention(*views, is_causal=True, enable_gqa=grouped)
            outs.append(out[0].transpose(0, 1))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    return attend


def ours(name: str, mesh: Mesh, offsets: Sequence[int]) -> tuple[Attend, Tensor]:
    """One of our strategies, and the tokens of this rank."""
    split = (1, mesh.world_size) if name == "ulysses" else (mesh.world_size, 1)
    groups = mesh.sequence(*split)
    layout = SequenceLayout.build(
        offsets,
        ring=split[0],
        ulysses=split[1],
        ring_rank=groups.ring_rank,
        ulysses_rank=groups.ulysses_rank,
    )
    attend = make_attention(name, mesh)
    return lambda q, k, v: attend(q, k, v, layout=layout), layout.token_index


def contiguous_share(offsets: Sequence[int]) -> Tensor:
    """Equal consecutive tokens of the whole sequence."""
    return torch.arange(offsets[-1]).chunk(dist.get_world_size())[dist.get_rank()]


def document_share(offsets: Sequence[int], *, zigzag: bool) -> Tensor:
    """This rank's half of every document, or its head and tail chunk."""
    rank, size = dist.get_rank(), dist.get_world_size()
    parts = []
    for a, b in pairwise(offsets):
        if zigzag:
            chunks = torch.arange(a, b).chunk(2 * size)
            parts += [chunks[rank], chunks[2 * size - 1 - rank]]
        else:
            parts.append(torch.arange(a, b).chunk(size)[rank])
    return torch.cat(parts)


def yunchang_ulysses(offsets: Sequence[int]) -> Attend:
    """Yunchang's UlyssesAttention with SDPA inside."""
    from yunchang.ulysses.attn_layer import AttnType, UlyssesAttention

    layer = UlyssesAttention(dist.group.WORLD, attn_type=AttnType.TORCH_FLASH)
    inner = sdpa(offsets)
    layer.attn_fn = lambda q, k, v, **_: inner(q[0], k[0], v[0])[None]
    return lambda q, k, v: layer(q[None], k[None], v[None], causal=True)[0]


def deepspeed_ulysses(offsets: Sequence[int]) -> Attend:
    """DeepSpeed's DistributedAttention with SDPA inside."""
    inner = sdpa(offsets)
    layer = deepspeed_layer().DistributedAttention(
        lambda q, k, v: inner(q[0], k[0], v[0])[None], dist.group.WORLD, scatter_idx=2, gather_idx=1
    )
    return lambda q, k, v: layer(q[None], k[None], v[None], 0)[0]


@cache
def deepspeed_path() -> Path | None:
    """deepspeed/sequence/layer.py, if the package lies on the path."""
    spec = importlib.util.find_spec("deepspeed")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "sequence" / "layer.py"


@cache
def deepspeed_layer() -> ModuleType:
    """That file alone, with stand-ins for what it imports and does not use here."""
    path = deepspeed_path()
    assert path is not None
    stubs = {
        "einops": {"rearrange": None},
        "deepspeed": {},
        "deepspeed.comm": vars(dist),
        "deepspeed.accelerator": {"get_accelerator": lambda: SimpleNamespace()},
        "deepspeed.module_inject": {},
        "deepspeed.module_inject.tp_shard": {"AutoTPMeta": object, "get_shard_size_list": None},
        "deepspeed.utils": {"groups": None},
    }
    for name, content in stubs.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update({k: v for k, v in content.items() if not k.startswith("__")})
    sys.modules["deepspeed"].comm = sys.modules["deepspeed.comm"]
    spec = importlib.util.spec_from_file_location("deepspeed_sequence_layer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """[B, S, H, D] -> out [B, S, H, D], lse [B, H, S]; further arguments: dropout, scale."""
    scale = options.get("softmax_scale", args[1] if len(args) > 1 else None)
    views = [x.transpose(1, 2) for x in (q, k, v)]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *views, 0.0, options["causal"], scale=scale
    )
    return out.transpose(1, 2), lse


def _cpu_backward(tensors: Sequence[Tensor], lse: Tensor, scale: float, causal: bool) -> list[Tensor]:
    """dout, q, k, v, out [B, S, H, D], lse [B, H, S] -> dq, dk, dv."""
    dout, q, k, v, out = (x.transpose(1, 2) for x in tensors)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, scale=scale
    )
    return [grad.transpose(1, 2) for grad in grads]


def yunchang_ring(offsets: Sequence[int]) -> Attend:
    """Yunchang's "basic_pytorch" ring: contiguous halves of each document."""
    from yunchang.ring import ring_pytorch_attn as ring

    def backward(*tensors: Tensor, softmax_lse: Tensor, softmax_scale: float, causal: bool) -> list[Tensor]:
        return _cpu_backward(tensors, softmax_lse.transpose(1, 2), softmax_scale, causal)  # saved [B, S, H]

    ring.pytorch_attn_forward, ring.pytorch_attn_backward = _cpu_forward, backward
    if not hasattr(ring.RingAttentionFunc, "as_shipped"):
        ring.RingAttentionFunc.as_shipped = ring.RingAttentionFunc.backward

        def five(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
            dq, dk, dv, *_ = ring.RingAttentionFunc.as_shipped(ctx, dout)
            return None, dq, dk, dv, None, None

        ring.RingAttentionFunc.backward = staticmethod(five)
    return _per_document(offsets, lambda q, k, v: ring.ring_pytorch_attn_func(q, k, v, causal=True))


def yunchang_zigzag(offsets: Sequence[int]) -> Attend:
    """Yunchang's zigzag ring: a head and a tail chunk of each document."""
    from yunchang.ring import zigzag_ring_flash_attn as ring

    def backward(*args: Any, rng_state: None = None) -> None:
        dout, q, k, v, out, lse, dq, dk, dv, _, scale, causal = args[:12]
        grads = _cpu_backward((dout, q, k, v, out), lse, scale, causal)
        for target, grad in zip((dq, dk, dv), grads, strict=True):
            target.copy_(grad)

    ring.select_flash_attn_impl = lambda _, stage: _cpu_forward if stage == "fwd-only" else backward
    return _per_document(offsets, lambda q, k, v: ring.zigzag_ring_flash_attn_func(q, k, v, causal=True))


def _per_document(offsets: Sequence[int], call: Attend) -> Attend:
    size = dist.get_world_size()
    lengths = [(b - a) // size for a, b in pairwise(offsets)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        outs = [call(*(x[None].contiguous() for x in part))[0] for part in parts]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    return attend


def candidates(mesh: Mesh, offsets: Sequence[int]) -> dict[str, tuple[Attend, Tensor]]:
    """Every function that runs here with the tokens that each gives this rank; `sdpa` takes all."""
    found = {f"ours_{name}": ours(name, mesh, offsets) for name in OURS}
    even = contiguous_share(offsets)
    if importlib.util.find_spec("yunchang") is not None:
        found["yunchang_ulysses"] = yunchang_ulysses(offsets), even
        found["yunchang_ring"] = yunchang_ring(offsets), document_share(offsets, zigzag=False)
        found["yunchang_zigzag"] = yunchang_zigzag(offsets), document_share(offsets, zigzag=True)
    if deepspeed_path() is not None:
        found["deepspeed_ulysses"] = deepspeed_ulysses(offsets), even
    found["sdpa"] = sdpa(offsets), torch.arange(offsets[-1])
    return found


PEERS = ("yunchang_ulysses", "yunchang_ring", "yunchang_zigzag", "deepspeed_ulysses")
