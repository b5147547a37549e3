"""Forwards without gradients over rows of tokens, and sums of losses and hits by label.

Shapes: T = tokens of a row, t = this rank's share, V = vocab_size, n = rows, L = labels.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel import comm, fsdp
from parallel.layout import SequenceLayout
from parallel.tensor.vocabulary import VocabShard

from ..build import Run
from ..data.batch import LocalBatch, PackedBatch
from ..model.loss import token_loss
from ..staged import forward_all

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

    Cost: one forward for each row, then one all-reduce of [n, L, 3] over data ranks and stages. A
        pipeline takes as many rows at a time as it has stages.
    """
    mesh, stages = run.mesh, run.mesh.size("pp")
    sums = _Sums(run, rows, labels)
    done = 0
    with fsdp.forward_only(run.model):
        for first in range(0, len(rows), mesh.num_data_groups * stages):
            if clock.over():
                break
            mine = range(first + mesh.data_group_index * stages, first + (mesh.data_group_index + 1) * stages)
            forward_all(run, [sums.batch(number) for number in mine], sums)
            done = min(first + mesh.num_data_groups * stages, len(rows))
    total = comm.all_reduce(comm.all_reduce(sums.total, mesh.group("data")), mesh.group("pp")).cpu()
    ready = [Sums(loss=row[:, 0], tokens=row[:, 1], hits=row[:, 2]) for row in total[:done]]
    return [*ready, *[None] * (len(rows) - done)]


class _Sums:
    """What the rows' tokens on this rank add up to.

    Attributes:
        total: float64 [n, L, 3], losses, tokens and hits of every row.
    """

    def __init__(self, run: Run, rows: Sequence[Row], labels: int) -> None:
        self._run, self._rows = run, rows
        self.total = torch.zeros(len(rows), labels, 3, dtype=torch.float64, device=run.world.device)

    def batch(self, number: int) -> PackedBatch:
        """A row as a microbatch; beyond the last an empty one: every rank takes part in every gather."""
        if number >= len(self._rows):
            return PackedBatch.empty()
        row = self._rows[number]
        length = len(row.labels)
        return PackedBatch(
            input_ids=row.ids[:length],
            targets=row.ids[1:],
            position_ids=torch.arange(length),
            rope_id=torch.zeros(length, dtype=torch.int64),
            loss_mask=row.labels != IGNORED,
            cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
            doc_ids=(number,),
        )

    def add(self, logits: Tensor, local: LocalBatch, batch: PackedBatch, layout: SequenceLayout) -> Tensor:
        """Add this rank's tokens of a row."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        losses = torch.empty(len(logits), dtype=wide, device=logits.device)
        shard = self._run.vocab_shard
        loss, _ = token_loss(logits, local.targets, local.loss_mask, shard, losses=losses)
        if not batch.doc_ids:
            return loss
        labels = self._rows[batch.doc_ids[0]].labels[layout.token_index].to(logits.device)  # [t]
        counted = local.loss_mask
        hits = greedy_hits(logits, local.targets, shard)
        columns = torch.stack((losses.double(), torch.ones_like(losses).double(), hits.double()), dim=1)
        self.total[batch.doc_ids[0]].index_add_(0, labels[counted], columns[counted])
        return loss


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
