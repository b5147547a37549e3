"""Loss and tokens of a step by source and by length class.

Every piece has a label, source x class; token losses are summed by label on each rank, and the sums
travel in the step's one reduction, so this costs no communication of its own.
"""

from dataclasses import dataclass

import torch

from parallel.layout import SequenceLayout

from ..build import Run
from ..data.batch import PackedBatch
from ..data.sources import Corpus


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """The labels of a run's pieces."""

    sources: tuple[str, ...]
    """Names of the sources."""
    classes: tuple[int, ...]
    """Lengths of the pieces in tokens, ascending powers of two."""
    corpus: Corpus | None
    """Says which source a document is of; None: there is one."""

    @property
    def size(self) -> int:
        """Number of labels."""
        return len(self.sources) * len(self.classes)

    def labels(self, batch: PackedBatch) -> torch.Tensor:
        """int64 [N]: label of each piece."""
        length = batch.cu_seqlens.diff().long()
        label = torch.searchsorted(torch.tensor(self.classes), length)
        if self.corpus is not None:
            documents = torch.tensor(batch.doc_ids, dtype=torch.int64).numpy()
            label = label + torch.from_numpy(self.corpus.source_of(documents)) * len(self.classes)
        return label

    def sums(
        self, batch: PackedBatch, layout: SequenceLayout, losses: torch.Tensor, trained: torch.Tensor
    ) -> torch.Tensor:
        """Loss and trained tokens by label over this rank's share.

        Args:
            batch: the whole microbatch.
            layout: which tokens this rank holds.
            losses: [t] of its tokens, 0 where not trained.
            trained: [t] bool.

        Returns:
            [2 * size] float64: loss sums, then token counts.
        """
        piece = torch.searchsorted(batch.cu_seqlens.long(), layout.token_index, right=True) - 1
        label = self.labels(batch)[piece] if len(piece) else piece
        label = label.to(losses.device)
        loss = torch.zeros(self.size, dtype=torch.float64, device=losses.device)
        count = loss.clone()
        return torch.cat(
            (loss.index_add_(0, label, losses.double()), count.index_add_(0, label, trained.double()))
        )

    def by_source(self, sums: list[float]) -> list[tuple[float, float]]:
        """Loss sum and trained tokens of each source in a step."""
        table = torch.tensor(sums, dtype=torch.float64).view(2, len(self.sources), -1).sum(2)
        return [(loss, tokens) for loss, tokens in table.T.tolist()]

    def figures(self, sums: list[float]) -> dict[str, float]:
        """Metrics of a step: mean loss and tokens of every source and class that it trained.

        Args:
            sums: `sums` over the step's microbatches and all ranks.
        """
        table = torch.tensor(sums, dtype=torch.float64)
        loss, count = table.view(2, len(self.sources), len(self.classes))
        named = zip(self.sources, loss.sum(1).tolist(), count.sum(1).tolist(), strict=True)
        figures = _figures("source", named)
        named = zip(map(str, self.classes), loss.sum(0).tolist(), count.sum(0).tolist(), strict=True)
        return figures | _figures("length", named)


def _figures(kind: str, named: "zip[tuple[str, float, float]]") -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, loss, tokens in named:
        if tokens:
            figures |= {f"loss_{kind}/{name}": loss / tokens, f"tokens_{kind}/{name}": int(tokens)}
    return figures


def tally_of(run: Run) -> Tally | None:
    """The labels of a run with a curriculum; None where whole documents are packed."""
    if run.config.curriculum.kind == "none":
        return None
    from ..data.decomposition import length_classes

    data = run.config.data
    return Tally(
        sources=tuple(source.name for source in data.sources) or ("data",),
        classes=tuple(length_classes(data.min_len, data.seq_len)),
        corpus=run.store if isinstance(run.store, Corpus) else None,
    )
