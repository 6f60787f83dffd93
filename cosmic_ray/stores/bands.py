"""Pairs of rows with similar bit signatures, without comparing all pairs: banded locality-sensitive hashing.

Signs of random projections (Charikar 2002): two vectors at angle t differ in each bit with probability t / pi. Rows
that agree in all bits of a band are candidates; the whole signature then decides.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_DEPTH = 16
_BLOCK = 1 << 20


def signatures(features: np.ndarray, bits: int, seed: int = 0) -> np.ndarray:
    """Signs of `bits` fixed random projections of float (N, D): packed uint8 (N, bits / 8)."""
    planes = np.random.default_rng(seed).standard_normal((features.shape[1], bits)).astype(np.float32)
    return np.packbits(features @ planes > 0, axis=1)


def similar_pairs(key_of: Callable[[int], np.ndarray], bands: int, bits: np.ndarray, most: int) -> np.ndarray:
    """Row pairs that share a key and differ in at most `most` bits: int64 (P, 2), each once, the lower row first.

    Of many rows with one key each meets the 16 that follow it when sorted by the next band's key too, so that the work
    is at most 16 N comparisons a band, and memory about 60 bytes a row.

    Args:
        key_of: the keys of all rows in a band, 0..bands-1: uint64 (N,).
        bits: packed uint8 (N, B); may be a memory map.
    """
    found = [np.empty(0, np.int64)]
    count = len(bits)
    for band in range(bands):
        keys = key_of(band)
        order = np.lexsort((key_of((band + 1) % bands), keys))
        keys = keys[order]
        for step in range(1, min(_DEPTH, count - 1) + 1):
            same = np.flatnonzero(keys[step:] == keys[:-step])
            if not len(same):
                break
            for start in range(0, len(same), _BLOCK):
                at = same[start : start + _BLOCK]
                one, other = order[at], order[at + step]
                near = np.bitwise_count(bits[one] ^ bits[other]).sum(axis=1, dtype=np.int64) <= most
                low, high = np.minimum(one[near], other[near]), np.maximum(one[near], other[near])
                found.append(low * count + high)
    unique = np.unique(np.concatenate(found))
    return np.stack([unique // max(count, 1), unique % max(count, 1)], axis=1)


def band_key(bits: np.ndarray, band: int, band_bits: int) -> np.ndarray:
    """Bits `band * band_bits` .. of packed signatures (N, B), as numbers: uint64 (N,). `band_bits` is 8, 16, .. 64."""
    width = band_bits // 8
    keys = np.zeros(len(bits), np.uint64)
    for byte in range(width):
        keys |= bits[:, band * width + byte].astype(np.uint64) << np.uint64(8 * byte)
    return keys
