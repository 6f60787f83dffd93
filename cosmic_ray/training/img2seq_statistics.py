"""What img2seq takes from the training cells before it trains: median total, genes' means and spreads, gene programs.

One pass over the counts for the totals, one for the genes; memory holds one row group. The programs come from at most
PROGRAM_CELLS cells, whose sparse expression is held: 0.5 GB where 3,000 genes a cell are found.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from cosmic_ray.stores.cells import CellStore

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from cosmic_ray.models.img2seq import Img2SeqConfig

PROGRAM_CELLS = 20_000
_OVERSAMPLED, _ITERATIONS = 8, 4
_ROWS_AT_ONCE = 8192


def statistics(
    config: Img2SeqConfig, store: CellStore, rows: np.ndarray, features: np.ndarray
) -> dict[str, torch.Tensor]:
    """The buffers of the network of `config` that training cells decide, float32 by name.

    Args:
        rows: int64 (M,), the training cells.
        features: floating (N, D) of all cells, or tokens.
    """
    total = median_total(store, rows)
    found = {"total": torch.tensor(total)}
    if config.recipe == "paper":
        return _float32(found)
    found |= feature_scale(features, rows)
    if config.counts == "negative binomial":
        counts = sum(np.asarray(part.sum(0), np.float64)[0] for part in _parts(store, rows))
        found["log_rate"] = torch.from_numpy(np.log((counts + 0.5) / (counts + 0.5).sum()))
        return _float32(found)
    mean, scale = gene_scale(store, rows, total)
    chosen = rows[:: -(-len(rows) // PROGRAM_CELLS)]
    values = _normalised(store.counts(chosen), total)
    seen = (features[chosen] - found["feature_scale.mean"].numpy()) / found["feature_scale.std"].numpy()
    loadings, spreads = gene_programs(values, mean, scale, config.programs, seen)
    arrays = {"gene_mean": mean, "gene_scale": scale, "loadings": loadings, "program_scale": spreads}
    return _float32({**found, **{name: torch.from_numpy(array) for name, array in arrays.items()}})


def median_total(store: CellStore, rows: np.ndarray) -> float:
    """The median over cells of all counts of a cell."""
    totals = [np.asarray(part.sum(1), np.float64)[:, 0] for part in _parts(store, rows)]
    return float(np.median(np.concatenate(totals)))


def gene_scale(store: CellStore, rows: np.ndarray, total: float) -> tuple[np.ndarray, np.ndarray]:
    """Of log1p of normalised expression: each gene's mean, and the root of its variance plus the median gene's
    (of those that vary at all); float64 (G,)."""
    sums, squares = np.zeros(store.manifest.genes), np.zeros(store.manifest.genes)
    for part in _parts(store, rows):
        values = _normalised(part, total)
        sums += np.asarray(values.sum(0))[0]
        squares += np.asarray(values.multiply(values).sum(0))[0]
    mean = sums / len(rows)
    variance = np.maximum(squares / len(rows) - mean**2, 0)
    varying = variance[variance > 0]
    return mean, np.sqrt(variance + (np.median(varying) if len(varying) else 1.0))


def gene_programs(
    values: csr_matrix, mean: np.ndarray, scale: np.ndarray, count: int, features: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What (values - mean) / scale varies along once `features` (N, D), standardised, have had their say.

    Leading principal axes of the residuals of a ridge regression, as strong as if the features together explained all
    of a gene; orthonormal float64 (G, count), and the standard deviations along them. By subspace iteration, without
    making the matrix dense (Halko et al. 2011, Algorithm 4.4).
    """
    cells, genes = values.shape
    scaled, shift = values.multiply(1 / scale).tocsr(), mean / scale
    gram = features.T @ features + features.shape[1] * np.eye(features.shape[1])
    weights = np.linalg.solve(gram, (scaled.T @ features).T - np.outer(features.sum(0), shift))

    def seen(axes: np.ndarray) -> np.ndarray:
        return scaled @ axes - shift @ axes - features @ (weights @ axes)

    axes = np.random.Generator(np.random.Philox(0)).standard_normal((genes, min(count + _OVERSAMPLED, genes)))
    for _ in range(_ITERATIONS):
        along = seen(np.linalg.qr(axes)[0])
        axes = scaled.T @ along - np.outer(shift, along.sum(0)) - weights.T @ (features.T @ along)
    axes, _ = np.linalg.qr(axes)
    along = seen(axes)
    variances, turn = np.linalg.eigh(along.T @ along / cells)
    order = np.argsort(variances)[::-1][:count]
    spreads = np.sqrt(np.maximum(variances[order], 0))
    return axes @ turn[:, order], np.maximum(spreads, 1e-3 * spreads[0] + 1e-12)


def feature_scale(features: np.ndarray, rows: np.ndarray) -> dict[str, torch.Tensor]:
    """Mean and standard deviation (D,) of the training cells' features; a constant one counts as spread 1."""
    sums = squares = 0
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = features[rows[start : start + _ROWS_AT_ONCE]].astype(np.float64)
        sums, squares = sums + part.sum(0), squares + np.square(part).sum(0)
    mean = sums / len(rows)
    std = np.sqrt(np.maximum(squares / len(rows) - mean**2, 0))
    std = np.where(std > 1e-6 * np.abs(mean) + 1e-12, std, 1.0)
    return {"feature_scale.mean": torch.from_numpy(mean), "feature_scale.std": torch.from_numpy(std)}


def _parts(store: CellStore, rows: np.ndarray) -> Iterator[csr_matrix]:
    """The counts of `rows`, a row group at a time."""
    groups = np.searchsorted(store.group_starts, rows, side="right") - 1
    for group in np.unique(groups).tolist():
        yield store.read_counts(group)[rows[groups == group] - store.group_starts[group]]


def _normalised(counts: csr_matrix, total: float) -> csr_matrix:
    """As `models.img2seq.normalised`, sparse, float64."""
    values = counts.astype(np.float64)
    factors = total / np.maximum(np.asarray(values.sum(1))[:, 0], 1e-12)
    values.data = np.log1p(values.data * np.repeat(factors, np.diff(values.indptr)))
    return values


def _float32(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.float().contiguous() for name, tensor in tensors.items()}
