"""Initial parameters that do not depend on the layout.

Every parameter is a fixed stream of numbers given by (seed, name), cut into blocks of rows with a
generator each. A rank draws only the blocks its shard touches, on the CPU in float32, so that one
process, any FSDP size and any tensor-parallel split start from the same bits.
"""

import hashlib
import math
from concurrent.futures import Executor, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from ..config.schema import ModelConfig
from ..tensors.shard import Shard, shard_of

BLOCK_ELEMENTS = 1 << 20
"""Numbers per generator; changing it changes every model's initial parameters."""
RESIDUAL_OUTPUTS = ("attention.wo.weight", "ffn.down.weight")
"""Projections that add to the residual stream."""


@torch.no_grad()
def init_parameters_(model: nn.Module, seed: int, config: ModelConfig) -> None:
    """Fill every parameter of `model` (or of a stage of it), in place.

    Matrices are normal with `config.init_std`, those into the residual stream divided by
    sqrt(2 num_layers) so that the stream's variance does not grow with depth; norms are one and
    biases zero.

    Args:
        model: parameters with global names, plain tensors or DTensors of any placement.
        seed: the run's seed.
        config: the whole model's shape.

    Raises:
        ValueError: no rule for a parameter.

    Source: Language Models are Unsupervised Multitask Learners (GPT-2, 2019), sec. 2.3.
    """
    residual_std = config.init_std / math.sqrt(2 * config.num_layers)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for name, parameter in model.named_parameters():
            shard = shard_of(parameter)
            if name.endswith("norm.weight"):
                shard.local.fill_(1.0)
            elif name.endswith(".bias"):
                shard.local.zero_()
            elif parameter.ndim == 2:
                std = residual_std if name.endswith(RESIDUAL_OUTPUTS) else config.init_std
                _fill_normal(shard, f"{seed}/{name}", std, pool=pool)
            else:
                raise ValueError(f"no rule to initialise {name} of shape {tuple(parameter.shape)}; add one")


def _fill_normal(shard: Shard, stream: str, std: float, *, pool: Executor) -> None:
    if shard.local.numel() == 0:
        return
    (num_rows, width), (first, left) = shard.shape, shard.offset
    last, right = first + shard.local.shape[0], left + shard.local.shape[1]
    size = max(1, BLOCK_ELEMENTS // width)  # rows per block

    def draw(block: int) -> Tensor:
        generator = torch.Generator(device="cpu").manual_seed(_number(f"{stream}/{block}"))
        rows = min(size, num_rows - block * size)
        values = torch.empty(rows, width, dtype=torch.float32, device="cpu")
        return values.normal_(0.0, std, generator=generator)

    blocks, batch = range(first // size, -(-last // size)), torch.get_num_threads()
    for drawn in (blocks[i : i + batch] for i in range(0, len(blocks), batch)):  # few blocks in memory
        for block, values in zip(drawn, pool.map(draw, drawn), strict=True):
            start = block * size
            low, high = max(start, first), min(start + len(values), last)
            shard.local[low - first : high - first].copy_(values[low - start : high - start, left:right])


def _number(stream: str) -> int:
    """A generator seed that is the same on every machine, unlike Python's `hash`."""
    digest = hashlib.blake2b(stream.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
