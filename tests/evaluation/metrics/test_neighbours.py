"""COV and k-NNA against scikit-learn, cases worked by hand, and what must not matter."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from cosmic_ray.evaluation.metrics import arrays
from cosmic_ray.evaluation.metrics.neighbours import coverage, knn_accuracy, nearest_distances


def gaussian(seed: int, count: int, width: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1.0, (count, width)).astype(np.float32)


def circle(seed: int, count: int) -> np.ndarray:
    angle = np.random.default_rng(seed).uniform(0, 2 * np.pi, count)
    return np.stack([np.cos(angle), np.sin(angle)], 1)


@pytest.mark.parametrize("width", [2, 64])
def test_coverage_agrees_with_scikit_learn(width):
    real, generated = gaussian(0, 120, width), gaussian(1, 1200, width, 0.3)
    nearest = NearestNeighbors(n_neighbors=1, algorithm="kd_tree").fit(real).kneighbors(generated)[1]
    assert coverage(real, generated) == len(np.unique(nearest)) / 120


def test_coverage_of_an_ideal_generator_on_a_circle():
    # A cell of the circle is half of two neighbouring gaps: N times its share is Gamma(2, 1/2), and it stays empty
    # with probability E exp(-r N share) = (1 + r / 2)^-2.
    found = coverage(circle(0, 4000), circle(1, 40_000))
    assert found == pytest.approx(1 - 1 / 36, abs=0.01)


def test_coverage_by_hand():
    real = np.array([[0.0], [1.0], [10.0]])
    assert coverage(real, np.array([[0.1], [0.2], [0.9]]), ratio=1) == pytest.approx(2 / 3)
    assert coverage(real, np.full((30, 1), 50.0)) == pytest.approx(1 / 3)
    assert coverage(np.array([[0.0], [0.0], [10.0]]), np.zeros((30, 1))) == pytest.approx(2 / 3)


def test_identical_sets_cover_everything():
    real = gaussian(0, 50, 16)
    assert coverage(real, np.tile(real, (10, 1))) == 1.0


@pytest.mark.parametrize("width", [3, 64])
def test_knn_accuracy_agrees_with_scikit_learn(width):
    real, generated = gaussian(0, 150, width), gaussian(1, 150, width, 0.4)
    pooled, labels = np.concatenate([real, generated]), np.repeat([0, 1], 150)
    neighbours = NearestNeighbors(n_neighbors=15, algorithm="kd_tree").fit(pooled).kneighbors(return_distance=False)
    expected = (labels[neighbours] == labels[:, None]).mean(1)
    found = knn_accuracy(real, generated)
    assert tuple(found) == pytest.approx((expected.mean(), expected[:150].mean(), expected[150:].mean(), 15))


def test_knn_accuracy_of_one_distribution_is_chance_and_of_disjoint_sets_one():
    scores = [knn_accuracy(gaussian(seed, 300, 8), gaussian(seed + 50, 300, 8)).score for seed in range(10)]
    assert np.mean(scores) == pytest.approx(299 / 599, abs=4 * np.std(scores, ddof=1) / np.sqrt(10) + 1e-3)
    assert knn_accuracy(gaussian(0, 300, 8), gaussian(1, 300, 8, 100.0)).score == 1.0


def test_knn_accuracy_by_hand_with_ties_and_duplicates():
    # On a lattice each inner point has two neighbours at distance 1; k = 1 takes half of each.
    real, generated = np.array([[0.0], [1.0]]), np.array([[2.0], [3.0]])
    found = knn_accuracy(real, generated, share=0.25)
    assert found == (0.75, 0.75, 0.75, 1)
    # A set beside its copy: every nearest neighbour is one's own copy in the other set.
    points = gaussian(3, 40, 32)
    assert knn_accuracy(points, points, share=1 / 80).score == 0.0
    # All at one place: a neighbour is any of the others with equal chance.
    assert knn_accuracy(np.ones((10, 4)), np.ones((10, 4))).score == pytest.approx(9 / 19)


def test_collapse_shows_in_the_halves():
    real = gaussian(0, 200, 4)
    collapsed = np.repeat(gaussian(1, 20, 4), 10, axis=0)
    found = knn_accuracy(real, collapsed, share=5 / 400)
    assert found.generated > 0.9 and found.real < 0.75


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), units=st.sampled_from([1e-200, 1e-3, 1.0, 1e200]), turned=st.booleans())
def test_order_place_units_and_rotation_do_not_matter(seed, units, turned):
    random = np.random.default_rng(seed)
    real, generated = random.integers(0, 4, (2, 30, 3)).astype(float)  # a lattice: full of ties
    many = random.integers(0, 4, (60, 3)).astype(float)
    rotation = np.linalg.qr(random.normal(size=(3, 3)))[0]

    def moved(points: np.ndarray) -> np.ndarray:
        return units * points @ rotation if turned else points + 2.0**40  # either way the lattice keeps its ties

    assert coverage(random.permutation(moved(real)), moved(many), 2) == coverage(real, many, 2)
    changed = knn_accuracy(random.permutation(moved(real)), random.permutation(moved(generated)))
    assert tuple(changed) == pytest.approx(tuple(knn_accuracy(real, generated)))
    mirrored = knn_accuracy(generated, real)
    assert (mirrored.real, mirrored.generated) == pytest.approx((changed.generated, changed.real))


def test_blocks_do_not_change_the_result(monkeypatch):
    real, generated, many = gaussian(0, 60, 5), gaussian(1, 60, 5), gaussian(2, 600, 5)
    whole = coverage(real, many), knn_accuracy(real, generated)
    monkeypatch.setattr(arrays, "BLOCK_BYTES", 3000)
    assert (coverage(real, many), knn_accuracy(real, generated)) == whole


@pytest.mark.parametrize(
    ("real", "generated", "message"),
    [
        (np.zeros((5, 2)), np.zeros((5, 2)), "needs 50"),
        (np.zeros((5, 2)), np.zeros((50, 3)), "2 and 3 dimensions"),
        (np.zeros((1, 2)), np.zeros((10, 2)), "at least 2"),
        (np.zeros(5), np.zeros((50, 1)), r"shape \(5,\)"),
        (np.full((5, 2), np.nan), np.zeros((50, 2)), "10 of 10 values are NaN"),
        (np.zeros((5, 2)), np.full((50, 2), np.inf), "100 of 100 values"),
        (np.zeros((5, 2)), np.full((50, 2), "a"), "not a real number"),
    ],
)
def test_coverage_refuses(real, generated, message):
    with pytest.raises(ValueError, match=message):
        coverage(real, generated)


def test_knn_accuracy_refuses():
    with pytest.raises(ValueError, match="as many"):
        knn_accuracy(np.zeros((5, 2)), np.zeros((50, 2)))
    with pytest.raises(ValueError, match="share"):
        knn_accuracy(np.zeros((5, 2)), np.zeros((5, 2)), share=1.0)


def test_nearest_distances_are_those_of_scipy():
    from scipy.spatial.distance import cdist

    random = np.random.default_rng(4)
    points, others = random.normal(size=(30, 5)) + 1000, random.normal(size=(40, 5)) + 1000
    np.testing.assert_allclose(nearest_distances(points, others), cdist(points, others).min(1), rtol=1e-9)
    assert nearest_distances(others[:3], others).max() < 1e-6
