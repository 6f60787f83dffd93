"""The oracle's measures against cases worked by hand and against simulation."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cosmic_ray.errors import DataError
from cosmic_ray.simulation.oracle import Truth, expected_auroc, normalised, probability_higher, within


@pytest.fixture
def truth() -> Truth:
    genes = pd.DataFrame(
        {
            "planted": [True, False, True, False, False],
            "matched": ["b", "a", "d", "c", ""],
            "factor": ["size", "size", "grain", "grain", ""],
            "function": ["linear", "linear", "u-shaped", "u-shaped", ""],
            "slope": [0.5, 0.5, -0.3, -0.3, 0.0],
            "strength": [0.2, 0.2, 0.4, 0.4, 0.0],
        },
        index=list("abcde"),
    )
    return Truth(genes, pd.DataFrame({"size": [-1.0, 0.0, 1.0], "grain": [2.0, 0.0, -2.0]}, index=list("xyz")))


def test_the_oracle_follows_factor_function_and_sign(truth):
    found = truth.oracle(["z", "x"], ["c", "a", "e", "d"])
    assert found[0, 1] > 0 > found[1, 1] and found[0, 1] == pytest.approx(-found[1, 1])
    assert found[0, 0] == pytest.approx(found[1, 0]) and found[0, 0] < 0  # u-shaped, falling
    assert np.isnan(found[:, 2]).all()
    np.testing.assert_array_equal(found[:, 3], found[:, 0])  # a control is judged by its planted gene's function


@pytest.mark.parametrize(("cells", "genes", "named"), [(["x", "w"], ["a"], "w"), (["x"], ["a", "q"], "q")])
def test_unknown_cells_and_genes_are_named(truth, cells, genes, named):
    with pytest.raises(DataError, match=named):
        truth.oracle(cells, genes)


def test_auroc_by_strength_takes_matched_pairs(truth):
    found = truth.auroc(pd.Series({"a": 0.3, "b": 0.1, "c": 0.1, "d": 0.2, "e": 9.0}))
    assert found["auroc"].to_dict() == {0.2: 1.0, 0.4: 0.0} and found["pairs"].tolist() == [1, 1]
    lost = truth.auroc(pd.Series({"a": 0.3, "b": np.nan, "c": 0.2, "d": 0.2}))
    assert np.isnan(lost.loc[0.2, "auroc"]) and lost.loc[0.2, "pairs"] == 0 and lost.loc[0.4, "auroc"] == 0.5


def test_probability_higher_counts_ties_half():
    assert probability_higher(np.array([1.0, 2.0]), np.array([0.0, 2.0])) == pytest.approx((1 + 0 + 1 + 0.5) / 4)


def test_correlation_within_groups_is_that_of_each_group_averaged():
    rng = np.random.default_rng(0)
    first, groups = rng.normal(size=(60, 3)), np.repeat(["p", "q", "few"], [30, 25, 5])
    second = first * [1, -1, 0] + rng.normal(size=(60, 3)) + 50 * (groups == "p")[:, None]
    second[groups == "q", 1] = 7.0  # constant there: that group does not count
    second[:, 2] = 1.0
    found = within(first, second, groups)
    p, q = groups == "p", groups == "q"
    both = np.mean([np.corrcoef(first[rows, 0], second[rows, 0])[0, 1] for rows in (p, q)])
    assert found[:2] == pytest.approx([both, np.corrcoef(first[p, 1], second[p, 1])[0, 1]])
    assert np.isnan(found[2])


def test_normalised_counts_have_one_depth():
    found = normalised(np.array([[1, 3], [10, 30], [0, 0], [2, 6]]))
    np.testing.assert_allclose(np.expm1(found[[0, 1, 3]]).sum(axis=1), 6)
    assert (found[2] == 0).all()


def test_the_expected_auroc_is_that_of_drawn_scores():
    rng, sizes, strength = np.random.default_rng(1), [30, 40, 50], 0.2
    groups = np.repeat([0, 1, 2], sizes)
    f = rng.normal(size=(120, 4000))
    y = strength * f + np.sqrt(1 - strength**2) * rng.normal(size=f.shape)
    planted, control = within(f, y, groups), within(f, rng.normal(size=f.shape), groups)
    assert expected_auroc(strength, sizes) == pytest.approx(probability_higher(planted, control), abs=0.012)
    with pytest.raises(ValueError, match="4 cells"):
        expected_auroc(0.2, [3])
