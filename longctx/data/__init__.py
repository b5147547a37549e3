"""Documents in, packed batches out: sources, tokenizers, the token store, packing and the loader.

Importing this package does not import torch; only `batch`, `held_out` and `loader` do.
"""

from .decomposition import Piece, decompose

__all__ = ["Piece", "decompose"]
