"""Names of element types in safetensors files, and torch's. No torch unless its types are asked for."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import CheckpointError

if TYPE_CHECKING:
    import torch

ITEM_BYTES: Mapping[str, int] = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Types that parameters may have in a file -> bytes of an element."""
_TORCH = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
LONG_NAMES: Mapping[str, str] = _TORCH
"""Names in files -> names in manifests and configs."""
SHORT_NAMES: Mapping[str, str] = {long: short for short, long in _TORCH.items()}
"""The other way."""


def check_dtype(dtype: str, where: str) -> None:
    """Refuse element types that are no plain floating point.

    Raises:
        CheckpointError: names the tensor and what to do.
    """
    if dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"{where} has dtype {dtype}; supported are {', '.join(ITEM_BYTES)}. Quantized weights need their "
            "scales: convert them to bfloat16 with the tool that made them"
        )


def torch_dtype(dtype: str) -> "torch.dtype":
    """Torch type of a name in a file."""
    import torch

    found: torch.dtype = getattr(torch, _TORCH[dtype])
    return found


def file_dtype(dtype: "torch.dtype") -> str:
    """The name in a file of one of torch's types."""
    return SHORT_NAMES[str(dtype).removeprefix("torch.")]
