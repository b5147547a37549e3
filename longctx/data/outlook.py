"""What decomposition does to a corpus: pieces and tokens per class, work saved, tokens left out.

The comparison is concat-and-chunk: all documents joined and cut into rows of `data.seq_len` tokens,
each row one attention sequence.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..files import write_text
from .decomposition import decompose_documents, length_classes
from .index import Int64s

if TYPE_CHECKING:
    from ..config.schema import DataConfig

FEW = 0.01
"""Below this share of documents that reach `data.seq_len`, `prepare` warns."""
_BAR = 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """Pieces of a corpus by length class."""

    classes: tuple[int, ...]
    """Length of the pieces of each class in tokens, ascending."""
    pieces: tuple[int, ...]
    """Pieces of each class."""
    documents: int
    """Documents."""
    reaching: int
    """Documents of at least `data.seq_len` tokens."""
    tokens: int
    """Tokens of the documents."""
    pairs: int
    """Query-key pairs of all pieces, causal."""
    chunked_pairs: float
    """Query-key pairs of as many tokens in rows of `data.seq_len`, causal, without a mask."""

    @property
    def kept(self) -> int:
        """Tokens in pieces."""
        return sum(length * count for length, count in zip(self.classes, self.pieces, strict=True))

    @property
    def attention_share(self) -> float | None:
        """Attention work of the pieces / that of concat-and-chunk on as many tokens; None without pieces."""
        return self.pairs / self.chunked_pairs if self.chunked_pairs else None


def outlook(lengths: Int64s, config: "DataConfig", *, too_long: str = "longest") -> Outlook:
    """Count the pieces of documents of these lengths.

    Args:
        lengths: int64 [n], tokens of each document.
        config: section `data`: min_len, seq_len, tail.
        too_long: `curriculum.too_long`.
    """
    classes = length_classes(config.min_len, config.seq_len)
    found = decompose_documents(
        np.arange(len(lengths)),
        lengths,
        min_len=config.min_len,
        max_len=config.seq_len,
        tail=config.tail,
        too_long="spread" if too_long == "spread" else "longest",
    )
    exponents = np.frexp(found.length.astype(np.float64))[1] - 1
    counts = np.bincount(exponents, minlength=classes[-1].bit_length())[classes[0].bit_length() - 1 :]
    kept = int(found.length.sum())
    return Outlook(
        classes=tuple(classes),
        pieces=tuple(int(count) for count in counts),
        documents=len(lengths),
        reaching=int((lengths >= config.seq_len).sum()),
        tokens=int(lengths.sum()),
        pairs=int((found.length * (found.length + 1) // 2).sum()),
        chunked_pairs=kept * (config.seq_len + 1) / 2,
    )


def outlook_text(found: Outlook, name: str) -> str:
    """The pieces as a table, what is left out and what is saved; a warning where few documents are long."""
    longest = found.classes[-1]
    lines = [f"{name}: pieces of a curriculum (curriculum.kind)"]
    for length, count in zip(found.classes, found.pieces, strict=True):
        share = length * count / max(1, found.kept)
        bar = "#" * round(share * _BAR)
        lines.append(f"{length:>22,}  {count:>10,}  {length * count:>15,}  {share:6.1%} {bar}".rstrip())
    left_out = 1 - found.kept / max(1, found.tokens)
    lines.append(
        f"{left_out:.1%} of the tokens are in no piece (shorter than data.min_len={found.classes[0]:,}, or "
        "a document's last token)"
    )
    lines.append(
        f"no document has a piece; lower data.min_len={found.classes[0]:,}, or add longer documents"
        if found.attention_share is None
        else f"attention work of the pieces: {found.attention_share:.1%} of concat-and-chunk at {longest:,} "
        "tokens"
    )
    reach = found.reaching / max(1, found.documents)
    if reach < FEW:
        lines.append(
            f"warning: {found.reaching:,} of {found.documents:,} documents ({reach:.2%}) reach data.seq_len="
            f"{longest:,}; a model learns little about distances that its documents do not have: add longer "
            "documents or shorten data.seq_len"
        )
    return "\n".join(lines)


def write_plot(path: Path, found: Outlook, lengths: Int64s) -> Path:
    """Draw shares of tokens by length, documents beside pieces, as an SVG file."""
    whole = np.bincount(np.frexp(np.maximum(lengths, 1).astype(np.float64))[1] - 1, weights=lengths)
    pieces = {
        length.bit_length() - 1: length * n for length, n in zip(found.classes, found.pieces, strict=True)
    }
    exponents = range(int(min(np.flatnonzero(whole)[0], *pieces)), len(whole))
    bars: list[str] = []
    highest = max(
        float(whole.max()) / max(1, found.tokens), *(n / max(1, found.kept) for n in pieces.values())
    )
    for place, exponent in enumerate(exponents):
        x = 50 + 40 * place
        shares = (whole[exponent] / max(1, found.tokens), pieces.get(exponent, 0) / max(1, found.kept))
        for side, (share, colour) in enumerate(zip(shares, ("#9aa5b1", "#2b6cb0"), strict=True)):
            height = 200 * share / highest
            bars.append(
                f'<rect x="{x + 15 * side}" y="{240 - height:.1f}" width="14" height="{height:.1f}" '
                f'fill="{colour}"><title>{share:.1%}</title></rect>'
            )
        bars.append(f'<text x="{x + 14}" y="255" text-anchor="middle">{_short(1 << exponent)}</text>')
    width = 70 + 40 * len(exponents)
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="290" font-family="sans-serif" '
        f'font-size="10"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="50" y="20" font-size="12">share of tokens by length (grey: documents, from this length '
        f"up to twice; blue: pieces; highest bar {highest:.1%})</text>"
        f'<line x1="45" y1="240" x2="{width - 15}" y2="240" stroke="black"/>{"".join(bars)}'
        f'<text x="50" y="280">tokens</text></svg>\n'
    )
    write_text(path, text)
    return path


def _short(length: int) -> str:
    return f"{length >> 20}M" if length >= 1 << 20 else f"{length >> 10}k" if length >= 1024 else str(length)
