"""What a pipeline computes: the parts of the decoder on one rank's tokens of each microbatch.

`forward_all` is the way of every forward that no backward follows, through a pipeline or not.

Shapes: t = this rank's tokens, n = its rows of the stream (fewer with tp), E = hidden_size.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from parallel.layout import SequenceLayout
from parallel.pipeline.routes import Part

from .build import Run
from .data.batch import LocalBatch, PackedBatch


class Sink(Protocol):
    """Where logits go."""

    def add(self, logits: Tensor, local: LocalBatch, batch: PackedBatch, layout: SequenceLayout) -> Tensor:
        """Take the logits of some tokens of a microbatch.

        Args:
            logits: [t, V] (with tp this rank's columns of V).
            local: the tokens [t].
            batch: the microbatch that they are of.
            layout: which of its tokens they are.

        Returns:
            The sum of their losses, a scalar; what backward starts from.
        """


def forward_all(run: Run, batches: Sequence[PackedBatch], sink: Sink) -> None:
    """Microbatches through the model without gradients; every rank calls it together.

    Args:
        run: inside `fsdp.forward_only`.
        batches: whole; equally many on every rank.
        sink: gets the logits, on the ranks of the last stage.
    """
    if run.pipeline is not None:
        run.pipeline.forward(StageWork(run, batches, sink, slices=1), len(batches))
        return
    for batch in batches:
        run.pulse("evaluate")
        logits, local, layout = run.forward(batch)
        sink.add(logits, local, batch, layout)


class StageWork:
    """The computations of one step on this rank's stages; see `parallel.pipeline.runtime.Work`."""

    def __init__(
        self,
        run: Run,
        batches: Sequence[PackedBatch],
        sink: Sink,
        *,
        slices: int,
        training: bool = False,
    ) -> None:
        self._run, self._batches, self._sink, self._slices = run, batches, sink, slices
        self._training = training
        self._held: dict[tuple[int, int], tuple[LocalBatch, SequenceLayout]] = {}

    def run(self, parts: tuple[Part, ...], x: Tensor | None, microbatch: int, piece: int) -> Tensor:
        """Stream [n, E] of some parts; of the head the sum of the tokens' losses."""
        self._run.pulse("forward")
        local, layout = self._tokens(microbatch, piece)
        noise = self._run.noise(self._batches[microbatch], layout) if self._training else None
        y: Tensor = self._run.model(
            local.input_ids if x is None else x,
            local.position_ids,
            local.rope_id,
            layout=layout,
            noise=noise,
            parts=self._run.stages.parts(parts),
        )
        if parts == ("head",):
            y = self._sink.add(y, local, self._batches[microbatch], layout)
        if y.requires_grad:
            y.register_hook(self._on_backward)
        return y

    def _on_backward(self, gradient: Tensor) -> None:
        self._run.pulse("backward")

    def rows(self, microbatch: int, piece: int) -> int:
        """Rows n of the stream: with tp the tokens are divided once more."""
        return -(-self._tokens(microbatch, piece)[0].num_tokens // self._run.mesh.size("tp"))

    def flush(self) -> Tensor:
        """Zero, from everything that this rank holds, without a token."""
        run, empty = self._run, PackedBatch.empty()
        layout = run.layout(empty.cu_seqlens)
        local = empty.take(layout.token_index).to(run.world.device)
        stream = local.input_ids
        if not run.model.parts.embed:
            assert run.pipeline is not None, "only pipelines are flushed"
            width = run.config.model.hidden_size
            stream = torch.zeros(0, width, dtype=run.pipeline.dtype, device=run.world.device)
            stream.requires_grad_(True)
        y: Tensor = run.model(stream, local.position_ids, local.rope_id, layout=layout)
        return y.sum()

    def _tokens(self, microbatch: int, piece: int) -> tuple[LocalBatch, SequenceLayout]:
        key = microbatch, piece
        if key not in self._held:
            batch = self._batches[microbatch]
            whole = self._run.layout(batch.cu_seqlens, batch.degree)
            for index, layout in enumerate(self._run.slices(whole, self._slices)):
                local = batch.take(layout.token_index).to(self._run.world.device)
                self._held[microbatch, index] = local, layout
        return self._held[key]
