"""The functions that planted genes follow, of mean 0 and variance 1 under the law of a factor; and that law."""

from __future__ import annotations

import functools
import math

import numpy as np

from cosmic_ray.simulation.paired_spec import Function

CUT = 2.5
"""Factors lie within +-2.5: a standard normal law cut there, and not scaled afterwards."""

_NODES = 61


def draw_factors(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers cut at +-2.5 (by inversion): float64 of `shape`."""
    from scipy.special import ndtr, ndtri

    low = ndtr(-CUT)
    return ndtri(low + (1 - 2 * low) * rng.uniform(0, 1, shape))


def link(function: Function, z: np.ndarray) -> np.ndarray:
    """The function of a factor, scaled so that its mean is 0 and its variance 1 over `draw_factors`."""
    centre, scale = _scale(function)
    return (_raw(function, np.asarray(z, float)) - centre) / scale


@functools.cache
def nodes() -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes (61,) and weights (61,), adding up to 1, for means over a factor."""
    places, weights = np.polynomial.legendre.leggauss(_NODES)
    weights = weights * np.exp(-0.5 * (CUT * places) ** 2)
    return CUT * places, weights / weights.sum()


def _raw(function: Function, z: np.ndarray) -> np.ndarray:
    if function == "linear":
        return z
    if function == "u-shaped":
        return z**2
    return np.tanh(3 * (z - 0.5))


@functools.cache
def _scale(function: Function) -> tuple[float, float]:
    z, weights = nodes()
    values = _raw(function, z)
    centre = float(weights @ values)
    return centre, math.sqrt(float(weights @ (values - centre) ** 2))
