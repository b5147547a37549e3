"""Forwards without gradients over rows of tokens, and sums of losses and hits by label.

Shapes: T = tokens of a row, t = this rank's share, V = vocab_size, n = rows, L = labels.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel import comm, fsdp
from parallel.tensor.vocabulary import VocabShard

from ..build import Run
from ..data.batch import PackedBatch
from ..model.loss import token_loss

IGNORED = -1
"""Label of a token that is not scored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One sequence to score."""

    ids: Tensor
    """int64 [T + 1]: tokens and the one that follows."""
    labels: Tensor
    """int64 [T]: where the loss of each token's successor is added; `IGNORED`: nowhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sums:
    """What one row's tokens add up to, by label; equal on all ranks."""

    loss: Tensor
    """float64 [L], nats."""
    tokens: Tensor
    """float64 [L]."""
    hits: Tensor
    """float64 [L]: tokens that greedy decoding would have chosen."""


class Clock:
    """A budget of seconds that all ranks agree on."""

    def __init__(self, run: Run, budget_s: float) -> None:
        self._run, self._budget = run, budget_s
        self._start = time.monotonic()

    def seconds(self) -> float:
        """Since the start, on the slowest rank; every rank calls it together."""
        spent = torch.tensor(time.monotonic() - self._start, dtype=torch.float64)
        spent = spent.to(self._run.world.device)
        return float(comm.all_reduce(spent, self._run.mesh.group("world"), op="max"))

    def over(self) -> bool:
        """Whether the budget is spent; 0 has no end."""
        return self._budget > 0 and self.seconds() > self._budget


def score(run: Run, rows: Sequence[Row], *, labels: int, clock: Clock) -> list[Sums | None]:
    """Score rows, dealt out to the data groups; every rank calls it together.

    Args:
        run: its model as it stands.
        rows: equal on all ranks.
        labels: number of labels L.
        clock: rows that do not fit its budget are left out.

    Returns:
        For each row its sums, or None where time ran out.

    Cost: one forward for each row, then one all-reduce of [n, L, 3].
    """
    mesh, device = run.mesh, run.world.device
    groups, mine = mesh.num_data_groups, mesh.data_group_index
    sums = torch.zeros(len(rows), labels, 3, dtype=torch.float64, device=device)
    done = 0
    with fsdp.forward_only(run.model):
        for first in range(0, len(rows), groups):
            if clock.over():
                break
            number = first + mine
            if number < len(rows):
                _add(run, rows[number], sums[number])
            else:
                run.forward(PackedBatch.empty())  # every rank takes part in every gather
            done = min(first + groups, len(rows))
    total = comm.all_reduce(sums, mesh.group("data")).cpu()
    ready = [Sums(loss=row[:, 0], tokens=row[:, 1], hits=row[:, 2]) for row in total[:done]]
    return [*ready, *[None] * (len(rows) - done)]


def _add(run: Run, row: Row, sums: Tensor) -> None:
    """Add this rank's tokens of a row to `sums` [L, 3]."""
    length = len(row.labels)
    batch = PackedBatch(
        input_ids=row.ids[:length],
        targets=row.ids[1:],
        position_ids=torch.arange(length),
        rope_id=torch.zeros(length, dtype=torch.int64),
        loss_mask=row.labels != IGNORED,
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        doc_ids=(0,),
    )
    logits, local, layout = run.forward(batch)
    labels = row.labels[layout.token_index].to(logits.device)  # [t]
    counted = labels != IGNORED
    wide = torch.promote_types(logits.dtype, torch.float32)
    losses = torch.empty(len(labels), dtype=wide, device=logits.device)
    token_loss(logits, local.targets, counted, run.vocab_shard, losses=losses)
    hits = greedy_hits(logits, local.targets, run.vocab_shard)
    columns = torch.stack((losses.double(), torch.ones_like(losses).double(), hits.double()), dim=1)
    sums.index_add_(0, labels[counted], columns[counted])


def greedy_hits(logits: Tensor, targets: Tensor, shard: VocabShard | None) -> Tensor:
    """Bool [t]: whether greedy decoding would choose the target; of equal logits the lowest id wins.

    Args:
        logits: [t, V], or with a shard its columns of V.
        targets: [t] int64.
        shard: the columns.
    """
    largest, chosen = logits.max(1) if len(logits) else (logits.new_zeros(0), targets)
    if shard is not None:
        own = largest.clone()
        comm.all_reduce(largest, shard.group, op="max")
        chosen = torch.where(own == largest, chosen + shard.first, torch.iinfo(torch.int64).max)
        comm.all_reduce(chosen, shard.group, op="min")
    return chosen == targets


def scored(found: Sequence[Sums | None]) -> list[Sums]:
    """Those that time allowed for."""
    return [each for each in found if each is not None]
