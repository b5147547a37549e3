"""Which parts of a decoder are meant: what a pipeline stage holds, or what one call computes."""

from dataclasses import dataclass

from ..config.schema import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """Some of a decoder's parts, in its order."""

    embed: bool = False
    """The embedding."""
    layers: tuple[int, ...] = ()
    """Global numbers of the layers."""
    head: bool = False
    """The last norm and the output head."""

    @classmethod
    def whole(cls, config: ModelConfig) -> "Parts":
        """All of them."""
        return cls(embed=True, layers=tuple(range(config.num_layers)), head=True)
