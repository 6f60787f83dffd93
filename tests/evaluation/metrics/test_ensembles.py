"""CRPS against a Gaussian's closed form and the definition, intervals against their promised level."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from cosmic_ray.evaluation.metrics import arrays
from cosmic_ray.evaluation.metrics.ensembles import crps, ensemble_coverage, interval_coverage


def gaussian_crps(mean: float, std: float, truth: np.ndarray) -> np.ndarray:
    """Closed form: Gneiting et al. 2005, eq. 5."""
    z = (truth - mean) / std
    return std * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))


@pytest.mark.parametrize("count", [2, 3, 20])
def test_fair_crps_is_unbiased_for_a_gaussian_at_any_number_of_samples(count):
    random = np.random.default_rng(count)
    truth = np.repeat([[-2.0, 0.3, 4.0]], 40_000, axis=0)
    samples = random.normal(0.5, 1.5, (count, *truth.shape))
    assert crps(samples, truth) == pytest.approx(gaussian_crps(0.5, 1.5, truth[0]), abs=0.03)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(2, 8), lattice=st.booleans())
def test_crps_is_its_definition(seed, count, lattice):
    random = np.random.default_rng(seed)
    samples, truth = random.normal(size=(count, 5, 3)), random.normal(size=(5, 3))
    if lattice:
        samples, truth = samples.round(), truth.round()
    pairs = [np.abs(samples[i] - samples[j]) for i in range(count) for j in range(count) if i != j]
    expected = (np.abs(samples - truth).mean(0) - np.mean(pairs, axis=0) / 2).mean(0)
    assert crps(samples, truth) == pytest.approx(expected, abs=1e-12)
    assert crps(random.permutation(samples) + 1e4, truth + 1e4) == pytest.approx(expected, abs=1e-8)
    assert crps(samples * -3, truth * -3) == pytest.approx(expected * 3, abs=1e-12)


def test_crps_of_certainty_is_the_absolute_error_and_the_truth_wins():
    random = np.random.default_rng(1)
    truth = random.normal(size=(3000, 1))
    sure = np.repeat(random.normal(size=(1, 3000, 1)), 4, axis=0)
    assert crps(sure, truth) == pytest.approx(np.abs(sure[0] - truth).mean())
    scores = [crps(random.normal(0, std, (10, 3000, 1)), truth)[0] for std in (0.6, 1.0, 1.6)]
    assert scores[1] < min(scores[0], scores[2])


@pytest.mark.parametrize(("count", "level"), [(19, 0.9), (39, 0.9), (39, 0.95), (24, 0.9), (3, 0.5)])
def test_intervals_of_samples_hold_the_truth_as_often_as_promised(count, level):
    random = np.random.default_rng(0)
    scale = random.exponential(size=(10_000, 2))
    truth, samples = scale * random.normal(size=(10_000, 2)), scale * random.normal(size=(count, 10_000, 2))
    share = ensemble_coverage(samples, truth, level).share
    between = 0.01 if count == 24 else 0.0  # 1.25 and 23.75 are no whole places
    assert share == pytest.approx(level, abs=4 * np.sqrt(level * (1 - level) / 10_000) + between)


def test_intervals_by_hand():
    truth = np.array([[0.0, 5.0], [1.0, 5.0]])
    found = interval_coverage(np.array([[0.0, 6.0], [1.5, 4.0]]), np.array([[2.0, 7.0], [2.0, 8.0]]), truth)
    assert found.share.tolist() == [0.5, 0.5] and found.width.tolist() == [1.25, 2.5]
    samples = np.arange(19.0)[::-1, None, None] * np.ones((1, 1, 2))
    found = ensemble_coverage(samples, np.array([[0.0, 18.5]]))
    assert found.share.tolist() == [1.0, 0.0] and found.width == pytest.approx([18.0, 18.0])


def test_inputs_stay_and_blocks_do_not_matter(monkeypatch):
    random = np.random.default_rng(0)
    samples, truth = random.normal(size=(20, 9, 4)).astype(np.float32), random.normal(size=(9, 4)).astype(np.float32)
    kept = samples.copy()
    whole = [crps(samples, truth), *ensemble_coverage(samples, truth)]
    monkeypatch.setattr(arrays, "BLOCK_BYTES", 1500)
    assert np.allclose(whole, [crps(samples, truth), *ensemble_coverage(samples, truth)], rtol=1e-12)
    assert (samples == kept).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: crps(np.zeros((1, 2, 3)), np.zeros((2, 3))), "1 a cell, but at least 2"),
        (lambda: crps(np.zeros((4, 3, 2)), np.zeros((2, 3))), r"\(S, 2, 3\) is needed"),
        (lambda: crps(np.full((2, 2, 3), np.nan), np.zeros((2, 3))), "samples: 12 of 12"),
        (lambda: crps(np.zeros((2, 2, 3)), np.full((2, 3), np.inf)), "truth: 6 of 6"),
        (lambda: ensemble_coverage(np.zeros((18, 2, 3)), np.zeros((2, 3))), "at least 19"),
        (lambda: ensemble_coverage(np.zeros((18, 2, 3)), np.zeros((2, 3)), 90), "level"),
        (lambda: interval_coverage(np.ones((2, 3)), np.zeros((2, 3)), np.zeros((2, 3))), "above high"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
