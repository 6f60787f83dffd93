"""Sliced Wasserstein distance (SWD) between two sets of embeddings."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cosmic_ray.evaluation.metrics import arrays


class SlicedWasserstein(NamedTuple):
    """SWD and its normalised form; the standard errors are over directions, not over samples."""

    distance: float
    """Mean over directions of W1(real, generated), in the units of the embedding; 0 for identical sets."""
    distance_se: float
    """Its standard error."""
    normalised: float
    """`distance` over that of a Gaussian in place of the generated set; above 1: worse than that Gaussian."""
    normalised_se: float
    """Its standard error (delta method; both distances share their directions)."""
    gaussian: float
    """What `distance` was divided by."""


def sliced_wasserstein(
    real: np.ndarray, generated: np.ndarray, directions: int = 1000, seed: int = 0
) -> SlicedWasserstein:
    """Mean Wasserstein-1 distance between the projections of two sets on random directions, and that normalised.

    The reference is SWD(real, Gaussian), the Gaussian having the mean and, dimension by dimension, the variance of
    `real`, no covariance, and as many samples as `real` (the paper does not state that number). The distance of finite
    sets is not 0 even when they come from one distribution: compare at equal sizes. Where `real` is itself close to
    such a Gaussian the reference is little more than sampling noise, and a perfect generator comes out near 1.

    Time O(directions (N + M) (D + log(N + M))), memory O(directions D) beside blocks of 64 MiB.

    Args:
        real: real numbers (N, D), N >= 2, not all the same.
        generated: real numbers (M, D), M >= 1; M need not be N, the distance is exact for both.
        directions: unit vectors drawn uniformly from the sphere, at least 2.
        seed: of the directions and the Gaussian; the same seed gives the same result.

    Raises:
        ValueError: for NaN, infinity, mismatched shapes, too few samples or directions, or real samples that are all
            the same.

    Source: App. C of the paper; Bonneel et al. 2015, "Sliced and Radon Wasserstein barycenters of measures".
    """
    real, generated = arrays.matrix(real, "real", 2), arrays.matrix(generated, "generated")
    arrays.same_width(real, generated, "real and generated")
    if directions < 2:
        raise ValueError(f"directions: {directions}, but a standard error needs at least 2")
    of_directions, of_gaussian = (np.random.default_rng(key) for key in np.random.SeedSequence(seed).spawn(2))
    units = of_directions.standard_normal((directions, real.shape[1]))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    centre, spread = real.mean(0, dtype=np.float64), real.std(0, dtype=np.float64)
    if not spread.any():
        raise ValueError("real: all samples are the same, there is no spread to normalise by")
    gaussian = of_gaussian.standard_normal(real.shape) * spread + centre
    own, reference = (projected_w1(real, others, units) for others in (generated, gaussian))
    ratio = own.mean() / reference.mean()
    root = np.sqrt(directions)
    return SlicedWasserstein(
        distance=float(own.mean()),
        distance_se=float(own.std(ddof=1) / root),
        normalised=float(ratio),
        normalised_se=float((own - ratio * reference).std(ddof=1) / root / reference.mean()),
        gaussian=float(reference.mean()),
    )


def projected_w1(first: np.ndarray, second: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Wasserstein-1 distance of two sets along each of K directions: the area between their distribution functions.

    Args:
        first: real numbers (N, D).
        second: real numbers (M, D).
        units: float64 (K, D).

    Returns:
        float64 (K,).
    """
    counts = len(first), len(second)
    centre = first.mean(0, dtype=np.float64)
    steps = np.repeat([counts[1], -counts[0]], counts)  # N M times the steps of F1 - F2: whole numbers add up exactly
    found = np.empty(len(units))
    for part in arrays.blocks(len(units), 8 * sum(counts)):
        lines = np.concatenate([_projected(values, centre, units[part]) for values in (first, second)], axis=1)
        order = np.argsort(lines, axis=1)
        gaps = np.diff(np.take_along_axis(lines, order, axis=1), axis=1)
        heights = np.abs(np.cumsum(steps[order], axis=1)[:, :-1])
        found[part] = np.einsum("kn,kn->k", gaps, heights) / (counts[0] * counts[1])
    return found


def _projected(values: np.ndarray, centre: np.ndarray, units: np.ndarray) -> np.ndarray:
    """float64 (K, N), converted to float64 a block of samples at a time."""
    lines = np.empty((len(units), len(values)))
    for part in arrays.blocks(len(values), 8 * values.shape[1]):
        lines[:, part] = units @ (values[part] - centre).T
    return lines
