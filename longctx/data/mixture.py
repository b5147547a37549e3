"""The pieces of every step: decomposed documents in buckets, drawn by the curriculum.

A bucket holds the pieces of one source and one length. In every epoch of a bucket its pieces come in
another seeded order, and the curriculum's counts walk along it: so a step's pieces are a pure
function of (seed, step), whatever the layout.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heapreplace
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config.weights import class_weights
from ..errors import ConfigError, DataError
from .curriculum import Buckets, Curriculum, Wanted
from .decomposition import decompose_documents, length_classes
from .index import Int64s
from .packing import Floats, Pack, Pieces
from .split import hash_key, hash_numbers
from .weights import LossWeights, source_weights

if TYPE_CHECKING:
    from ..config.schema import CurriculumConfig, DataConfig, SourceConfig
    from .sources import Opened

_NO_LIMIT = 1 << 40
_KEPT = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucketed:
    """Pieces sorted into buckets."""

    pieces: Pieces
    """All pieces."""
    first: Int64s
    """int64 [b+1]: where each bucket's pieces begin in `pieces`, then their number."""
    buckets: Buckets
    """What the curriculum draws from."""
    sources: tuple[str, ...]
    """Names of the sources."""


def bucket_pieces(opened: "Opened", config: "DataConfig", *, too_long: str = "longest") -> Bucketed:
    """Decompose the training documents and sort the pieces by source and length.

    Raises:
        DataError: a source has no document of at least `data.min_len` + 1 tokens.
    """
    pieces = decompose_documents(
        opened.train_docs,
        opened.tokens.lengths[opened.train_docs],
        min_len=config.min_len,
        max_len=config.seq_len,
        tail=config.tail,
        too_long="spread" if too_long == "spread" else "longest",
    )
    row = np.searchsorted(opened.train_docs, pieces.doc)
    source = opened.source[row]
    missing = sorted(set(range(len(opened.names))) - set(source.tolist()))
    if missing:
        raise DataError(
            f"source {opened.names[missing[0]]} has no document to train on with more than data.min_len="
            f"{config.min_len} tokens; add documents, or lower data.min_len or data.held_out"
        )
    log2 = np.frexp(pieces.length.astype(np.float64))[1].astype(np.int64) - 1
    keys = source * 64 + log2
    order = np.argsort(keys, kind="stable")
    present, first = np.unique(keys[order], return_index=True)
    edges = np.append(first, len(order)).astype(np.int64)
    count = np.diff(edges)
    buckets = Buckets(
        source=present // 64,
        length=np.int64(1) << (present % 64),
        pieces=count,
        limit=np.minimum(count * _epochs(config.sources, present // 64), _NO_LIMIT).astype(np.int64),
    )
    sorted_pieces = Pieces(doc=pieces.doc[order], start=pieces.start[order], length=pieces.length[order])
    return Bucketed(pieces=sorted_pieces, first=edges, buckets=buckets, sources=opened.names)


def _epochs(sources: "Sequence[SourceConfig]", source: Int64s) -> Floats:
    """float64 [b]: times that each bucket's pieces may be drawn."""
    limits = [each.max_epochs or float(_NO_LIMIT) for each in sources] or [float(_NO_LIMIT)]
    return np.array(limits)[source]


class MixturePacks:
    """Packs of every step, in the place of `packing.StepPacks`."""

    def __init__(
        self,
        bucketed: Bucketed,
        curriculum: Curriculum,
        *,
        seed: int,
        microbatch_tokens: int,
        step_tokens: int,
    ) -> None:
        longest = int(bucketed.buckets.length.max())
        if microbatch_tokens % longest:
            raise ConfigError(
                f"train.microbatch_tokens={microbatch_tokens:,} is no multiple of the longest piece of "
                f"{longest:,} tokens, so packs could not be filled; set it to a multiple of data.seq_len"
            )
        self.bucketed, self.curriculum = bucketed, curriculum
        self._seed = seed
        self._lock = Lock()  # steps are drawn by the loader's thread, weights change in the caller's
        full, rest = divmod(step_tokens, microbatch_tokens)
        self._room = [microbatch_tokens] * full + [rest] * (rest > 0)
        self._orders: dict[tuple[int, int], Int64s] = {}
        self._recent: dict[int, Int64s] = {}
        self._spent: dict[int, list[str]] = {}

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources."""
        return self.bucketed.sources

    @property
    def weights(self) -> LossWeights | None:
        """The sources' weights where they follow losses."""
        weights = self.curriculum.wanted.source_weights
        return weights if isinstance(weights, LossWeights) else None

    def measured(self, step: int, losses: list[tuple[float, float]]) -> None:
        """Let weights follow a finished step.

        Args:
            step: its number.
            losses: loss sum and trained tokens of each source, over all ranks.
        """
        with self._lock:
            changed = self.weights.measured(step, losses) if self.weights is not None else None
            if changed is not None:
                self._forget(changed)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: empty, but for weights that follow losses."""
        return {} if self.weights is None else self.weights.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        with self._lock:
            if self.weights is not None and state:
                self.weights.restore(state)
                self._forget(0)

    def _forget(self, step: int) -> None:
        """Draw `step` and later ones anew: whoever looked ahead saw other weights."""
        self.curriculum.forget(step)
        for seen in [s for s in self._recent if s >= step]:
            del self._recent[seen], self._spent[seen]

    def numbers(self, step: int) -> Int64s:
        """int64: numbers of the step's pieces in `bucketed.pieces`, longest first."""
        with self._lock:
            if step not in self._recent:  # a step is read ahead, then counted: keep the last few
                if len(self._recent) >= _KEPT:
                    oldest = next(iter(self._recent))
                    del self._recent[oldest], self._spent[oldest]
                self._recent[step] = self._numbers(step)
            return self._recent[step]

    def exhausted(self, step: int) -> list[str]:
        """Sources that have nothing more to give after a step."""
        self.numbers(step)
        with self._lock:
            return self._spent.get(step, [])

    def _numbers(self, step: int) -> Int64s:
        before, drawn = self.curriculum.draw(step)
        self._spent[step] = self.curriculum.exhausted(step + 1)
        found = [
            self._take(bucket, int(before[bucket]), int(count)) for bucket, count in enumerate(drawn) if count
        ]
        numbers = np.concatenate(found)
        lengths = self.bucketed.pieces.length[numbers]
        # Within a length the order is hashed: no source sits at the same place of every step.
        mixed = hash_numbers(numbers, hash_key(self._seed, step))
        order = np.lexsort((mixed, -lengths))
        sorted_: Int64s = numbers[order]
        return sorted_

    def packs(self, step: int) -> list[Pack]:
        """The step's pieces as full packs of a static layout, with attention work spread evenly."""
        numbers = self.numbers(step)
        lengths = self.bucketed.pieces.length[numbers].tolist()
        return [self.bucketed.pieces.pack(numbers[np.array(m)]) for m in spread_evenly(lengths, self._room)]

    def _take(self, bucket: int, start: int, count: int) -> Int64s:
        size = int(self.bucketed.buckets.pieces[bucket])
        parts = []
        while count:
            epoch, place = divmod(start, size)
            part = self._order(bucket, epoch)[place : place + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)

    def _order(self, bucket: int, epoch: int) -> Int64s:
        if (bucket, epoch) in self._orders:
            return self._orders[bucket, epoch]
        for old in sorted(e for b, e in self._orders if b == bucket)[:-1]:  # a step may straddle two epochs
            del self._orders[bucket, old]
        first, stop = int(self.bucketed.first[bucket]), int(self.bucketed.first[bucket + 1])
        numbers = np.arange(first, stop, dtype=np.int64)
        order = numbers[np.argsort(hash_numbers(numbers, hash_key(self._seed, epoch)), kind="stable")]
        self._orders[bucket, epoch] = order
        return order


def spread_evenly(lengths: list[int], room: Sequence[int]) -> list[list[int]]:
    """Fill packs exactly, with even attention work.

    Each piece, longest first, goes to the pack with the least work among those with room. With powers of
    two and rooms that are multiples of the longest, some pack always has room.

    Args:
        lengths: of the pieces, descending powers of two; they add up to the rooms.
        room: tokens of each pack.

    Returns:
        For each pack the numbers of its pieces.
    """
    left = list(room)
    packs: list[list[int]] = [[] for _ in room]
    order = [(0, pack) for pack in range(len(room))]  # a heap of (work, pack)
    for number, length in enumerate(lengths):
        while left[order[0][1]] < length:  # room is a multiple of the length, so that pack is full
            heappop(order)
        work, pack = order[0]
        packs[pack].append(number)
        left[pack] -= length
        heapreplace(order, (work + length * length, pack))
    return packs


def make_mixture(
    opened: "Opened",
    data: "DataConfig",
    config: "CurriculumConfig",
    *,
    seed: int,
    tokens: tuple[int, int],
    steps: int,
) -> MixturePacks:
    """The packs of a run with a curriculum.

    Args:
        opened: the documents.
        data: section `data`.
        config: section `curriculum`, `kind` not none.
        seed: of every draw.
        tokens: `train.microbatch_tokens`, `train.global_batch_tokens`.
        steps: of the run.
    """
    bucketed = bucket_pieces(opened, data, too_long=config.too_long)
    curriculum = Curriculum(
        bucketed.buckets,
        wanted(data, config, bucketed, steps=steps),
        seed=seed,
        step_tokens=tokens[1],
        steps=steps,
    )
    return MixturePacks(bucketed, curriculum, seed=seed, microbatch_tokens=tokens[0], step_tokens=tokens[1])


def loss_weights(data: "DataConfig", config: "CurriculumConfig", *, steps: int) -> LossWeights | None:
    """Weights that follow losses, where the configuration asks for them."""
    if not config.reweight_every:
        return None
    references = [source.reference_loss for source in data.sources]
    return LossWeights(source_weights(data.sources, steps), references, every=config.reweight_every)


def wanted(data: "DataConfig", config: "CurriculumConfig", bucketed: Bucketed, *, steps: int) -> Wanted:
    """What the configuration asks of the curriculum."""
    assert config.kind != "none", "a curriculum is built only where curriculum.kind is not none"
    classes = length_classes(data.min_len, data.seq_len)
    buckets = bucketed.buckets
    factors = np.ones(len(buckets.length))
    for number, source in enumerate(data.sources):
        if source.lengths:
            own = class_weights(source.lengths, classes, f"data.sources[{source.name}].lengths")
            mine = buckets.source == number
            factors[mine] = [own.get(int(k), 0.0) for k in buckets.length[mine]]
    asked = Wanted(
        kind=config.kind,
        mode=config.mode,
        cycles=config.cycles,
        bucket_weights=factors,
        source_weights=loss_weights(data, config, steps=steps) or source_weights(data.sources, steps),
        source_names=bucketed.sources,
    )
    if config.kind != "weights":
        return asked
    weights = class_weights(config.weights, classes, "curriculum.weights")
    if not any(weights.get(int(k), 0.0) > 0 for k in buckets.length):
        raise ConfigError(
            f"curriculum.kind=weights draws from the classes in curriculum.weights, which names none of "
            f"{sorted(set(buckets.length.tolist()))}; set it, for example {{{buckets.length.max()}: 1}}"
        )
    return replace(asked, class_weights=weights)
