"""Which keys a query sees.

For a query at position p and a key at position s of the same document, d = p - s, the key is seen if
    (d >= 0 if causal) and d >= min_distance
    and (no window, or |d| < window, or s < sinks)
and with `anchor` also if it is the packed sequence's first token. `group_shift` and `block_stride`
divide each document into parts that see only themselves.
"""

from dataclasses import dataclass

from ..errors import ConfigError, UnsupportedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Mask:
    """A static attention mask; documents never see each other, except through the anchor."""

    causal: bool = True
    """A query sees no later key."""
    window: int | None = None
    """Number of nearest tokens that are seen, the query itself included; None for all."""
    min_distance: int = 0
    """Tokens nearer than this are not seen (one pass of a position remap); needs causal."""
    sinks: int = 0
    """First tokens of each document that stay visible outside the window (StreamingLLM)."""
    anchor: bool = False
    """The packed sequence's first token is seen by every document (AnchorAttention)."""
    group_shift: int | None = None
    """Tokens per group of LongLoRA's shifted sparse attention: heads [0, H // 2) see their group,
    the others see groups shifted by half a group. Groups do not wrap around, so nothing leaks."""
    block_stride: tuple[int, int] | None = None
    """(block, stride): tokens are divided into blocks, and a query sees the blocks whose distance
    to its own is a multiple of stride (LongGen's block-sparse layers)."""

    def __post_init__(self) -> None:
        for name in ("window", "group_shift", "min_distance", "sinks"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, int):
                raise ConfigError(f"mask {name}={value!r} is no whole number of tokens")
        for name, low in (("window", 1), ("group_shift", 2)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"mask {name}={value} must be at least {low} tokens, or None")
        for name in ("min_distance", "sinks"):
            if getattr(self, name) < 0:
                raise ConfigError(f"mask {name}={getattr(self, name)} must be at least 0 tokens")
        pair = self.block_stride
        if pair is not None and not (isinstance(pair, tuple) and len(pair) == 2 and min(pair) >= 1):
            raise ConfigError(
                f"mask block_stride={self.block_stride} must be (block, stride), both at least 1"
            )
        self._check_pairs()

    def _check_pairs(self) -> None:
        if self.min_distance and not self.causal:
            raise UnsupportedError("mask min_distance needs causal=True; set min_distance=0 or causal=True")
        if self.min_distance and self.anchor:
            raise UnsupportedError("mask min_distance does not combine with anchor; set one of them only")
        if self.sinks and self.window is None:
            raise UnsupportedError("mask sinks adds to a window; set window too, or sinks=0")
        for name in ("group_shift", "block_stride"):
            others = [other for other in self.features() if other != name]
            if getattr(self, name) is not None and others:
                raise UnsupportedError(f"mask {name} does not combine with {', '.join(others)}; use it alone")

    def features(self) -> tuple[str, ...]:
        """Names of the fields that restrict or extend plain attention inside a document."""
        names = ("window", "min_distance", "sinks", "anchor", "group_shift", "block_stride")
        return tuple(name for name in names if getattr(self, name) not in (None, 0, False))

    @property
    def forms(self) -> tuple[str, ...]:
        """Forms of tiles (`TileBatch.form`) that this mask leads to."""
        if self.window is not None:
            return ("full", "causal", "band")
        return ("full", "causal") if self.causal else ("full",)

    @property
    def dense(self) -> bool:
        """Whether every (earlier, if causal) key of the document is seen."""
        return not any(name in self.features() for name in ("window", "min_distance"))
