"""The metrics of one step."""

import torch

from parallel import comm

from ..build import Run
from . import throughput
from .schedule import learning_rate
from .sinks import Row
from .step import StepResult


def make_row(
    run: Run, result: StepResult, seconds: float, *, peak: float | None, behind: bool
) -> tuple[Row, bool]:
    """The step's metrics, and whether any rank's last generation is still on its way.

    Args:
        run: after the step.
        result: of the step.
        seconds: that it took on this rank.
        peak: FLOP/s of one rank, as `throughput.peak_flops`.
        behind: whether this rank's last generation is still on its way.
    """
    step = run.progress.step - 1
    lengths = throughput.step_lengths(run, step)
    memory = _peak_memory_gib(run.world.device)
    seconds, wait, memory, late = _slowest(run, seconds, run.loader.wait_s, memory, float(behind))
    flops = throughput.step_flops(run, step)
    row = {
        "step": run.progress.step,
        "tokens": run.progress.tokens,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": learning_rate(step, run.config.train),
        "step_time_s": seconds,
        "useful_tokens_per_s": result.tokens / seconds,
        "padded_tokens_per_s": sum(lengths) / seconds,
        "mfu": flops / seconds / (peak * run.world.size) if peak else None,
        "peak_memory_gib": memory,
        "data_wait_s": wait,
        "documents": len(lengths),
        "max_document_tokens": max(lengths, default=0),
        **run.loader.figures(),
        **result.groups,
    }
    return row, late > 0


def _slowest(run: Run, *values: float) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64, device=run.world.device)
    return comm.all_reduce(tensor, group=run.mesh.group("world"), op="max").tolist()


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts it in KiB
