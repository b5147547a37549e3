"""Which documents are kept for evaluation: decided per document, the same in every run.

A document is held out when the hash of its text falls below the wanted fraction of the hash range.
So copies of a document are never on both sides, new documents do not move old ones, and neither
seed nor layout matter. Without a recorded hash the document's number is hashed.
"""

import numpy as np
import numpy.typing as npt

from .index import Int64s

Uint64s = npt.NDArray[np.uint64]


def hash_numbers(numbers: Int64s | Uint64s, key: int = 0) -> Uint64s:
    """SplitMix64 of each number under a key: uint64 [n], the same on every machine and numpy version.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    state = np.uint64(key) + (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def hash_key(*parts: int) -> int:
    """One key of several integers, such as (seed, epoch), in [0, 2^64)."""
    key = 0
    for part in parts:
        key = int(hash_numbers(np.array([part % 2**64], dtype=np.uint64), key)[0])
    return key


def split(hashes: Uint64s, held_out: float) -> tuple[Int64s, Int64s]:
    """Numbers of the training documents and of the held-out documents, both ascending.

    Args:
        hashes: uint64 [N], one per document.
        held_out: fraction of the documents; 0: none. Otherwise at least one document is held out and
            at least one is trained, as far as there are two different ones.

    Returns:
        Two int64 arrays that together hold 0..N-1.
    """
    chosen = hashes < np.uint64(min(int(held_out * 2.0**64), 2**64 - 1))
    if held_out > 0 and not chosen.any():
        chosen = hashes == hashes.min()
    if chosen.all():
        chosen = hashes != hashes.max()
    return np.flatnonzero(~chosen).astype(np.int64), np.flatnonzero(chosen).astype(np.int64)
