"""Metrics of nearest neighbours in an embedding space: coverage (COV) and k-nearest-neighbour accuracy (k-NNA)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cosmic_ray.evaluation.metrics import arrays

_EPS = np.finfo(np.float64).eps


class KNNAccuracy(NamedTuple):
    """k-NNA and its two halves, each in [0, 1]."""

    score: float
    """Mean over all samples; of an ideal generator (N - 1) / (2 N - 1), just under 0.5; of separable sets 1."""
    real: float
    """Mean over real samples: the share of their neighbours that are real."""
    generated: float
    """Mean over generated samples; high with a low `real`: the generated ones sit in clumps among the real."""
    k: int
    """How many neighbours were asked."""


def coverage(real: np.ndarray, generated: np.ndarray, ratio: int = 10) -> float:
    """COV: the share of real samples that are the nearest real neighbour of at least one generated sample.

    It rises with the number of generated samples, so that their ratio to the real ones is part of its definition.
    Where several real samples are nearest (duplicates), all of them are covered: the order of the rows is of no
    account. It punishes collapse; noise far off it hardly sees, so never read it alone. Even an ideal generator stays
    below 1, the more so the more dimensions there are: the ceiling is the COV of other real samples.

    Time O(N M D), memory O(N D) beside blocks of 64 MiB.

    Args:
        real: real numbers (N, D), N >= 2, in an embedding space with Euclidean distances.
        generated: real numbers (M, D), M = ratio * N.
        ratio: generated samples for each real one; 10 in the paper.

    Returns:
        A share in (0, 1].

    Raises:
        ValueError: for NaN, infinity, mismatched shapes, fewer than 2 real samples, or another M.

    Source: App. C of the paper; Achlioptas et al. 2018, "Learning representations and generative models for 3D point
    clouds".
    """
    real, generated = arrays.matrix(real, "real", 2), arrays.matrix(generated, "generated")
    arrays.same_width(real, generated, "real and generated")
    if len(generated) != ratio * len(real):
        raise ValueError(
            f"generated: {len(generated)} samples, but COV at a ratio of {ratio} needs {ratio * len(real)} for "
            f"{len(real)} real ones"
        )
    covered = np.zeros(len(real), bool)
    for _, squared, norms in _squared_distances(generated, real):
        nearest = squared.min(1)
        covered |= (squared <= (nearest + _rounding(norms, nearest, real.shape[1]))[:, None]).any(0)
    return float(covered.mean())


def knn_accuracy(real: np.ndarray, generated: np.ndarray, share: float = 0.05) -> KNNAccuracy:
    """k-NNA: how many of a sample's k nearest neighbours, itself excluded, come from its own set.

    Neighbours at exactly the k-th distance (duplicates, lattices) share the places that are left, which is the
    expectation over all ways to break the tie: the order of the rows is of no account.

    Time O(N^2 D), memory O(N D) beside blocks of 64 MiB.

    Args:
        real: real numbers (N, D), N >= 2.
        generated: real numbers (N, D): as many, for else chance would not be 0.5.
        share: k as a share of the pooled 2 N samples, rounded to the nearest integer, 1 at least; 0.05 in the paper.

    Raises:
        ValueError: for NaN, infinity, mismatched shapes, too few samples, unequal sizes or a share out of (0, 1).

    Source: App. C eq. 1 of the paper; Xu et al. 2018, "An empirical study on evaluation metrics of generative
    adversarial networks" (k = 1).
    """
    real, generated = arrays.matrix(real, "real", 2), arrays.matrix(generated, "generated", 2)
    arrays.same_width(real, generated, "real and generated")
    count = len(real)
    if len(generated) != count:
        raise ValueError(
            f"generated: {len(generated)} samples for {count} real ones, but k-NNA needs as many: draw a subset"
        )
    if not 0 < share < 1:
        raise ValueError(f"share: {share}, but a share of the pooled set is above 0 and below 1")
    pooled = np.concatenate([real, generated])
    k = min(max(1, round(share * len(pooled))), len(pooled) - 1)
    scores = np.empty(len(pooled))
    for part, squared, norms in _squared_distances(pooled, pooled):
        rows = np.arange(part.start, part.stop)
        squared[np.arange(len(rows)), rows] = np.inf
        scores[part] = _own_share(squared, norms, rows < count, k, real.shape[1])
    return KNNAccuracy(float(scores.mean()), float(scores[:count].mean()), float(scores[count:].mean()), k)


def nearest_distances(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Euclidean distance of each of `points` (N, D) to the nearest of `others` (M, D): float64 (N,).

    Time O(N M D), memory O(M D) beside blocks of 64 MiB.

    Raises:
        ValueError: for NaN, infinity, mismatched shapes or no samples.
    """
    points, others = arrays.matrix(points, "points"), arrays.matrix(others, "others")
    arrays.same_width(points, others, "points and others")
    scale = _power_of_two(others - others.mean(0, dtype=np.float64))
    found = np.empty(len(points))
    for part, squared, _ in _squared_distances(points, others):
        found[part] = np.sqrt(np.maximum(squared.min(1), 0.0)) / scale
    return found


def _own_share(squared: np.ndarray, norms: np.ndarray, is_real: np.ndarray, k: int, width: int) -> np.ndarray:
    """The share of own kind among the k nearest columns, of which the first half are real."""
    last = np.partition(squared, k - 1, axis=1)[:, k - 1]
    slack = _rounding(norms, last, width)
    half = squared.shape[1] // 2

    def own(chosen: np.ndarray) -> np.ndarray:
        return np.where(is_real, chosen[:, :half].sum(1), chosen[:, half:].sum(1))

    closer = squared < (last - slack)[:, None]
    tied = (squared <= (last + slack)[:, None]) & ~closer
    left = k - closer.sum(1)
    return (own(closer) + left * own(tied) / tied.sum(1)) / k


def _squared_distances(points: np.ndarray, others: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Blocks of rows of the squared distances from `points` to `others`, and the norms of those rows.

    Both are centred on the mean of `others` and scaled by a power of two, so that neither an offset nor the units
    cost digits.
    """
    centre = others.mean(0, dtype=np.float64)
    columns = others - centre
    scale = _power_of_two(columns)
    columns *= scale
    column_norms = np.einsum("nd,nd->n", columns, columns)
    for part in arrays.blocks(len(points), 8 * (len(others) + points.shape[1])):
        rows = (points[part] - centre) * scale
        norms = np.einsum("nd,nd->n", rows, rows)
        yield part, norms[:, None] + column_norms - 2 * rows @ columns.T, np.sqrt(norms)


def _power_of_two(values: np.ndarray) -> float:
    """What brings the largest value to between 0.5 and 1."""
    return float(np.ldexp(1.0, -int(np.frexp(np.abs(values).max())[1])))


def _rounding(norms: np.ndarray, squared: np.ndarray, width: int) -> np.ndarray:
    """How far two computed squared distances near `squared` may differ although the true ones are equal."""
    return (width + 8) * _EPS * (2 * norms + np.sqrt(np.maximum(squared, 0.0))) ** 2
