"""Which kernel computes: the one place where a kernel's name becomes functions."""

import torch

from ..errors import ConfigError
from .kernel_cpu import CPU_FLASH
from .kernel_torch import TORCH
from .kernels import Kernel

KERNELS: tuple[Kernel, ...] = (CPU_FLASH, TORCH)
"""Best first: "auto" takes the first that can."""


def choose(name: str, *, form: str, device: str, dtype: torch.dtype, head_dim: int) -> tuple[Kernel, str]:
    """The kernel for these tensors, and why it was taken.

    Args:
        name: a kernel's name, or "auto" for the first of `KERNELS` that can.
        form: form of the tiles (`TileBatch.form`).
        device: device type of the tensors.
        dtype: their dtype.
        head_dim: their head dim.

    Returns:
        The kernel and one line that says why ("cpu_flash: first that can; ..."), for `doctor`.

    Raises:
        ConfigError: no such kernel, or it cannot serve these tensors.
    """
    check_name(name)
    refused: list[str] = []
    for kernel in KERNELS:
        if name not in ("auto", kernel.name):
            continue
        reason = refusal(kernel, form=form, device=device, dtype=dtype, head_dim=head_dim)
        if reason is None:
            return kernel, f"{kernel.name}: " + (
                "; ".join(["first that can", *refused]) if name == "auto" else "asked"
            )
        refused.append(f"not {kernel.name} ({reason})")
    wanted = f"{form} tiles on {device}, {dtype}, head_dim={head_dim}"
    raise ConfigError(f"no attention kernel for {wanted}: {'; '.join(refused)}")


def check_name(name: str) -> None:
    """Refuse a kernel that no machine has.

    Raises:
        ConfigError: unknown name.
    """
    names = ["auto", *(kernel.name for kernel in KERNELS)]
    if name not in names:
        raise ConfigError(f"attention.kernel={name!r} is unknown; choose one of {names}")


def refusal(kernel: Kernel, *, form: str, device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a kernel cannot serve such tensors here, or None if it can."""
    if device not in kernel.devices:
        return f"runs on {sorted(kernel.devices)}"
    if form not in kernel.forms:
        return f"computes {sorted(kernel.forms)} tiles, not {form}"
    if dtype not in kernel.dtypes:
        return f"takes {sorted(str(d).removeprefix('torch.') for d in kernel.dtypes)}"
    if head_dim > kernel.max_head_dim or head_dim % kernel.head_dim_multiple:
        return f"takes head dims up to {kernel.max_head_dim}, multiples of {kernel.head_dim_multiple}"
    return kernel.missing()
