"""Intervals and tests of equivalence against SciPy and their promised rates of error."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy import stats

from cosmic_ray.evaluation.metrics import arrays
from cosmic_ray.evaluation.metrics.intervals import equivalence, mean_interval, paired_bootstrap, paired_interval

FIRST = np.array([0.41, 0.44, 0.40, 0.47, 0.43])
SECOND = np.array([0.40, 0.45, 0.36, 0.44, 0.41])


def test_mean_interval_is_students():
    mean, low, high = mean_interval(FIRST)
    expected = stats.ttest_1samp(FIRST, 0).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((0.43, expected.low, expected.high))


def test_a_single_value_has_a_mean_alone():
    mean, low, high = mean_interval(np.array([2]))
    assert mean == 2.0 and np.isnan([low, high]).all()


def test_paired_interval_is_that_of_the_paired_t_test():
    expected = stats.ttest_rel(FIRST, SECOND).confidence_interval(0.9)
    assert paired_interval(FIRST, SECOND, 0.9) == pytest.approx((0.018, expected.low, expected.high))
    mean, low, high = paired_interval(SECOND, FIRST, 0.9)
    assert (mean, low, high) == pytest.approx((-0.018, -expected.high, -expected.low))


def test_bootstrap_of_three_pairs_against_all_samples_there_are():
    differences = np.array([0.0, 1.0, 5.0])
    means = [np.mean(sample) for sample in product(differences, repeat=3)]
    low, high = np.percentile(means, [10, 90])
    assert paired_bootstrap(differences, np.zeros(3), confidence=0.8) == pytest.approx((2.0, low, high))


def test_bootstrap_agrees_with_scipy():
    random = np.random.default_rng(0)
    first, second = random.exponential(size=(2, 80))
    expected = stats.bootstrap(
        (first - second,), np.mean, method="percentile", n_resamples=20_000, rng=1
    ).confidence_interval  # fmt: skip
    found = paired_bootstrap(first, second, draws=20_000)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_bootstrap_draws_whole_groups():
    random = np.random.default_rng(1)
    groups = np.repeat(np.arange(30), 20)
    values = random.normal(size=30)[groups] + 0.01 * random.normal(size=600)
    alone, together = paired_bootstrap(values, np.zeros(600)), paired_bootstrap(values, np.zeros(600), groups)
    width = 2 * 1.96 * np.std(values.reshape(30, 20).mean(1), ddof=1) / np.sqrt(30)
    assert together.high - together.low == pytest.approx(width, rel=0.1)
    assert alone.high - alone.low < 0.3 * width
    one_each = paired_bootstrap(values, np.zeros(600), np.arange(600))
    assert one_each.high - one_each.low == pytest.approx(alone.high - alone.low, rel=0.1)


def test_bootstrap_of_groups_of_unequal_size_by_hand():
    # Drawn: the pair alone twice, both groups (in half of cases), the group of three twice.
    first, groups = np.array([0.0, 4.0, 4.0, 7.0]), np.array(["a", "b", "b", "b"])
    found = paired_bootstrap(first, np.zeros(4), groups, confidence=0.4)
    assert (found.mean, found.low, found.high) == (3.75, 3.75, 3.75)
    found = paired_bootstrap(first, np.zeros(4), groups, confidence=0.9)
    assert (found.mean, found.low, found.high) == (3.75, 0.0, 5.0)


def test_bootstrap_seed_decides_and_blocks_do_not(monkeypatch):
    found = paired_bootstrap(FIRST, SECOND, seed=3)
    assert paired_bootstrap(FIRST, SECOND, seed=3) == found
    monkeypatch.setattr(arrays, "BLOCK_BYTES", 200)
    assert paired_bootstrap(FIRST, SECOND, seed=3) == found


def test_its_docstring_s_coverage_over_five_pairs():
    random = np.random.default_rng(2)
    hits = [0.0, 0.0]
    for _ in range(600):
        values = random.normal(size=5)
        for i, found in enumerate((paired_bootstrap(values, np.zeros(5), draws=400), mean_interval(values))):
            hits[i] += (found.low <= 0 <= found.high) / 600
    assert hits == pytest.approx([0.83, 0.95], abs=0.04)


@pytest.mark.parametrize("margin", [0.01, 0.03, 0.06])
def test_equivalence_agrees_with_two_scipy_tests(margin):
    differences = FIRST - SECOND
    above = stats.ttest_1samp(differences, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(differences, margin, alternative="less").pvalue
    found = equivalence(FIRST, SECOND, margin=margin)
    assert found.p == pytest.approx(max(above, below))
    assert found.equivalent == (max(above, below) < 0.05) == (-margin < found.low and found.high < margin)
    assert tuple(equivalence(SECOND, FIRST, margin=margin))[3:] == pytest.approx(tuple(found)[3:])


def test_equivalence_shows_the_interval_that_decides():
    assert equivalence(FIRST, SECOND, margin=0.03, alpha=0.05)[:3] == paired_interval(FIRST, SECOND, 0.9)


def test_equivalence_is_wrong_at_the_margin_as_often_as_promised():
    random = np.random.default_rng(4)
    pairs = random.normal(1.0, 0.3, (4000, 6))
    rate = np.mean([equivalence(pair, np.zeros(6), margin=1.0).equivalent for pair in pairs])
    assert rate == pytest.approx(0.05, abs=4 * np.sqrt(0.05 * 0.95 / 4000))


def test_equal_differences_leave_no_doubt():
    assert equivalence(np.ones(3), np.ones(3), margin=0.1) == (0.0, 0.0, 0.0, 0.0, 0.1, True)
    assert not equivalence(np.ones(3), np.zeros(3), margin=1.0).equivalent


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval(np.array([1.0, np.nan])), "1 of 2 values are NaN"),
        (lambda: mean_interval(np.array([])), "at least one"),
        (lambda: mean_interval(FIRST, 95), "confidence"),
        (lambda: paired_interval(FIRST, SECOND[:4]), "must be the same"),
        (lambda: paired_bootstrap(FIRST, SECOND, np.zeros(5)), "at least 2 independent"),
        (lambda: equivalence(FIRST, SECOND, margin=0.0), "margin"),
        (lambda: equivalence(FIRST[:1], SECOND[:1], margin=0.1), "at least 2 pairs"),
        (lambda: equivalence(FIRST, SECOND, margin=0.1, alpha=0.5), "alpha"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
