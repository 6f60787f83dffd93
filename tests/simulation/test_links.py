"""The functions that planted genes follow, and the quadrature that sets their slopes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cosmic_ray.simulation.links import CUT, draw_factors, link
from cosmic_ray.simulation.moments import CountLaw, centred, correlation, slope_for

FUNCTIONS = ("linear", "u-shaped", "threshold")
GROUPS = np.log(6.0) + np.random.default_rng(5).normal(0, 0.3, (3, 2, 2))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_link_has_mean_0_and_variance_1_over_a_factor(function):
    values = link(function, draw_factors(np.random.default_rng(0), (400_000,)))
    assert values.mean() == pytest.approx(0, abs=0.006)
    assert values.var() == pytest.approx(1, abs=0.015)


def test_factors_are_a_cut_normal_law():
    z = draw_factors(np.random.default_rng(1), (400_000,))
    assert np.abs(z).max() <= CUT
    assert stats.kstest(z, stats.truncnorm(-CUT, CUT).cdf).pvalue > 1e-3


def test_a_u_shape_is_unseen_by_a_linear_model_and_a_threshold_is_seen_in_part():
    z = draw_factors(np.random.default_rng(2), (200_000,))
    assert np.corrcoef(z, link("u-shaped", z))[0, 1] == pytest.approx(0, abs=0.01)
    assert 0.7 < np.corrcoef(z, link("threshold", z))[0, 1] < 0.95


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_law_of_counts_agrees_with_drawn_counts(function, sign):
    rng, n, slope = np.random.default_rng(3), 300_000, sign * 0.4
    z, donor = draw_factors(rng, (n,)), rng.integers(0, 2, n)
    depth = np.exp(np.sqrt(np.log1p(0.35**2)) * rng.standard_normal(n))
    mean = depth * np.exp(GROUPS[0, 0, donor] + centred(slope, function, z))
    counts = rng.poisson(mean * rng.gamma(1 / 0.4, 0.4, n)) * (rng.uniform(0, 1, n) < mean / (mean + 0.5))
    y = np.log1p(counts / depth)
    straight, ceiling = correlation(CountLaw(0.4, 0.5, 0.35), GROUPS[:1, :1], slope, function)
    assert straight == pytest.approx(np.corrcoef(link(function, z), y)[0, 1], abs=0.006)
    bins = np.digitize(z, np.quantile(z, np.linspace(0, 1, 60)[1:-1]))
    given_z = (np.bincount(bins, y) / np.bincount(bins))[bins]
    assert ceiling == pytest.approx(np.corrcoef(given_z, y)[0, 1], abs=0.006)


@settings(max_examples=25, deadline=None)
@given(
    function=st.sampled_from(FUNCTIONS),
    sign=st.sampled_from([1, -1]),
    strength=st.floats(0.02, 0.5),
    dispersion=st.floats(0.02, 0.6),
    mean=st.floats(4, 60),
)
def test_a_slope_gives_the_correlation_asked_for(function, sign, strength, dispersion, mean):
    law, log_means = CountLaw(dispersion, 0.3, 0.35), GROUPS - np.log(6) + np.log(mean)
    slope = slope_for(law, log_means, function, sign, strength)
    straight, ceiling = correlation(law, log_means, slope, function)
    assert np.sign(slope) == sign
    assert straight * sign == pytest.approx(strength, abs=1e-3)
    assert strength - 1e-3 <= ceiling < 1


def test_a_slope_that_cannot_be_is_none():
    assert slope_for(CountLaw(0.25, 0.3, 0.35), np.full((1, 1, 1), np.log(0.05)), "linear", 1, 0.6) is None
