"""Noise for sampling, keyed by cell: a function of (seed, cell id, step), whatever the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch

from cosmic_ray.ingest import keyed

PURPOSE = "sample"


def cell_keys(cell_ids: Sequence[str]) -> torch.Tensor:
    """Int64 (N,): 64 bits of BLAKE2b of each id's UTF-8 bytes."""
    digests = (hashlib.blake2b(cell.encode(), digest_size=8).digest() for cell in cell_ids)
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.int64)


def cell_noise(seed: int, keys: torch.Tensor, shape: Sequence[int]) -> Callable[[int], torch.Tensor]:
    """`noise(step)`: standard normal float32 (N, *shape) on the device of `keys`, as `models.sampling` asks for it.

    Args:
        keys: int64 (N,), of `cell_keys`; several samples of one cell take several seeds.
    """
    count = 1
    for size in shape:
        count *= size
    first = keyed.purpose_word(PURPOSE)

    def noise(step: int) -> torch.Tensor:
        return keyed.normal(seed, keys, (first + step) % 2**32, count).unflatten(1, tuple(shape))

    return noise
