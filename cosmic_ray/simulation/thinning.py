"""Planted genes in real counts: binomial thinning by a function of a factor, and the slope that a correlation needs.

Of c counts of a gene each is kept with probability p = exp(slope f(z)) / max over z of it: counts that were Poisson
around a rate become Poisson around p x rate, and what else varied between the real cells still does (Gerard 2020).
"""

from __future__ import annotations

import numpy as np

from cosmic_ray.simulation.links import CUT, draw_factors, link
from cosmic_ray.simulation.oracle import within
from cosmic_ray.simulation.paired_spec import Function

_DRAWS, _STEPS, _MAX_SLOPE = 16_000, 13, 2.0
_GRID = np.linspace(-CUT, CUT, 41)
_REPEATS = 8


def kept_share(slope: float, function: Function, z: np.ndarray) -> np.ndarray:
    """Probability that a count is kept, of the shape of `z`; its largest value over the law of a factor is 1."""
    top = (slope * link(function, np.linspace(-CUT, CUT, 2001))).max()
    return np.exp(slope * link(function, np.clip(z, -CUT, CUT)) - top)


def slope_for(
    counts: np.ndarray, scale: np.ndarray, groups: np.ndarray, function: Function, sign: int, strength: float,
    rng: np.random.Generator,
) -> float | None:  # fmt: skip
    """The slope, of `sign`, at which f(z) and y correlate by sign x strength (mean over groups), to about 0.01.

    Args:
        counts: (M,) of one gene in real cells.
        scale: (M,) median total / total of each: y = log1p(kept count x scale).
        groups: (M,) type and batch.
        rng: decides 16,000 pairs of a factor and a real cell.

    Returns:
        None where no slope up to 2 reaches it.
    """
    z, cell = draw_factors(rng, (_DRAWS,)), rng.integers(0, len(counts), _DRAWS)
    key, groups = rng.integers(0, 2**63), np.unique(groups, return_inverse=True)[1][cell]
    f, scale, counts = link(function, z)[:, None], scale[cell], counts[cell]

    def reached(slope: float) -> float:
        kept = np.random.default_rng(key).binomial(counts, kept_share(sign * slope, function, z))
        return sign * float(within(f, np.log1p(kept * scale)[:, None], groups)[0])

    low, high = 0.0, _MAX_SLOPE
    if reached(high) < strength:
        return None
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(middle) < strength else (low, middle)
    return sign * (low + high) / 2


def conditional_means(
    counts: np.ndarray, scale: np.ndarray, groups: np.ndarray, slope: float, function: Function,
    rng: np.random.Generator,
) -> dict[object, np.ndarray]:  # fmt: skip
    """E[y | z, group] on `grid()`, over the real cells of each group: group -> (41,)."""
    share = np.repeat(kept_share(slope, function, _GRID), _REPEATS)
    kept = rng.binomial(counts[:, None], share[None, :])
    y = np.log1p(kept * scale[:, None]).reshape(len(counts), len(_GRID), _REPEATS).mean(axis=2)
    return {group: y[groups == group].mean(axis=0) for group in np.unique(groups)}


def predicted(means: dict[object, np.ndarray], z: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """E[y | z, group] of cells by interpolation: (N,)."""
    found = np.empty(len(z))
    for group, values in means.items():
        rows = groups == group
        found[rows] = np.interp(z[rows], _GRID, values)
    return found
