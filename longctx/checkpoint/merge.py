"""The average of several checkpoints' weights, streamed: one block of each in memory.

Source: The Llama 3 Herd of Models (2024), sec. 3.4.3: checkpoints of the annealing are averaged.
"""

from collections.abc import Iterator, Sequence

import torch

from ..errors import CheckpointError, ConfigError
from ..tensors.dtypes import torch_dtype
from ..tensors.fill import raw_bytes, read_tensor
from ..tensors.header import BLOCK_BYTES
from ..tensors.index import TensorIndex, by_rows, stream
from ..tensors.writer import Chunk


def check_mergeable(names: Sequence[str], indices: Sequence[TensorIndex]) -> None:
    """Refuse weights that are not of one model.

    Raises:
        ConfigError: naming the first parameter that differs.
    """
    first = indices[0].tensors
    for name, index in zip(names[1:], indices[1:], strict=True):
        for each in sorted(first.keys() | index.tensors.keys()):
            a, b = first.get(each), index.tensors.get(each)
            if a is None or b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
                raise ConfigError(
                    f"{name} is of another model than {names[0]}: {each} is missing there or differs; "
                    "merge checkpoints of one run"
                )


def average(indices: Sequence[TensorIndex], name: str) -> Iterator[Chunk]:
    """The mean of a tensor over several checkpoints, in float64 and rounded once.

    Raises:
        CheckpointError: a file is damaged.
    """
    dtype = torch_dtype(indices[0].tensors[name].dtype)
    for blocks in zip(*(_blocks(index, name) for index in indices), strict=True):
        parts = [torch.frombuffer(block, dtype=dtype) for block in blocks]
        if len({len(part) for part in parts}) != 1:
            raise CheckpointError(f"{name}: blocks of different lengths")
        total = torch.zeros(len(parts[0]), dtype=torch.float64)
        for part in parts:
            total += part
        yield raw_bytes((total / len(parts)).to(dtype))


def _blocks(index: TensorIndex, name: str) -> Iterator[memoryview]:
    """A tensor's bytes in blocks that are the same for every checkpoint, whatever its pieces."""
    stored = index.tensors[name]
    source = stream(index, name) if by_rows(stored) else iter([raw_bytes(read_tensor(index, name))])
    rest = bytearray()
    for block in source:
        while len(block):
            need = BLOCK_BYTES - len(rest)
            rest += block[:need]
            block = block[need:]
            if len(rest) == BLOCK_BYTES:
                yield memoryview(rest)
                rest = bytearray()
    if rest:
        yield memoryview(rest)
