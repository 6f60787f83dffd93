"""Means and variances of log1p normalised counts given the noise-free rate, and the slope that a correlation needs.

A count is Poisson around depth x rate x gamma(1/phi, phi), then lost with probability K / (K + expected value).
Normalised by its depth s (relative to the median cell's) it is y = log1p(count / s). Everything here is quadrature; no
random numbers are drawn.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from cosmic_ray.simulation.links import link, nodes
from cosmic_ray.simulation.paired_spec import Function

_LOG_LOW, _LOG_HIGH, _GRID = math.log(1e-4), math.log(2e5), 480
_EXACT = 400.0
_DEPTHS, _GAMMAS = 7, 16
_MAX_SLOPE = 4.0


class CountLaw:
    """First and second moment of y for one dispersion, dropout and spread of depths."""

    def __init__(self, dispersion: float, dropout: float, library_cv: float):
        from scipy.special import roots_genlaguerre

        self.depths, self.depth_weights = depths(library_cv)
        first, second = _poisson(library_cv)
        grid = np.linspace(_LOG_LOW, _LOG_HIGH, _GRID)
        places, weights = roots_genlaguerre(_GAMMAS, 1 / dispersion - 1)
        weights = weights / weights.sum()
        shifted = grid[:, None] + np.log(places * dispersion)
        kept = (np.exp(grid) / (np.exp(grid) + dropout))[:, None]
        self._tables = [_over_gamma(table, shifted, weights) * kept for table in (first, second)]

    def moments(self, log_rate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """E y and E y^2 over depths of a cell whose log rate at median depth is `log_rate` (any shape)."""
        found = []
        for table in self._tables:
            total = np.zeros(np.shape(log_rate))
            for column, (depth, weight) in enumerate(zip(self.depths, self.depth_weights, strict=True)):
                total += weight * _interpolated(table[:, column], log_rate + math.log(depth))
            found.append(total)
        return found[0], found[1]


def depths(library_cv: float) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Hermite nodes of a log-normal depth of median 1, and their weights."""
    places, weights = np.polynomial.hermite_e.hermegauss(_DEPTHS)
    return np.exp(places * math.sqrt(math.log1p(library_cv**2))), weights / weights.sum()


def centred(slope: float, function: Function, z: np.ndarray) -> np.ndarray:
    """slope x link(z), shifted so that the mean of its exponential over a factor's law is 1: a log rate of mean 0."""
    places, weights = nodes()
    return slope * link(function, z) - math.log(float(weights @ np.exp(slope * link(function, places))))


def correlation(law: CountLaw, log_means: np.ndarray, slope: float, function: Function) -> tuple[float, float]:
    """What a gene of this slope shows within type and batch, as means over these groups.

    Args:
        log_means: (types, batches, donors) log mean count at median depth; donors are equally frequent.
        slope: of the log rate over link(z).

    Returns:
        the correlation of link(z) with y, and the ceiling: that of E[y | z, type, batch] with y.
    """
    z, weights = nodes()
    f = link(function, z)
    first, second = law.moments(log_means[..., None] + centred(slope, function, z))
    given, square = first.mean(axis=2), second.mean(axis=2)
    mean = given @ weights
    spread = np.sqrt(square @ weights - mean**2)
    straight = (given * f) @ weights / spread
    best = np.sqrt(np.maximum((given - mean[..., None]) ** 2 @ weights, 0)) / spread
    return float(straight.mean()), float(best.mean())


def slope_for(law: CountLaw, log_means: np.ndarray, function: Function, sign: int, strength: float) -> float | None:
    """The slope, of `sign`, at which the correlation is sign x strength; None where no slope up to 4 reaches it."""
    from scipy.optimize import brentq

    def missing(slope: float) -> float:
        return sign * correlation(law, log_means, sign * slope, function)[0] - strength

    for upper in (0.5, 1.0, 2.0, _MAX_SLOPE):
        if missing(upper) >= 0:
            return sign * float(brentq(missing, 0, upper, xtol=1e-5))
    return None


@functools.lru_cache(maxsize=4)
def _poisson(library_cv: float) -> tuple[np.ndarray, np.ndarray]:
    """E and E of the square of log1p(c / s), c Poisson: (grid of log means, depths) each."""
    from scipy.stats import poisson

    means = np.exp(np.linspace(_LOG_LOW, _LOG_HIGH, _GRID))
    depth, _ = depths(library_cv)
    first, second = np.empty((_GRID, len(depth))), np.empty((_GRID, len(depth)))
    small = means <= _EXACT
    counts = np.arange(int(_EXACT + 10 * math.sqrt(_EXACT)) + 20)
    chance = poisson.pmf(counts, means[small, None])
    values = np.log1p(counts[:, None] / depth)
    first[small], second[small] = chance @ values, chance @ values**2
    large = means[~small, None]
    first[~small] = np.log1p(large / depth) - large / (2 * (depth + large) ** 2)
    second[~small] = first[~small] ** 2 + large / (depth + large) ** 2
    return first, second


def _over_gamma(table: np.ndarray, shifted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Means of a table (grid, depths) over the gamma factors: `shifted` is log mean + log factor (grid, factors)."""
    return np.stack([_interpolated(column, shifted) @ weights for column in table.T], axis=1)


def _interpolated(column: np.ndarray, log_mean: np.ndarray) -> np.ndarray:
    """A column of a table between its grid points; flat beyond the ends, which no cell reaches."""
    place = np.clip((log_mean - _LOG_LOW) * ((_GRID - 1) / (_LOG_HIGH - _LOG_LOW)), 0, _GRID - 1.000001)
    index = place.astype(np.int64)
    return column[index] + (place - index) * (column[index + 1] - column[index])
