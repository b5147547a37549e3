"""What happens to each block alone, before FSDP wraps it: recomputation and compilation.

Both replace a block's `forward` and leave its parameters and their names alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .attention import Attention
from .noise import TokenDropout
from .tensor.tokens import Exchange


def recompute(blocks: Sequence[nn.Module], every: int) -> None:
    """Keep only the input of every n-th block and compute its inside again in backward.

    Nothing in a block draws from a random generator (dropout hashes tokens): no state needs keeping.

    Args:
        blocks: in order.
        every: 1 for all of them, n for blocks 0, n, 2n ...; 0 for none.

    Cost: one more forward of those blocks, its communication included.

    Source: Training Deep Nets with Sublinear Memory Cost (Chen et al. 2016).
    """
    for block in blocks[::every] if every else []:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def separate_attention(blocks: Sequence[nn.Module]) -> None:
    """Give every layer an attention of its own, by which the keys that slices leave are told apart."""
    for block in blocks:
        for module in block.modules():
            for name, value in list(vars(module).items()):
                if isinstance(value, Attention):
                    setattr(module, name, replace(value))


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Compile each block for any number of tokens; exchanges, attention and dropout stay outside its graphs.

    Planning an exchange is Python over the microbatch's documents: a graph that followed it would be
    compiled again for every microbatch.

    Cost: the first forward and backward take seconds to minutes.
    """
    # torch keeps at most 8 graphs for one piece of code (recompile_limit), and all models of a process
    # share this code: after a few builds it would quietly run everything uncompiled.
    torch.compiler.reset()
    for block in blocks:
        for module in block.modules():
            if isinstance(module, Exchange | TokenDropout):
                module.__dict__["forward"] = _outside(module.forward)
            for name, value in list(vars(module).items()):
                if isinstance(value, Attention):
                    setattr(module, name, _outside(value))
        block.forward = torch.compile(block.forward, dynamic=True)


def _outside(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    kept: Callable[..., torch.Tensor] = torch.compiler.disable(function, reason="not in a graph")
    return kept
