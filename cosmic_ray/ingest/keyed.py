"""Keyed randomness: a random number is a function of (seed, global sample position, purpose, index), not of a stream.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Its 128-bit
counter holds (position, low and high word; block of four numbers; purpose) and its 64-bit key holds the seed, so
no two keys of this house ever share a counter, and nothing depends on the batch, the rank or the number of workers.

All arithmetic is on int64 tensors that hold 32-bit words and stay below 2**49: no overflow, no shift of a negative
number, hence the same bits on CPU and GPU, eager and compiled.
"""

from __future__ import annotations

import math

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def bits(seed: int, positions: torch.Tensor, purpose: str | int, count: int) -> torch.Tensor:
    """Uniform 32-bit words.

    `seed`: -2**63 .. 2**63 - 1. `positions`: int64 (N,), the global sample positions, on the device that the result
    is wanted on. `purpose`: a name, or an integer in [0, 2**32); two purposes at one position are independent.
    `count`: numbers a position; a longer draw starts with the shorter one.

    Returns int64 (N, count) in [0, 2**32). Raises ValueError for positions that are not int64 (N,), for a negative
    count and for a purpose out of range.
    """
    if positions.dtype != torch.int64 or positions.ndim != 1:
        raise ValueError(f"positions must be int64 (N,), not {positions.dtype} {tuple(positions.shape)}")
    if count < 0:
        raise ValueError(f"count must not be negative, not {count}")
    blocks = torch.arange((count + 3) // 4, device=positions.device)[None, :]
    low, high = _words(positions[:, None])
    counter = torch.broadcast_tensors(low, high, blocks, torch.full_like(blocks, purpose_word(purpose)))
    # The seed becomes a tensor at once: as a Python integer torch.compile would make it symbolic, one more recompile.
    key = _words(torch.full((), seed, dtype=torch.int64, device=positions.device))
    return torch.stack(_philox4x32(counter, key), dim=-1).flatten(1)[:, :count]


def uniform(seed: int, positions: torch.Tensor, purpose: str | int, count: int) -> torch.Tensor:
    """Float32 (N, count) in [0, 1): the upper 24 bits of `bits`, so each value is exact and below 1."""
    return (bits(seed, positions, purpose, count) >> 8).to(torch.float32) * 2.0**-24


def normal(seed: int, positions: torch.Tensor, purpose: str | int, count: int) -> torch.Tensor:
    """Float32 (N, count) from N(0, 1), by Box-Muller on pairs of `bits`; no value lies beyond 6.7.

    Logarithm and cosine come from the device's own library. They are taken in float64, so that after rounding to
    float32 devices differ in at most the last bit, and rarely.
    """
    words = bits(seed, positions, purpose, count + count % 2).to(torch.float64)
    radius = torch.sqrt(-2.0 * torch.log((words[:, 0::2] + 1.0) * 2.0**-32))  # +1: the logarithm of 0 never arises
    angle = words[:, 1::2] * (2.0 * math.pi * 2.0**-32)
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.flatten(1)[:, :count].to(torch.float32)


def purpose_word(purpose: str | int) -> int:
    """The 32-bit word of a purpose: the integer itself, or FNV-1a of the name's UTF-8 bytes.

    Raises ValueError for an integer outside [0, 2**32).
    """
    if isinstance(purpose, int):
        if not 0 <= purpose <= _WORD:
            raise ValueError(f"purpose must be in [0, 2**32), not {purpose}")
        return purpose
    word = 0x811C9DC5
    for byte in purpose.encode():
        word = ((word ^ byte) * 0x01000193) & _WORD
    return word


def _words(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The low and the high 32 bits of int64 values, two's complement, each in [0, 2**32)."""
    return values & _WORD, (values >> 32) & _WORD


def _multiply(constant: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a 32 x 32-bit product, by 16-bit halves so that nothing exceeds 2**49."""
    lower = (word & 0xFFFF) * constant
    upper = (word >> 16) * constant + (lower >> 16)
    return upper >> 16, ((upper & 0xFFFF) << 16) | (lower & 0xFFFF)


def _philox4x32(
    counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32-10: four counter words and two key words to four output words, all in [0, 2**32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3
