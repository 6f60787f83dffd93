"""Keyed permutations: an order is a function of (seed, purpose, where), the same on any machine and numpy version.

The words come from Philox4x64-10 (Salmon et al., SC 2011), whose stream numpy guarantees not to change; numpy's own
`permutation` gives no such promise. The key holds (seed, purpose) and the upper three counter words hold `where`, so
no two permutations of a plan share a counter.
"""

from __future__ import annotations

import numpy as np

DEAL, GROUPS, ROWS, RECUR, PHASE = range(5)
_WORD = (1 << 64) - 1


def permutation(size: int, seed: int, purpose: int, where: tuple[int, int, int]) -> np.ndarray:
    """A permutation of 0..size-1, int64.

    `seed`: -2**63 .. 2**63 - 1. `purpose`: one of this module's constants. `where`: three integers in [0, 2**64).
    """
    if size < 2:
        return np.arange(size)
    drawn = words(size, seed, purpose, where)
    # The low bits become the index itself: all words differ, so that every sorting algorithm gives the same order.
    width = np.uint64((size - 1).bit_length())
    drawn = (drawn >> width << width) | np.arange(size, dtype=np.uint64)
    drawn.sort()
    return (drawn & ((np.uint64(1) << width) - np.uint64(1))).astype(np.int64)


def words(size: int, seed: int, purpose: int, where: tuple[int, int, int]) -> np.ndarray:
    """Uniform words: uint64 (size,). Arguments as those of `permutation`."""
    # numpy checks that the key and counter arrays are uint64; Python integers above 2**63 would become floats.
    key = np.array([seed & _WORD, purpose], dtype=np.uint64)
    counter = np.array([0, *where], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(size)
