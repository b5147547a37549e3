"""Sums of losses over the microbatches of a step.

Shapes: t = this rank's tokens, V = vocab_size.
"""

import torch
from torch import Tensor

from parallel.layout import SequenceLayout

from ..build import Run
from ..data.batch import LocalBatch, PackedBatch
from ..model.loss import token_loss
from .tally import Tally


class Losses:
    """Sums of losses and of trained tokens over microbatches, on this rank.

    Attributes:
        sums: [2] float64, loss in nats and tokens.
        labelled: [2 * labels] float64, the tally's loss sums and counts.
    """

    def __init__(self, run: Run, tally: Tally | None = None) -> None:
        self._run, self._tally = run, tally
        self.sums = torch.zeros(2, dtype=torch.float64, device=run.world.device)
        self.labelled = self.sums.new_zeros(2 * tally.size if tally else 0)

    def add(self, logits: Tensor, local: LocalBatch, batch: PackedBatch, layout: SequenceLayout) -> Tensor:
        """Count some tokens of a microbatch.

        Args:
            logits: [t, V] (with tp this rank's columns of V).
            local: the tokens [t].
            batch: the microbatch that they are of.
            layout: which of its tokens they are.

        Returns:
            The sum of their losses, a scalar.
        """
        wide = torch.promote_types(logits.dtype, torch.float32)
        losses = torch.empty(local.num_tokens, dtype=wide, device=logits.device) if self._tally else None
        loss_sum, tokens = token_loss(
            logits, local.targets, local.loss_mask, self._run.vocab_shard, losses=losses
        )
        if self._tally is not None and losses is not None:
            self.labelled += self._tally.sums(batch, layout, losses, local.loss_mask)
        self.sums += torch.stack((loss_sum.detach().double(), tokens.double()))
        return loss_sum
