"""Keyed randomness against Random123's published vectors and an independent implementation, and its statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmic_ray.ingest import keyed

PARAMETERS = {  # word size: multipliers, key steps (Salmon et al. 2011, table 2)
    32: ((0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)),
    64: ((0xD2E7470EE14C6C93, 0xCA5A826395121157), (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)),
}
PUBLISHED = [  # Random123 kat_vectors, philox4x32 10: counter, key, output
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def reference_philox(counter: list[int], key: list[int], width: int) -> list[int]:
    """Philox4x`width`-10 in unbounded Python integers."""
    (m0, m1), steps = PARAMETERS[width]
    modulus = 2**width
    for turn in range(10):
        key_0, key_1 = ((k + turn * step) % modulus for k, step in zip(key, steps, strict=True))
        product_0, product_1 = m0 * counter[0], m1 * counter[2]
        counter = [
            product_1 // modulus ^ counter[1] ^ key_0,
            product_1 % modulus,
            product_0 // modulus ^ counter[3] ^ key_1,
            product_0 % modulus,
        ]
    return counter


def reference_bits(seed: int, position: int, purpose: int, count: int) -> list[int]:
    words: list[int] = []
    for block in range(math.ceil(count / 4)):
        counter = [position % 2**32, position // 2**32 % 2**32, block, purpose]
        words += reference_philox(counter, [seed % 2**32, seed // 2**32 % 2**32], 32)
    return words[:count]


def _hex(words: str) -> list[int]:
    return [int(word, 16) for word in words.split()]


@pytest.mark.parametrize(("counter", "key", "output"), PUBLISHED)
def test_published_vectors(counter: str, key: str, output: str) -> None:
    assert reference_philox(_hex(counter), _hex(key), 32) == _hex(output)
    as_tensors = [torch.tensor([word]) for word in _hex(counter) + _hex(key)]
    ours = keyed._philox4x32(tuple(as_tensors[:4]), tuple(as_tensors[4:]))
    assert [int(word) for word in ours] == _hex(output)


def test_reference_agrees_with_numpy_at_64_bits() -> None:
    """The reference's rounds are those of an implementation that is not ours (numpy has the 64-bit width only)."""
    key = [0x0123456789ABCDEF, 0xFEDCBA9876543210]
    theirs = np.random.Philox(counter=6, key=sum(k << 64 * i for i, k in enumerate(key))).random_raw(8)
    ours = reference_philox([7, 0, 0, 0], key, 64) + reference_philox([8, 0, 0, 0], key, 64)
    assert [int(word) for word in theirs] == ours  # numpy steps its counter before each block


int64s = st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=60, deadline=None)
@given(int64s, st.lists(int64s, min_size=1, max_size=3), st.integers(0, 2**32 - 1), st.integers(0, 11))
def test_bits_are_the_reference_for_any_key(seed: int, positions: list[int], purpose: int, count: int) -> None:
    ours = keyed.bits(seed, torch.tensor(positions), purpose, count)
    assert ours.tolist() == [reference_bits(seed, position, purpose, count) for position in positions]


def test_a_sample_does_not_depend_on_its_batch() -> None:
    positions = torch.arange(1000, 1064)
    for draw in (keyed.bits, keyed.uniform, keyed.normal):
        whole = draw(7, positions, "mask", 21)
        assert torch.equal(draw(7, positions[[40, 3]], "mask", 21), whole[[40, 3]])
        assert torch.equal(draw(7, positions, "mask", 6), whole[:, :6])
        assert draw(7, positions, "mask", 0).shape == (64, 0)


def test_compiled_equals_eager_bit_for_bit() -> None:
    compiled = torch.compile(keyed.uniform, fullgraph=True)
    for seed, positions in ((3, torch.arange(256)), (-(2**40) - 1, torch.arange(2**33, 2**33 + 7))):
        assert torch.equal(compiled(seed, positions, "mask", 196), keyed.uniform(seed, positions, "mask", 196))


def test_purpose_names_are_fnv1a() -> None:
    assert keyed.purpose_word("") == 0x811C9DC5  # published vectors of 32-bit FNV-1a
    assert keyed.purpose_word("a") == 0xE40C292C
    assert keyed.purpose_word("foobar") == 0xBF9CF968


@pytest.mark.parametrize(
    ("positions", "purpose", "count", "message"),
    [
        (torch.arange(3, dtype=torch.int32), "mask", 1, "int64"),
        (torch.zeros(2, 2, dtype=torch.int64), "mask", 1, "int64"),
        (torch.arange(3), "mask", -1, "negative"),
        (torch.arange(3), 2**32, 1, "purpose"),
        (torch.arange(3), -1, 1, "purpose"),
    ],
)
def test_bad_keys_are_refused(positions: torch.Tensor, purpose: str | int, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        keyed.bits(0, positions, purpose, count)


class TestStatistics:
    """Fixed seeds: these never flicker. Bounds are five standard deviations of the statistic under uniformity."""

    positions = torch.arange(5_000_000_000, 5_000_000_000 + 4096)

    def draw(self, seed: int = 11, purpose: str = "mask", shift: int = 0, count: int = 128) -> torch.Tensor:
        return keyed.uniform(seed, self.positions + shift, purpose, count).double()

    def test_range_and_chi_squared(self) -> None:
        values = self.draw()
        assert values.min() >= 0 and values.max() < 1
        observed = torch.histc(values, bins=256, min=0, max=1)
        expected = values.numel() / 256
        chi_squared = float(((observed - expected) ** 2 / expected).sum())
        assert abs(chi_squared - 255) < 5 * math.sqrt(2 * 255)

    @pytest.mark.parametrize(
        "other", [{"shift": 1}, {"shift": 2**32}, {"seed": 12}, {"seed": 11 + 2**32}, {"purpose": "flip"}]
    )
    def test_neighbouring_keys_are_uncorrelated(self, other: dict) -> None:
        first, second = self.draw(), self.draw(**other)
        correlation = 12 * float(((first - 0.5) * (second - 0.5)).mean())
        assert abs(correlation) < 5 / math.sqrt(first.numel())
        assert (first == second).double().mean() < 1e-5

    def test_indices_are_uncorrelated(self) -> None:
        values = self.draw()
        correlation = torch.corrcoef(values.T).fill_diagonal_(0)
        assert correlation.abs().max() < 6 / math.sqrt(len(values))

    def test_flip_bits_are_fair_and_independent(self) -> None:
        top = keyed.bits(11, self.positions, "flip", 2) >> 31
        counts = torch.bincount(top[:, 0] * 2 + top[:, 1], minlength=4).double()
        assert ((counts / len(top) - 0.25).abs() < 5 * math.sqrt(0.25 * 0.75 / len(top))).all()

    def test_normal_moments_and_tails(self) -> None:
        values = keyed.normal(11, self.positions, "noise", 128).double()
        size = math.sqrt(values.numel())
        assert abs(float(values.mean())) < 5 / size
        assert abs(float(values.var()) - 1) < 5 * math.sqrt(2) / size
        assert abs(float((values**3).mean())) < 5 * math.sqrt(15) / size
        assert abs(float((values**4).mean()) - 3) < 5 * math.sqrt(96) / size
        assert values.abs().max() < 6.7
        beyond = math.erfc(3 / math.sqrt(2))
        assert abs(float((values.abs() > 3).double().mean()) - beyond) < 5 * math.sqrt(beyond) / size
        assert abs(float((values[:, 0::2] * values[:, 1::2]).mean())) < 5 * math.sqrt(2) / size
