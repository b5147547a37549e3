"""The metrics of one step."""

import torch

from parallel import comm

from ..build import Run
from . import throughput
from .schedule import learning_rate
from .sinks import Row
from .step import StepResult


def make_row(
    run: Run, result: StepResult, seconds: float, *, peak: float | None, behind: bool, save_s: float
) -> tuple[Row, bool, float]:
    """The step's metrics; whether any rank's last generation is still on its way; the newest save's seconds.

    Args:
        run: after the step.
        result: of the step.
        seconds: that it took on this rank.
        peak: FLOP/s of one rank, as `throughput.peak_flops`.
        behind: whether this rank's last generation is still on its way.
        save_s: of the newest save, where this rank knows it, else 0.
    """
    step = run.progress.step - 1
    lengths = throughput.step_lengths(run, step)
    memory = _peak_memory_gib(run.world.device)
    wait = run.loader.wait_s
    seconds, wait, memory, late, save_s = _slowest(run, seconds, wait, memory, float(behind), save_s)
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
    return row, late > 0, save_s


def _slowest(run: Run, *values: float) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64, device=run.world.device)
    return comm.all_reduce(tensor, group=run.mesh.group("world"), op="max").tolist()


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts it in KiB
