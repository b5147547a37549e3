"""One optimizer step: microbatches in, sums of losses over all ranks out."""

import math
from dataclasses import dataclass

import torch

from parallel import comm, fsdp, grads
from parallel.lost import lost_ranks_named

from ..build import Run
from ..data.batch import PackedBatch
from ..errors import TrainingDiverged
from ..model.loss import token_loss
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
        TrainingDiverged: loss or gradient norm is not finite; parameters are not updated.
    """
    tally = tally_of(run)
    with lost_ranks_named(f"step {run.progress.step + 1}", run.mesh.group("fsdp")):
        total = backward(run, run.loader.step(run.progress.step), extra=(float(stop),), tally=tally)
        norm = grads.clip_(run.model.parameters(), run.config.train.max_grad_norm, mesh=run.mesh)
        loss, tokens, stops, *sums = total.tolist()
    tokens = int(tokens)
    mean = loss / max(1, tokens)
    if not (math.isfinite(mean) and math.isfinite(norm.item())):
        raise TrainingDiverged(f"loss {mean} and gradient norm {norm.item()}")
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    run.optimizer.step()
    run.optimizer.zero_grad()
    if tally is not None and run.mixture is not None:
        run.mixture.measured(run.progress.step, tally.by_source(sums))
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

    Every rank runs every microbatch, also one in which it holds no token, so that collectives match.

    Args:
        run: the run.
        microbatches: this sequence group's, whole; equally many on every rank.
        extra: numbers that are summed over the data ranks along with the losses.
        tally: labels by which losses and tokens are summed too.

    Returns:
        [2 + len(extra) + 2 * labels] float64: loss sum, trained tokens, the extras and the tally's
        sums, over all data ranks.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=run.world.device)
    parts = torch.zeros(2 * tally.size if tally else 0, dtype=torch.float64, device=run.world.device)
    for index, batch in enumerate(microbatches):
        fsdp.set_gradient_sync(run.model, index == len(microbatches) - 1)
        logits, local, layout = run.forward(batch, training=True)
        losses = torch.empty(local.num_tokens, dtype=_wide(logits), device=logits.device) if tally else None
        loss_sum, tokens = token_loss(logits, local.targets, local.loss_mask, run.vocab_shard, losses=losses)
        loss_sum.backward()
        if tally is not None and losses is not None:
            parts += tally.sums(batch, layout, losses, local.loss_mask)
        sums += torch.stack((loss_sum.detach().double(), tokens.double()))
    sums = torch.cat((sums, torch.tensor(extra, dtype=torch.float64, device=sums.device), parts))
    return grads.normalize_(run.model.parameters(), mesh=run.mesh, sums=sums)


def _wide(logits: torch.Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def batch_loss(run: Run, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss sum and number of trained tokens of this rank's share of a packed batch."""
    logits, local, _ = run.forward(batch)
    return token_loss(logits, local.targets, local.loss_mask, run.vocab_shard)


def evaluate(run: Run) -> dict[str, float]:
    """Held-out loss in nats per token and, where the text is known, bits per byte; equal on all ranks."""
    sums = torch.zeros(3, dtype=torch.float64, device=run.world.device)
    speaker = run.mesh.coordinate("cp") == 0  # one rank of each sequence group counts its bytes
    doing = f"evaluation after step {run.progress.step}"
    with lost_ranks_named(doing, run.mesh.group("fsdp")), fsdp.forward_only(run.model):
        for held_out in run.held_out:
            loss_sum, tokens = batch_loss(run, held_out.batch)
            text_bytes = (held_out.text_bytes or 0.0) if speaker else 0.0
            sums += torch.stack((loss_sum.double(), tokens.double(), sums.new_tensor(text_bytes)))
    loss, tokens, text_bytes = comm.all_reduce(sums, group=run.mesh.group("data")).tolist()
    result = {"held_out_loss": loss / max(1, tokens)}
    if text_bytes:
        result["held_out_bits_per_byte"] = loss / math.log(2) / text_bytes
    return result
