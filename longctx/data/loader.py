"""The microbatches of a step for one data group, read one step ahead in a thread."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from .batch import PackedBatch, build_batch
from .index import Int64s
from .packing import Pack, StepPacks, assign, cut_documents
from .tokens import Tokens

if TYPE_CHECKING:
    from ..config.schema import DataConfig


class Packs(Protocol):
    """The packs of every step; a pure function of the step."""

    def packs(self, step: int) -> list[Pack]:
        """All packs of a step, of every data group."""

    def exhausted(self, step: int) -> list[str]:
        """Sources that have nothing more to give after a step."""


def step_packs(
    store: Tokens,
    documents: Int64s,
    config: "DataConfig",
    *,
    seed: int,
    microbatch_tokens: int,
    global_batch_tokens: int,
) -> StepPacks:
    """The packs of every step of a run.

    Args:
        store: tokens.
        documents: int64, numbers of the documents to train on (`Prepared.train_docs`).
        config: section `data`: seq_len, tail, min_len.
        seed: order of the pieces.
        microbatch_tokens: token budget of a pack.
        global_batch_tokens: token budget of a step.
    """
    pieces = cut_documents(
        documents,
        store.lengths[documents],
        seq_len=config.seq_len,
        tail=config.tail,
        min_len=config.min_len,
    )
    packs_per_step = global_batch_tokens // microbatch_tokens
    return StepPacks(pieces, seed=seed, microbatch_tokens=microbatch_tokens, packs_per_step=packs_per_step)


class StepLoader:
    """Random access to steps; the step after the last one asked for is prepared meanwhile.

    Resuming needs nothing but the step number. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        store: Tokens,
        packs: Packs,
        *,
        data_group_index: int = 0,
        num_data_groups: int = 1,
        vocab_size: int | None = None,
    ) -> None:
        self._store = store
        self._packs = packs
        self._group, self._num_groups = data_group_index, num_data_groups
        self._vocab_size = vocab_size
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="longctx-loader")
        self._ahead: tuple[int, Future[list[PackedBatch]]] | None = None
        self.wait_s = 0.0
        """Seconds that the last `step` waited for its batches."""

    def step(self, step: int) -> list[PackedBatch]:
        """This data group's microbatches: as many as every other group's, the last ones maybe empty.

        Raises:
            DataError: a token outside the vocabulary; anything else that the thread met.
        """
        started = time.perf_counter()
        batches = self._take(step).result()
        self._ahead = (step + 1, self._thread.submit(self._read, step + 1))
        self.wait_s = time.perf_counter() - started
        return batches

    def packs(self, step: int) -> list[Pack]:
        """All packs of a step, of every data group."""
        return self._thread.submit(self._packs.packs, step).result()

    def exhausted(self, step: int) -> list[str]:
        """Sources that have nothing more to give after a step."""
        return self._thread.submit(self._packs.exhausted, step).result()

    def documents(self, step: int) -> list[str]:
        """Names of the step's documents over all data groups, with the tokens that were used."""
        return [
            f"{self._store.name(piece.doc)} [{piece.start}:{piece.start + piece.length}]"
            for pack in self.packs(step)
            for piece in pack
        ]

    def figures(self) -> dict[str, float]:
        """Metrics about how the last `step` was planned."""
        return {}

    def forget(self) -> None:
        """Drop what was read ahead, and return when nothing is being read: what is drawn from may change."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and not ahead[1].cancel():
            ahead[1].exception()

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, step: int) -> Future[list[PackedBatch]]:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == step:
            return ahead[1]
        if ahead is not None:
            ahead[1].cancel()
        return self._thread.submit(self._read, step)

    def _read(self, step: int) -> list[PackedBatch]:
        packs = assign(self._packs.packs(step), group=self._group, num_groups=self._num_groups)
        return [build_batch(self._store, pack, vocab_size=self._vocab_size) for pack in packs]
