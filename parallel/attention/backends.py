"""Which kernel computes: the one place where a kernel's name becomes functions."""

from dataclasses import dataclass

import torch

from ..errors import ConfigError
from .kernel_cpu import CPU_FLASH
from .kernel_fa2 import FLASH_ATTN_2
from .kernel_fa3 import FLASH_ATTN_3
from .kernel_fa4 import FLASH_ATTN_4
from .kernel_torch import TORCH
from .kernel_torch_gpu import CUDNN, TORCH_FLASH
from .kernels import Kernel

KERNELS: tuple[Kernel, ...] = (
    FLASH_ATTN_3,
    FLASH_ATTN_4,
    FLASH_ATTN_2,
    TORCH_FLASH,
    CUDNN,
    CPU_FLASH,
    TORCH,
)
"""Best first: "auto" takes the first that can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a call asks of a kernel."""

    form: str
    """Form of the tiles (`TileBatch.form`)."""
    device: str
    """Device type of the tensors."""
    dtype: torch.dtype
    """Their dtype."""
    head_dim: int
    """Their head dim."""
    grouped: bool = False
    """Whether there are fewer key heads than query heads."""

    def __str__(self) -> str:
        heads = ", grouped heads" if self.grouped else ""
        return f"{self.form} tiles on {self.device}, {self.dtype}, head_dim={self.head_dim}{heads}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One kernel's chances."""

    kernel: Kernel
    """The kernel."""
    usable: bool
    """Whether it can serve the needs here."""
    reason: str
    """Why not; for the first usable one why it is taken, for later ones what goes before."""


def survey(needs: Needs) -> list[Candidate]:
    """Every kernel, best first, with the reason why "auto" takes it or not; for `doctor`."""
    found: list[Candidate] = []
    first: str | None = None
    for kernel in KERNELS:
        reason = refusal(kernel, needs)
        usable = reason is None
        if reason is None:
            reason = "the first that can" if first is None else f"can, after {first}"
            first = first or kernel.name
        found.append(Candidate(kernel=kernel, usable=usable, reason=reason))
    return found


def choose(name: str, needs: Needs) -> tuple[Kernel, str]:
    """The kernel for these needs, and why it was taken.

    Args:
        name: a kernel's name, or "auto" for the first of `KERNELS` that can.
        needs: what it must serve.

    Returns:
        The kernel and one line that says why ("cpu_flash: the first that can; not ...").

    Raises:
        ConfigError: no such kernel, or it cannot serve these tensors.
    """
    check_name(name)
    refused: list[str] = []
    for kernel in KERNELS:
        if name not in ("auto", kernel.name):
            continue
        reason = refusal(kernel, needs)
        if reason is None:
            why = "; ".join(["the first that can", *refused]) if name == "auto" else "asked for"
            return kernel, f"{kernel.name}: {why}"
        refused.append(f"not {kernel.name} ({reason})")
    if name == "auto":
        raise ConfigError(f"no attention kernel for {needs}: {'; '.join(refused)}")
    able = ["auto", *(candidate.kernel.name for candidate in survey(needs) if candidate.usable)]
    raise ConfigError(f"attention.kernel={name!r} does not serve {needs}: {refused[0]}; choose one of {able}")


def check_name(name: str) -> None:
    """Refuse a kernel that no machine has.

    Raises:
        ConfigError: unknown name.
    """
    names = ["auto", *(kernel.name for kernel in KERNELS)]
    if name not in names:
        raise ConfigError(f"attention.kernel={name!r} is unknown; choose one of {names}")


def refusal(kernel: Kernel, needs: Needs) -> str | None:
    """Why a kernel cannot serve such tensors here, or None if it can."""
    if needs.device not in kernel.devices:
        return f"runs on {', '.join(sorted(kernel.devices))}"
    if needs.form not in kernel.forms:
        return f"computes {', '.join(sorted(kernel.forms))} tiles, not {needs.form}"
    if needs.dtype not in kernel.dtypes:
        return f"takes {', '.join(sorted(str(d).removeprefix('torch.') for d in kernel.dtypes))}"
    if needs.head_dim > kernel.max_head_dim or needs.head_dim % kernel.head_dim_multiple:
        return f"takes head dims up to {kernel.max_head_dim}, multiples of {kernel.head_dim_multiple}"
    if needs.grouped and not kernel.gqa:
        return "takes as many key heads as query heads"
    return kernel.missing()
