"""Scores of predicted distributions: CRPS of an ensemble of samples, and how often intervals hold the truth."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cosmic_ray.evaluation.metrics import arrays


class IntervalCoverage(NamedTuple):
    """How intervals did, gene by gene."""

    share: np.ndarray
    """float64 (G,) in [0, 1]: the share of cells whose truth lies in the interval, its ends included."""
    width: np.ndarray
    """float64 (G,): mean width, in the units of the expression; of two calibrated models the narrower is better."""


def crps(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Fair continuous ranked probability score of S samples a cell, averaged over cells.

    In the energy form, E|X - y| - E|X - X'| / 2 with X and X' two different samples: its expectation does not depend on
    S, so that models may be compared at different S. It is proper, in the units of the expression, and smaller is
    better; single fair scores can be below 0. For one certain value it would be the absolute error.

    Time O(S log(S) N G), memory O(G) beside blocks of 64 MiB.

    Args:
        samples: real numbers (S, N, G), S >= 2, independent given the cell.
        truth: real numbers (N, G), N >= 1.

    Returns:
        float64 (G,).

    Raises:
        ValueError: for NaN, infinity, mismatched shapes or fewer than 2 samples.

    Source: Gneiting & Raftery 2007, "Strictly proper scoring rules, prediction, and estimation", eq. 21; the fair
    estimator is that of Ferro 2014, "Fair scores for ensemble forecasts".
    """
    _check(samples, truth, 2)
    count = len(samples)
    weights = 2.0 * np.arange(count) - (count - 1)  # of sorted values: their sum is that of all |x_i - x_j|, i < j
    total = np.zeros(truth.shape[1])
    for cells in _cells(samples):
        errors = np.sort(samples[:, cells].astype(np.float64) - truth[cells], axis=0)
        total += np.abs(errors).mean(0).sum(0)
        total -= np.tensordot(weights, errors, axes=1).sum(0) / (count * (count - 1))
    return total / len(truth)


def ensemble_coverage(samples: np.ndarray, truth: np.ndarray, level: float = 0.9) -> IntervalCoverage:
    """How often the central interval of S samples holds the truth.

    The interval runs between order statistics at places a (S + 1) and (1 - a) (S + 1), a = (1 - level) / 2: of samples
    from the truth's own distribution it holds the truth in just `level` of cells where those places are whole numbers,
    nearly so between. Discrete truths (counts, many zeros) are held more often.

    Time O(S N G), memory O(G) beside blocks of 64 MiB.

    Args:
        samples: real numbers (S, N, G), S >= 2 / (1 - level) - 1 (19 for 0.9): fewer have no such places.
        truth: real numbers (N, G), N >= 1.
        level: in (0, 1).

    Raises:
        ValueError: for NaN, infinity, mismatched shapes, too few samples or a level out of (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level: {level}, but it must be above 0 and below 1")
    tail = (1 - level) / 2
    _check(samples, truth, int(np.ceil(1 / tail - 1 - 1e-9)))
    found = np.zeros((2, truth.shape[1]))
    for cells in _cells(samples):
        values = samples[:, cells].astype(np.float64)
        low, high = np.quantile(values, [tail, 1 - tail], axis=0, method="weibull", overwrite_input=True)
        found += _held(low, high, truth[cells])
    return IntervalCoverage(*(found / len(truth)))


def interval_coverage(low: np.ndarray, high: np.ndarray, truth: np.ndarray) -> IntervalCoverage:
    """How often given intervals hold the truth.

    Args:
        low: real numbers (N, G), N >= 1.
        high: real numbers (N, G), nowhere below `low`.
        truth: real numbers (N, G).

    Raises:
        ValueError: for NaN, infinity, mismatched shapes, or an interval that ends before it starts.
    """
    low, high, truth = (arrays.matrix(x, name) for x, name in ((low, "low"), (high, "high"), (truth, "truth")))
    arrays.same_shape(low, truth, "low and truth")
    arrays.same_shape(high, truth, "high and truth")
    found = np.zeros((2, truth.shape[1]))
    for cells in arrays.blocks(len(truth), 8 * truth.shape[1]):
        if (low[cells] > high[cells]).any():
            raise ValueError("low: above high in places")
        found += _held(low[cells].astype(np.float64), high[cells].astype(np.float64), truth[cells])
    return IntervalCoverage(*(found / len(truth)))


def _held(low: np.ndarray, high: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Sums over cells of what is held and of widths: float64 (2, G)."""
    return np.stack([((low <= truth) & (truth <= high)).sum(0), (high - low).sum(0)])


def _check(samples: np.ndarray, truth: np.ndarray, least: int) -> None:
    arrays.matrix(truth, "truth")
    if np.shape(samples)[1:] != np.shape(truth):
        raise ValueError(f"samples: shape {np.shape(samples)}, but (S, {truth.shape[0]}, {truth.shape[1]}) is needed")
    if len(samples) < least:
        raise ValueError(f"samples: {len(samples)} a cell, but at least {least} are needed")
    for cells in _cells(samples):
        arrays.finite(samples[:, cells], "samples")


def _cells(samples: np.ndarray) -> Iterator[slice]:
    return arrays.blocks(samples.shape[1], 8 * samples.shape[0] * samples.shape[2])
