"""Per-gene Pearson correlation of generated with real expression, within batches, and which genes it is sure of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cosmic_ray.evaluation.metrics import arrays

_FEWEST_CELLS = 3
_FLAT = 1e-12


@dataclass(frozen=True)
class GeneCorrelation:
    """Correlations of G genes over cells, in B batches and averaged; undefined ones are NaN."""

    r: np.ndarray
    """float64 (G,) in [-1, 1]: the plain mean of the defined `by_batch`: each batch counts the same."""
    p: np.ndarray
    """float64 (G,): two-sided, of r = 0."""
    q: np.ndarray
    """float64 (G,): `p` after Benjamini-Hochberg over the genes where it is defined."""
    by_batch: np.ndarray
    """float64 (B, G)."""
    batches: tuple[str, ...]
    """Names of the B batches, sorted; one empty name where all cells count as one batch."""
    cells: np.ndarray
    """int64 (B,): cells of each batch."""

    def share_above(self, threshold: float) -> float:
        """The share of ALL genes, undefined ones included, whose r is above `threshold` (0.4 in the paper)."""
        return float(np.count_nonzero(self.r > threshold) / len(self.r))


def gene_correlation(real: np.ndarray, generated: np.ndarray, batches: np.ndarray | None = None) -> GeneCorrelation:
    """Pearson correlation of each gene between real and generated cells, within each batch, then averaged.

    A gene is undefined in a batch of fewer than 3 cells, and where its real or its generated values do not vary there
    (their range is under 1e-12 of the largest value: rounding). With one batch `p` is that of the usual t-test with
    n - 2 degrees of freedom. The mean over several keeps that form: under the null r of n cells has variance
    1 / (n - 1), so that the mean has the variance of a correlation over 1 + 1 / Var cells, and is tested as one.
    The test holds for independent, roughly normal cells; rare genes' small p-values are approximate.

    Genes are worked through in blocks: memory O(N) beside the inputs and O(B G) of results.

    Args:
        real: real numbers (N, G), N >= 3, normalised expression (log1p in the paper).
        generated: real numbers (N, G): the same cells and genes, in the same order.
        batches: labels (N,), or None for one batch (what the paper does across cell lines).

    Raises:
        ValueError: for NaN, infinity, mismatched shapes, too few cells or missing batch labels.

    Source: App. C of the paper; the averaging of tests is ours.
    """
    real, generated = (arrays.matrix(x, name, _FEWEST_CELLS) for x, name in ((real, "real"), (generated, "generated")))
    arrays.same_shape(real, generated, "real and generated")
    labels = np.full(len(real), "") if batches is None else arrays.names_of(batches, "batches", len(real))
    names, members = np.unique(labels, return_inverse=True)
    cells = np.bincount(members)
    by_batch = np.full((len(names), real.shape[1]), np.nan)
    for genes in arrays.blocks(real.shape[1], 8 * len(real)):
        x, y = real[:, genes].astype(np.float64), generated[:, genes].astype(np.float64)
        for batch in np.flatnonzero(cells >= _FEWEST_CELLS):
            by_batch[batch, genes] = _pearson(x[members == batch], y[members == batch])
    r, p = _averaged(by_batch, cells)
    return GeneCorrelation(r, p, benjamini_hochberg(p), by_batch, tuple(names.tolist()), cells)


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """p-values adjusted to control the false discovery rate, over the ones that are not NaN.

    Args:
        p: float (G,) in [0, 1] or NaN.

    Returns:
        float64 (G,), NaN where `p` is.

    Raises:
        ValueError: for values out of [0, 1].

    Source: Benjamini & Hochberg 1995, "Controlling the false discovery rate".
    """
    from scipy.stats import false_discovery_control

    adjusted = np.full(np.shape(p), np.nan)
    defined = ~np.isnan(p)
    if defined.any():
        adjusted[defined] = false_discovery_control(np.asarray(p, np.float64)[defined])
    return adjusted


def _pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Column by column of float64 (n, G); NaN where either does not vary."""
    varies = _varies(x) & _varies(y)
    a, b = _unit(x[:, varies]), _unit(y[:, varies])
    r = np.full(x.shape[1], np.nan)
    r[varies] = np.clip(np.einsum("ng,ng->g", a, b), -1.0, 1.0)
    return r


def _varies(x: np.ndarray) -> np.ndarray:
    return np.ptp(x, axis=0) > _FLAT * np.abs(x).max(0)


def _unit(x: np.ndarray) -> np.ndarray:
    """Centred columns of length 1."""
    centred = x - x.mean(0)
    centred /= np.abs(centred).max(0)  # else squares of very small or large values under- or overflow
    return centred / np.sqrt(np.einsum("ng,ng->g", centred, centred))


def _averaged(by_batch: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean correlation over the batches that have one, and its p-value: float64 (G,) each."""
    from scipy.stats import t

    defined = ~np.isnan(by_batch)
    count = defined.sum(0)
    r, p = np.full((2, len(count)), np.nan)
    some = count > 0
    r[some] = np.where(defined, by_batch, 0.0).sum(0)[some] / count[some]
    variance = (defined / np.maximum(cells - 1, 1)[:, None]).sum(0)[some] / count[some] ** 2
    freedom = 1 / variance - 1
    with np.errstate(divide="ignore"):
        statistic = np.abs(r[some]) * np.sqrt(freedom / (1 - r[some] ** 2))
    p[some] = 2 * t.sf(statistic, freedom)
    return r, p
