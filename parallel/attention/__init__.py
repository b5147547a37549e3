"""Exact attention over a sequence that is split among ranks."""

from .mask import Mask
from .registry import STRATEGIES, Attention, make_attention

__all__ = ["STRATEGIES", "Attention", "Mask", "make_attention"]
