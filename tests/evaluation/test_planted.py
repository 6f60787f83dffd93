"""AUROC of planted genes: that of scikit-learn, matched in expression, and with undefined genes left out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from cosmic_ray.evaluation.planted import auroc, auroc_interval, matched, planted_curve

FEW = st.lists(st.sampled_from([-0.5, 0.0, 0.1, 0.2, 0.9]), min_size=1, max_size=12)


@given(FEW, FEW)
@settings(max_examples=60, deadline=None)
def test_auroc_is_that_of_scikit_learn_ties_included(planted, unplanted):
    truth = [1] * len(planted) + [0] * len(unplanted)
    expected = roc_auc_score(truth, planted + unplanted)
    assert auroc(np.array(planted), np.array(unplanted)) == pytest.approx(expected)


def test_planted_genes_are_matched_by_mean_expression():
    found = matched(np.array([1.0, 5.0]), np.array([4.9, 0.0, 1.1, 5.2]), 2)
    assert found.tolist() == [[2, 1], [0, 3]]


def table(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    strength = np.repeat([0.0, 0.2, 0.4], [200, 40, 40])
    return random.normal(strength / 2, 0.1), strength, random.normal(size=280)


def test_each_strength_is_judged_on_its_own_and_the_curve_rises():
    r, strength, expression = table()
    found = planted_curve(r, strength, expression, oracle=strength)
    weak, strong = found["strengths"]
    assert [weak["strength"], strong["strength"]] == [0.2, 0.4] and weak["genes"] == strong["genes"] == 40
    pairs = matched(expression[strength == 0.4], expression[strength == 0], 5)
    beside = r[strength == 0][pairs].ravel()
    expected = roc_auc_score([1] * 40 + [0] * 200, np.concatenate([r[strength == 0.4], beside]))
    assert strong["auroc"] == pytest.approx(expected)
    assert 0.5 < weak["auroc"] < strong["auroc"] and strong["low"] < strong["auroc"] < strong["high"]
    assert strong["oracle"] == 1.0
    assert found["unplanted"]["low"] < 0 < found["unplanted"]["high"] and found["unplanted"]["genes"] == 200


def test_own_controls_are_used_where_there_are_some():
    r = np.array([0.5, 0.3, 0.4, 0.9, 0.9])
    strength = np.array([0.3, 0.3, 0, 0, 0])
    found = planted_curve(r, strength, np.zeros(5), controls=np.array([2, 2, 0, -1, -1]))
    assert found["all"]["auroc"] == pytest.approx(0.5) and found["all"]["genes"] == 2


def test_undefined_genes_are_left_out_and_counted():
    r, strength, expression = table()
    r[[0, 210]] = np.nan
    found = planted_curve(r, strength, expression)
    assert found["undefined"] == 2 and found["strengths"][0]["genes"] == 39 and found["unplanted"]["genes"] == 199
    with pytest.raises(ValueError, match="nothing to tell"):
        planted_curve(np.full(5, np.nan), np.array([0.1, 0.1, 0, 0, 0]), np.zeros(5))


@pytest.mark.parametrize("area", [0.5, 0.8, 1.0])
def test_the_interval_of_an_auroc_holds_it_about_as_often_as_it_says(area):
    from scipy.stats import norm

    random = np.random.default_rng(0)
    shift = norm.ppf(min(area, 0.999)) * np.sqrt(2)
    true = norm.cdf(shift / np.sqrt(2))
    held = []
    for _ in range(400):
        found = auroc(random.normal(shift, 1, 12), random.normal(0, 1, 12))
        low, high = auroc_interval(found, 12, 12)
        held.append(low <= true <= high)
        assert 0 <= low <= found <= high <= 1 and high - low > 0.1
    assert np.mean(held) > 0.92
