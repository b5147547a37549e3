"""One optimizer step: microbatches in, sums of losses over all ranks out."""

import math
from dataclasses import dataclass

import torch

from parallel import comm, fsdp, grads
from parallel.lost import lost_ranks_named

from ..build import Run
from ..data.batch import PackedBatch
from ..spike import LossSpike
from ..staged import StageWork, forward_all
from .losses import Losses
from .tally import Tally, tally_of


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What the step computed, equal on all ranks."""

    loss: float
    """Mean loss of the step's trained tokens in nats."""
    tokens: int
    """Trained tokens of the step."""
    grad_norm: float
    """Global 2-norm of the gradient before clipping."""
    stops: int
    """Number of ranks that were asked to stop."""
    groups: dict[str, float]
    """Loss and tokens by source and by length class, where a curriculum draws."""


def train_step(run: Run, learning_rate: float, *, stop: bool = False) -> StepResult:
    """Forward, backward and update on the step `run.progress.step`.

    Raises:
        LossSpike: loss or gradient norm is not finite or unusual; parameters are not updated.
    """
    tally = tally_of(run)
    run.pulse("data", run.progress.step)
    with lost_ranks_named(f"step {run.progress.step + 1}", run.mesh.group("fsdp")):
        total = backward(run, run.loader.step(run.progress.batch()), extra=(float(stop),), tally=tally)
        run.pulse("reduce")
        norm = grads.clip_(
            run.model.parameters(), run.config.train.max_grad_norm, mesh=run.mesh, replicas=run.replicas
        )
        loss, tokens, stops, *sums = total.tolist()
    tokens = int(tokens)
    mean = loss / max(1, tokens)
    try:
        run.watch.judge(mean, norm.item())
    except LossSpike:
        run.optimizer.zero_grad()
        raise
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    run.pulse("optimizer")
    run.optimizer.step()
    run.optimizer.zero_grad()
    if tally is not None and run.mixture is not None:
        run.mixture.measured(run.progress.batch(), tally.by_source(sums))
    run.progress.step += 1
    run.progress.tokens += tokens
    return StepResult(
        loss=mean,
        tokens=tokens,
        grad_norm=norm.item(),
        stops=int(stops),
        groups=tally.figures(sums) if tally else {},
    )


def backward(
    run: Run,
    microbatches: list[PackedBatch],
    *,
    extra: tuple[float, ...] = (),
    tally: Tally | None = None,
) -> torch.Tensor:
    """Gradients of the step's mean loss in `.grad`, on every rank's shards.

    With lockstep every rank runs every microbatch, also one in which it holds no token, so that
    collectives match.

    Args:
        run: the run.
        microbatches: this sequence group's, whole; equally many on every rank.
        extra: numbers that are summed over the data ranks and stages along with the losses.
        tally: labels by which losses and tokens are summed too.

    Returns:
        [2 + len(extra) + 2 * labels] float64: loss sum, trained tokens, the extras and the tally's
        sums, over all data ranks.
    """
    losses = Losses(run, tally)
    if not run.config.step_plan.lockstep:
        _at_own_pace(run, microbatches, losses)
    elif run.pipeline is None:
        for index, batch in enumerate(microbatches):
            fsdp.set_gradient_sync(run.model, index == len(microbatches) - 1)
            run.pulse("forward")
            logits, local, layout = run.forward(batch, training=True)
            loss = losses.add(logits, local, batch, layout)
            run.pulse("backward")
            loss.backward()
    else:
        run.pulse("forward")
        work = StageWork(run, microbatches, losses, slices=run.config.pipeline.slices, training=True)
        run.pipeline.backward(run.model, work, len(microbatches))
    sums = torch.cat((losses.sums, losses.sums.new_tensor(extra), losses.labelled))
    return grads.normalize_(run.model.parameters(), mesh=run.mesh, sums=sums, replicas=run.replicas)


def _at_own_pace(run: Run, microbatches: list[PackedBatch], losses: Losses) -> None:
    """Only the microbatches in which this rank's group has tokens.

    In between only ranks of one group meet, in the order of the plan. A gather or a reduction of all
    ranks there would wait for ranks that wait for this one: parameters are gathered before, and a
    microbatch without tokens reduces the gradients, on every rank, after.
    """
    fsdp.gather(run.model)
    own = [batch for batch in microbatches if batch.num_tokens]
    for batch in (*own, PackedBatch.empty()):
        fsdp.set_last_backward(run.model, not batch.num_tokens)
        run.pulse("forward")
        logits, local, layout = run.forward(batch, training=True)
        loss = losses.add(logits, local, batch, layout)
        run.pulse("backward")
        loss.backward()
    fsdp.reshard(run.model)


def evaluate(run: Run) -> dict[str, float]:
    """Held-out loss in nats per token and, where the text is known, bits per byte; equal on all ranks."""
    run.pulse("evaluate")
    losses = Losses(run)
    batches = [held_out.batch for held_out in run.held_out]
    doing = f"evaluation after step {run.progress.step}"
    with lost_ranks_named(doing, run.mesh.group("fsdp")), fsdp.forward_only(run.model):
        forward_all(run, batches, losses)
    # One rank of each sequence group counts its bytes.
    speaker = run.mesh.coordinate("cp") == 0 and run.mesh.coordinate("pp") == 0
    counted = sum(held_out.text_bytes or 0.0 for held_out in run.held_out) if speaker else 0.0
    sums = comm.all_reduce(
        torch.cat((losses.sums, losses.sums.new_tensor([counted]))), group=run.mesh.group("data")
    )
    loss, tokens, text_bytes = comm.all_reduce(sums, group=run.mesh.group("pp")).tolist()
    result = {"held_out_loss": loss / max(1, tokens)}
    if text_bytes:
        result["held_out_bits_per_byte"] = loss / math.log(2) / text_bytes
    return result
