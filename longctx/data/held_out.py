"""The fixed batches of an evaluation, with the bytes of text that they predict."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .batch import PackedBatch, build_batch
from .index import Int64s
from .packing import Pack, assign, best_fit, cut_documents
from .split import hash_numbers
from .tokenizers import Tokenizer
from .tokens import Tokens

if TYPE_CHECKING:
    from ..config.schema import DataConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutBatch:
    """A microbatch of an evaluation."""

    batch: PackedBatch
    """Tokens of this data group."""
    text_bytes: float | None
    """UTF-8 bytes that its trained targets stand for, None if nobody knows. bits per byte = sum of token
    losses (nats) / ln 2 / sum of text_bytes, both over all batches and data groups."""


def held_out_packs(
    store: Tokens, documents: Int64s, config: "DataConfig", *, microbatch_tokens: int, eval_tokens: int
) -> list[Pack]:
    """The packs of an evaluation: the same in every run, whatever the seed and layout.

    Pieces are taken in hashed order, so that a small budget is no single long document.

    Args:
        store: tokens.
        documents: int64, numbers of the held-out documents (`Prepared.held_out_docs`).
        config: section `data`: seq_len, tail, min_len.
        microbatch_tokens: token budget of a pack.
        eval_tokens: token budget of all; at least one piece is taken.
    """
    lengths = store.lengths[documents]
    pieces = cut_documents(
        documents, lengths, seq_len=config.seq_len, tail=config.tail, min_len=config.min_len
    )
    order = np.argsort(hash_numbers(pieces.doc ^ (pieces.start << 32)), kind="stable")
    taken = np.cumsum(pieces.length[order]) <= eval_tokens
    taken[:1] = True
    chosen = np.sort(order[taken])
    bins = best_fit(pieces.length[chosen].tolist(), microbatch_tokens)
    return [pieces.pack(chosen[np.array(members)]) for members in bins]


def held_out_batches(
    store: Tokens,
    packs: Sequence[Pack],
    *,
    data_group_index: int = 0,
    num_data_groups: int = 1,
    vocab_size: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> list[HeldOutBatch]:
    """One data group's share of an evaluation; every group gets the same number of batches.

    Args:
        store: tokens.
        packs: of `held_out_packs`.
        data_group_index: this group.
        num_data_groups: all groups.
        vocab_size: rows of the model's embedding, checked.
        tokenizer: counts the bytes of documents of a store that has no record of them.
    """
    share = assign(packs, group=data_group_index, num_groups=num_data_groups)
    batches = [build_batch(store, pack, vocab_size=vocab_size) for pack in share]
    return [
        HeldOutBatch(batch=batch, text_bytes=_text_bytes(store, pack, batch, tokenizer))
        for pack, batch in zip(share, batches, strict=True)
    ]


def _text_bytes(store: Tokens, pack: Pack, batch: PackedBatch, tokenizer: Tokenizer | None) -> float | None:
    """Bytes behind the trained targets: each document's bytes in proportion to its targets taken.

    A document of n tokens has n - 1 targets, so a document that is taken whole counts exactly.
    """
    total = 0.0
    ends = batch.cu_seqlens.tolist()
    for piece, first, last in zip(pack, ends, ends[1:], strict=False):
        size = _document_bytes(store, piece.doc, tokenizer)
        if size is None:
            return None
        trained = int(batch.loss_mask[first:last].sum())
        total += size * trained / max(1, int(store.lengths[piece.doc]) - 1)
    return total


def _document_bytes(store: Tokens, document: int, tokenizer: Tokenizer | None) -> int | None:
    if store.text_bytes is not None:
        return int(store.text_bytes[document])
    if tokenizer is None:
        return None
    return len(tokenizer.decode(store.document(document).tolist()).encode())
