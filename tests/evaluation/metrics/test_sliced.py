"""SWD against SciPy, closed forms, and what must not matter."""

from __future__ import annotations

from math import gamma, pi, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from cosmic_ray.evaluation.metrics import arrays
from cosmic_ray.evaluation.metrics.sliced import projected_w1, sliced_wasserstein


def gaussian(seed: int, count: int, width: int, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.0, scale, (count, width))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), counts=st.tuples(st.integers(1, 40), st.integers(1, 40)), lattice=st.booleans())
def test_each_direction_agrees_with_scipy_at_unequal_sizes(seed, counts, lattice):
    random = np.random.default_rng(seed)

    def draw(count: int) -> np.ndarray:
        return random.integers(0, 3, (count, 3)).astype(float) if lattice else random.normal(size=(count, 3))

    first, second, units = draw(counts[0]), draw(counts[1]), random.normal(size=(4, 3))
    expected = [wasserstein_distance(first @ unit, second @ unit) for unit in units]
    assert projected_w1(first, second, units) == pytest.approx(expected, abs=1e-12)


def test_a_shift_has_a_closed_form():
    # W1 along a unit vector is its product with the shift, whose mean over the sphere is known.
    width = 16
    real, shift = gaussian(0, 200, width), gaussian(1, 1, width)[0]
    expected = np.linalg.norm(shift) * gamma(width / 2) / (sqrt(pi) * gamma((width + 1) / 2))
    found = sliced_wasserstein(real, real + shift, directions=4000)
    assert found.distance == pytest.approx(expected, abs=4 * found.distance_se)
    assert found.distance_se < 0.02 * expected


def test_the_standard_errors_are_those_of_repetition():
    real, generated = gaussian(0, 100, 6) ** 3, gaussian(1, 80, 6)
    runs = [sliced_wasserstein(real, generated, directions=50, seed=seed) for seed in range(120)]
    spread = np.std([run.distance for run in runs], ddof=1)
    assert np.mean([run.distance_se for run in runs]) == pytest.approx(spread, rel=0.25)


def test_the_standard_error_of_the_quotient_too_is_that_of_repetition():
    # Far from its mean along x, shifted along y: the two distances pull against each other from direction to direction.
    random = np.random.default_rng(0)
    real = np.stack([random.choice([-10.0, 10.0], 1000), random.normal(0, 0.1, 1000)], 1)
    runs = [sliced_wasserstein(real, real + np.array([0.0, 10.0]), directions=20, seed=seed) for seed in range(120)]
    spread = np.std([run.normalised for run in runs], ddof=1)
    assert np.mean([run.normalised_se for run in runs]) == pytest.approx(spread, rel=0.25)


def test_normalised_by_a_gaussian_of_the_same_mean_and_variance():
    random = np.random.default_rng(0)
    real = random.choice([-1.0, 1.0], (1500, 1)) * [[3.0, 0.0]] + random.normal(0, 0.2, (1500, 2)) + [[5.0, 7.0]]
    like_it = random.normal(real.mean(0), real.std(0), real.shape)
    bad = sliced_wasserstein(real, like_it, 200)
    assert bad.normalised == pytest.approx(1.0, abs=0.1)
    assert bad.normalised == pytest.approx(bad.distance / bad.gaussian)
    assert sliced_wasserstein(real, real[::-1], 200)[:4] == (0.0, 0.0, 0.0, 0.0)
    assert sliced_wasserstein(real, like_it + 40.0, 200).normalised > 5


def test_the_gaussian_has_no_covariance():
    # Perfectly correlated dimensions: along (1, 1) the real ones spread by sqrt(2), along (1, -1) not at all.
    line = gaussian(0, 3000, 1)
    found = sliced_wasserstein(np.hstack([line, line]), np.zeros((1, 2)), 1000)
    # Along angle a real is N(0, 1 + sin 2a), the reference N(0, 1): W1 = sqrt(2 / pi) |sqrt(1 + sin 2a) - 1|.
    angle = np.linspace(0, 2 * pi, 100_001)[:-1]
    expected = sqrt(2 / pi) * np.abs(np.sqrt(1 + np.sin(2 * angle)) - 1).mean()
    assert found.gaussian == pytest.approx(expected, rel=0.06)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), offset=st.sampled_from([0.0, 3.0, 1e5]), scale=st.sampled_from([1e-3, 1.0, 1e4]))
def test_order_place_and_units_do_not_matter(seed, offset, scale):
    random = np.random.default_rng(seed)
    real, generated = random.normal(size=(30, 4)), random.normal(1, 2, size=(45, 4))
    before = sliced_wasserstein(real, generated, 20, seed)
    after = sliced_wasserstein(random.permutation(real) * scale + offset, generated * scale + offset, 20, seed)
    assert after.distance == pytest.approx(before.distance * scale, rel=1e-6)
    repeated = sliced_wasserstein(real, np.tile(generated, (3, 1)), 20, seed)
    assert repeated.distance == pytest.approx(before.distance)


def test_the_seed_decides_and_blocks_do_not(monkeypatch):
    real, generated = gaussian(0, 50, 8), gaussian(1, 70, 8, 2.0)
    found = sliced_wasserstein(real, generated, 30, seed=3)
    assert sliced_wasserstein(real, generated, 30, seed=3) == found
    assert sliced_wasserstein(real, generated, 30, seed=4) != found
    monkeypatch.setattr(arrays, "BLOCK_BYTES", 500)
    assert sliced_wasserstein(real, generated, 30, seed=3) == pytest.approx(found, rel=1e-12)


@pytest.mark.parametrize(
    ("real", "generated", "directions", "message"),
    [
        (np.ones((5, 2)), np.ones((5, 3)), 10, "2 and 3 dimensions"),
        (np.ones((5, 2)), np.ones((5, 2)), 10, "all samples are the same"),
        (np.eye(2), np.eye(2), 1, "at least 2"),
        (np.eye(2), np.full((2, 2), np.nan), 10, "NaN"),
        (np.eye(2), np.empty((0, 2)), 10, "generated: 0 samples"),
    ],
)
def test_sliced_wasserstein_refuses(real, generated, directions, message):
    with pytest.raises(ValueError, match=message):
        sliced_wasserstein(real, generated, directions)
