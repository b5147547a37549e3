"""Rotary position embedding: frequencies by method, tables by position, rotation.

`RopeConfig` and `check_rope` need no torch; the rest is imported on first use.
"""

from typing import TYPE_CHECKING, Any

from ..config.schema import RopeConfig
from .spec import check_rope

if TYPE_CHECKING:
    from .frequencies import rope_parameters

__all__ = ["RopeConfig", "check_rope", "rope_parameters"]


def __getattr__(name: str) -> Any:
    """Import what needs torch on first use."""
    if name == "rope_parameters":
        from .frequencies import rope_parameters

        return rope_parameters
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
