"""How fast the hardware is, what a step costs, and how long a run will take."""

import time
from collections.abc import Iterator

import torch

from ..build import Run, compute_dtype
from ..errors import OutOfData
from ..model.flops import causal_flops

# Dense bf16 peaks in 1e12 FLOP/s, without sparsity, from the vendors' data sheets.
BF16_PEAK_TFLOPS = {
    "A100": 312.0,
    "A800": 312.0,
    "H100": 989.0,
    "H200": 989.0,
    "H800": 989.0,
    "B200": 2250.0,
    "MI250X": 191.5,
}
# Share of the matmul rate that a small model reaches over a whole step on CPU; the estimate's one constant.
CPU_STEP_EFFICIENCY = 0.37
GPU_STEP_EFFICIENCY = 0.35


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that MFU divides by, for one rank.

    CUDA: the data sheet's dense bf16 peak, None for a device that the table lacks.
    CPU: this rank's measured matmul rate in `dtype`, while the other ranks measure theirs.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak * 1e12 for key, peak in BF16_PEAK_TFLOPS.items() if key in name), None)
    return _matmul_rate(dtype)


def _matmul_rate(dtype: torch.dtype, seconds: float = 0.15) -> float:
    size = 512
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    torch.mm(left, right)
    best, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        torch.mm(left, right)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def step_lengths(run: Run, step: int) -> list[int]:
    """Tokens of every document piece of a step, over all data groups."""
    return [piece.length for pack in run.loader.packs(run.progress.batch(step)) for piece in pack]


def step_flops(run: Run, step: int) -> float:
    """Causal model FLOPs of a step over all ranks, from its real document lengths."""
    return causal_flops(run.config.model, step_lengths(run, step))


def estimate_seconds(run: Run, peak: float | None, *, samples: int = 32) -> float | None:
    """Predicted wall time of the steps that are left, before any of them has run.

    Args:
        run: the run.
        peak: one rank's `peak_flops`.
        samples: steps whose FLOPs are counted exactly, as far as the data goes; the mean stands for the
            rest.
    """
    if peak is None:
        return None
    first, last = run.progress.step, run.config.train.steps
    if first >= last:
        return 0.0
    counted = list(_counted(run, range(first, min(last, first + samples))))
    if not counted:
        return None
    flops = sum(counted) / len(counted) * (last - first)
    share = GPU_STEP_EFFICIENCY if run.world.device.type == "cuda" else CPU_STEP_EFFICIENCY
    return flops / (peak * run.world.size * share)


def _counted(run: Run, steps: range) -> Iterator[float]:
    """FLOPs of each step until the data ends; training comes to that itself."""
    for step in steps:
        try:
            yield step_flops(run, step)
        except OutOfData:
            return


def dtype_of(run: Run) -> torch.dtype:
    """Compute dtype of the run."""
    return compute_dtype(run.config.train)
