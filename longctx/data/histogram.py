"""How long the documents are, by classes of powers of two."""

from dataclasses import dataclass

import numpy as np

from .index import Int64s

_BAR = 30


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthClass:
    """Documents of length in [low, 2 * low)."""

    low: int
    """Shortest length of the class in tokens, a power of two."""
    documents: int
    """Documents in it."""
    tokens: int
    """Tokens in them."""


def length_classes(lengths: Int64s) -> list[LengthClass]:
    """Count documents and tokens by length class, ascending; classes between the ends may be empty.

    Args:
        lengths: int64 [N], tokens of each document; empty documents are left out.
    """
    lengths = lengths[lengths > 0]
    if not len(lengths):
        return []
    exponents = np.frexp(lengths.astype(np.float64))[1] - 1
    documents = np.bincount(exponents)
    tokens = np.bincount(exponents, weights=lengths)
    return [
        LengthClass(low=2**e, documents=int(documents[e]), tokens=int(tokens[e]))
        for e in range(int(exponents.min()), len(documents))
    ]


def histogram_text(lengths: Int64s, seq_len: int) -> str:
    """The classes as a table, and how many documents reach `seq_len` tokens."""
    total = max(1, int(lengths.sum()))
    lines = [f"{'length (tokens)':>22}  {'documents':>10}  {'tokens':>15}  share of tokens"]
    for c in length_classes(lengths):
        share = c.tokens / total
        bar = "#" * round(share * _BAR)
        span = f"{c.low:,} to {2 * c.low - 1:,}"
        lines.append(f"{span:>22}  {c.documents:>10,}  {c.tokens:>15,}  {share:6.1%} {bar}".rstrip())
    reach = lengths >= seq_len
    lines.append(
        f"{len(lengths):,} documents, {int(lengths.sum()):,} tokens; {int(reach.sum()):,} documents "
        f"({reach.mean():.1%}) with {int(lengths[reach].sum()) / total:.1%} of the tokens reach "
        f"data.seq_len={seq_len:,}"
    )
    return "\n".join(lines)
