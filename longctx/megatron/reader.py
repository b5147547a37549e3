"""Tensors out of a Megatron-core distributed checkpoint (`torch_dist`), one stored chunk in memory at a time.

Its `.metadata` is a pickle. It is read by an unpickler that knows the few dataclasses that belong
there and refuses everything else, so nothing in the file can run; chunks are read by torch's
weights-only loader. What else the folder holds (`common.pt`) is not opened.
"""

import io
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError

METADATA = ".metadata"
LATEST = "latest_checkpointed_iteration.txt"
_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
_ALLOWED = {
    *((_METADATA, name) for name in ("Metadata", "StorageMeta", "MetadataIndex", "TensorProperties")),
    *(
        (_METADATA, name)
        for name in ("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")
    ),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    *((_PLANNER, name) for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
    *(("torch", name) for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8")),
    *(("torch", name) for name in ("bool", "int16", "int8", "float8_e4m3fn", "float8_e5m2", "strided")),
}


class _Unpickler(pickle.Unpickler):
    """Finds nothing but what describes tensors."""

    def find_class(self, module: str, name: str) -> Any:
        """The class of an allowed name."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")
        return super().find_class(module, name)


class MegatronReader:
    """A folder of a distributed checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._metadata = _Unpickler(io.BytesIO((path / METADATA).read_bytes())).load()
            self._tensors: dict[str, Any] = {
                name: entry
                for name, entry in self._metadata.state_dict_metadata.items()
                if hasattr(entry, "chunks")
            }
            self._places = {
                (index.fqn, tuple(index.offset)): place
                for index, place in self._metadata.storage_data.items()
                if index.offset is not None
            }
        except (OSError, pickle.UnpicklingError, AttributeError, EOFError, TypeError) as error:
            raise CheckpointError(f"{path / METADATA} cannot be read: {error}") from error

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self._tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        """Of the tensor."""
        found: torch.dtype = self._tensors[name].properties.dtype
        return found

    def read(self, name: str, layer: int | None = None) -> Tensor:
        """A whole tensor, or one layer of a stacked one (without its first dim).

        Raises:
            CheckpointError: a file is missing or damaged, or chunks do not make up the tensor.
        """
        shape = self.shape(name)
        low = [0] * len(shape) if layer is None else [layer, *[0] * (len(shape) - 1)]
        high = list(shape) if layer is None else [layer + 1, *shape[1:]]
        out = torch.empty([b - a for a, b in zip(low, high, strict=True)], dtype=self.dtype(name))
        filled = 0
        for chunk in self._tensors[name].chunks:
            first = [max(a, o) for a, o in zip(low, chunk.offsets, strict=True)]
            last = [min(b, o + n) for b, o, n in zip(high, chunk.offsets, chunk.sizes, strict=True)]
            if any(a >= b for a, b in zip(first, last, strict=True)):
                continue
            values = self._chunk(name, tuple(chunk.offsets), tuple(chunk.sizes))
            part = values[_box(first, last, chunk.offsets)]
            out[_box(first, last, low)].copy_(part)
            filled += part.numel()
        if filled != out.numel():
            raise CheckpointError(
                f"{self.path}: chunks of {name} hold {filled} of {out.numel()} elements; a part is missing"
            )
        return out if layer is None else out[0]

    def _chunk(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        place = self._places.get((name, offset))
        if place is None:
            raise CheckpointError(f"{self.path}: no file holds {name} at {list(offset)}")
        file = self.path / str(place.relative_path)
        try:
            with file.open("rb") as opened:
                opened.seek(place.offset)
                content = io.BytesIO(opened.read(place.length))
            values = torch.load(content, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read at {name}: {error}") from error
        if not isinstance(values, Tensor) or values.numel() != math.prod(shape):
            raise CheckpointError(f"{file}: what is stored as {name} has not the shape {list(shape)}")
        return values.view(shape)


def find_iteration(path: Path) -> Path | None:
    """The folder with the metadata: `path`, or its latest iteration; None: this is no such checkpoint."""
    if (path / METADATA).is_file():
        return path
    latest = path / LATEST
    if latest.is_file():
        word = latest.read_text().strip()
        folder = path / (f"iter_{int(word):07d}" if word.isdecimal() else word)
        if (folder / METADATA).is_file():
            return folder
        raise ConfigError(
            f"{folder} has no {METADATA}; only Megatron-core's --ckpt-format torch_dist is read"
        )
    return None


def _box(first: Sequence[int], last: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(first, last, origin, strict=True))
