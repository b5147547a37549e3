"""What this machine offers, found without importing torch."""

import importlib.util
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..config.schema import Config
from ..errors import ConfigError

CPU_PROCESSES = 2
MIB = 1024**2
_QUERY = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Local:
    """How a run uses this machine."""

    device: Literal["cpu", "cuda"]
    """`cpu` or `cuda`."""
    processes: int
    """Workers to start."""
    gpu_bytes: int | None
    """Memory of the smallest visible GPU, where the driver says."""


def choose_local(config: Config, gpus: list[int | None] | None = None) -> Local:
    """Device and number of processes for a run on this machine.

    Args:
        config: as loaded.
        gpus: memory in bytes of each visible GPU; None: ask the driver.

    Raises:
        ConfigError: more processes than GPUs, or cuda without any.
    """
    gpus = visible_gpus() if gpus is None else gpus
    fallback: Literal["cpu", "cuda"] = "cuda" if gpus else "cpu"
    device = fallback if config.run.device == "auto" else config.run.device
    if device == "cuda" and not gpus:
        raise ConfigError(
            "run.device=cuda, but no GPU with a CUDA build of torch is visible; set run.device=cpu"
        )
    processes = config.run.processes or (len(gpus) if device == "cuda" else CPU_PROCESSES)
    if device == "cuda" and processes > len(gpus):
        raise ConfigError(
            f"run.processes={processes} exceeds the {len(gpus)} visible GPUs; "
            f"choose at most {len(gpus)}, or set run.device=cpu"
        )
    known = [each for each in gpus if each] if device == "cuda" else []
    return Local(device=device, processes=processes, gpu_bytes=min(known, default=None))


def pinned(config: Config, local: Local) -> tuple[Config, list[str]]:
    """The configuration with what was found here, and the overrides that tell the workers the same."""
    run, overrides = replace(config.run, device=local.device), []
    if config.run.device == "auto":
        overrides.append(f"run.device={local.device}")
    if config.run.device_memory == "auto" and local.gpu_bytes:
        run = replace(run, device_memory=local.gpu_bytes)
        overrides.append(f"run.device_memory={local.gpu_bytes}")
    return replace(config, run=run), overrides


def visible_gpus() -> list[int | None]:
    """Memory in bytes of each GPU that a worker would see; None where the driver does not say."""
    if not torch_has_cuda():
        return []
    return select(installed_gpus(), os.environ)


def select(gpus: list[int | None], environ: Mapping[str, str]) -> list[int | None]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; unknown ids end the list."""
    asked = environ.get("CUDA_VISIBLE_DEVICES")
    if asked is None:
        return gpus
    chosen: list[int | None] = []
    for name in asked.split(","):
        name = name.strip()
        if name.isdigit() and int(name) < len(gpus):
            chosen.append(gpus[int(name)])
        elif name.startswith(("GPU-", "MIG-")) and gpus:
            chosen.append(min((each for each in gpus if each), default=None))
        else:
            break
    return chosen


def installed_gpus() -> list[int | None]:
    """Memory in bytes of each GPU of the machine, from nvidia-smi, else counted under /proc."""
    try:
        answer = subprocess.run(_QUERY, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        folder = Path("/proc/driver/nvidia/gpus")
        return [None for _ in folder.iterdir()] if folder.is_dir() else []
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    return [int(line) * MIB if line.isdigit() else None for line in lines]


def torch_has_cuda() -> bool:
    """Whether the installed torch has its CUDA library."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    return Path(spec.origin).with_name("lib").joinpath("libtorch_cuda.so").exists()
