"""Exact attention over a sequence that is split among ranks."""

from .attend import Attention, make_attention
from .mask import Mask
from .registry import STRATEGIES
from .traffic import Traffic, traffic

__all__ = ["STRATEGIES", "Attention", "Mask", "Traffic", "make_attention", "traffic"]
