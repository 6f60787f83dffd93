"""Highly variable genes as Seurat v3 chooses them, in stores of any size: sums by row group, never a whole matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cosmic_ray.errors import DataError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from cosmic_ray.stores.cells import CellStore

_SPAN = 0.3
_CONSTANT = 1e-12
"""A variance of so small a share of the mean square is rounding."""


@dataclass(frozen=True)
class Choice:
    """Which genes were chosen, and on what."""

    columns: np.ndarray
    """int64 (G,), ascending."""
    left_out: dict[str, str]
    """Batch -> why it had no say."""


def highly_variable(
    store: CellStore, rows: np.ndarray, codes: np.ndarray, batches: list[str], count: int, span: float = _SPAN
) -> Choice:
    """The `count` genes that vary most beyond what their mean explains (Stuart et al. 2019, `seurat_v3`).

    Within each batch: a loess of log10 variance over log10 mean; the variance of the counts standardised by it, clipped
    at sqrt(cells). Genes are ordered by the median of their ranks over the batches in which they are among the best
    `count`, then by the number of these. scanpy's `highly_variable_genes(flavor="seurat_v3", batch_key=...)` is the
    same; that one holds the counts several times.

    Args:
        store: raw counts (soft values work too).
        rows: row numbers that may be looked at, ascending.
        codes: the batch of each of them, an index of `batches`.
        batches: names. One of a single cell, or one to which no curve can be fitted, has no say.
        count: how many genes; all, where the store has no more.
        span: share of the genes in each local fit.

    Raises:
        DataError: where no batch has a say.
    """
    if count >= store.manifest.genes:
        return Choice(np.arange(store.manifest.genes), {})
    size = np.bincount(codes, minlength=len(batches)).astype(np.float64)[:, None]
    total, squares = _sums(store, rows, codes, len(batches), None)
    mean = total / np.maximum(size, 1)
    variance = np.maximum(size * squares - total**2, 0) / np.maximum(size * (size - 1), 1)
    deviation, left_out = _expected(mean, variance, size[:, 0], batches, span)
    used = [batch for batch, name in enumerate(batches) if name not in left_out]
    if not used:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:5])
        raise DataError(store.uri, f"no batch can say which genes vary ({why})", "batch: null takes them as one")
    clipped, clipped_squares = _sums(store, rows, codes, len(batches), deviation * np.sqrt(size) + mean)
    spread = size * mean**2 + clipped_squares - 2 * clipped * mean
    standardised = spread[used] / ((size[used] - 1) * deviation[used] ** 2)
    return Choice(np.sort(_best(standardised, count)), left_out)


def _best(standardised: np.ndarray, count: int) -> np.ndarray:
    """(batches, genes) -> the columns of the best `count`."""
    ranks = np.argsort(np.argsort(-standardised, axis=1), axis=1).astype(np.float32)
    among = ranks < count
    ranks[~among] = np.nan
    anywhere = among.any(axis=0)
    middle = np.full(ranks.shape[1], np.inf)
    middle[anywhere] = np.nanmedian(ranks[:, anywhere], axis=0)
    return np.lexsort((-among.sum(axis=0), middle))[:count]


def _expected(
    mean: np.ndarray, variance: np.ndarray, size: np.ndarray, batches: list[str], span: float
) -> tuple[np.ndarray, dict[str, str]]:
    """The standard deviation that each batch's means explain, (batches, genes); 1 for a gene that does not vary."""
    from skmisc.loess import loess

    deviation, left_out = np.ones_like(mean), {}
    for batch, name in enumerate(batches):
        if size[batch] < 2:
            left_out[name] = f"{int(size[batch])} cells"
            continue
        varies = variance[batch] > _CONSTANT * (mean[batch] ** 2 + variance[batch])
        if not varies.any():
            left_out[name] = "no gene varies"
            continue
        curve = loess(np.log10(mean[batch, varies]), np.log10(variance[batch, varies]), span=span, degree=2)
        try:
            curve.fit()
        except ValueError as error:
            left_out[name] = f"no curve fits its {int(size[batch])} cells: {str(error).strip()}"
            continue
        deviation[batch, varies] = np.sqrt(10**curve.outputs.fitted_values)
    return deviation, left_out


def _sums(
    store: CellStore, rows: np.ndarray, codes: np.ndarray, batches: int, limit: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Sums and sums of squares of each batch, float64 (batches, genes); of values cut at `limit` where it is given."""
    from scipy.sparse import csr_matrix

    total, squares = np.zeros((batches, store.manifest.genes)), np.zeros((batches, store.manifest.genes))
    for counts, of in counts_by_group(store, rows):
        chosen = codes[of]
        values = counts.data.astype(np.float64)
        if limit is not None:
            values = np.minimum(values, limit[np.repeat(chosen, np.diff(counts.indptr)), counts.indices])
        member = csr_matrix((np.ones(len(of)), (chosen, np.arange(len(of)))), shape=(batches, len(of)))
        for sums, data in ((total, values), (squares, values**2)):
            sums += (member @ csr_matrix((data, counts.indices, counts.indptr), shape=counts.shape)).toarray()
    return total, squares


def counts_by_group(store: CellStore, rows: np.ndarray) -> Iterator[tuple[csr_matrix, slice | np.ndarray]]:
    """The counts of ascending row numbers `rows`, a row group at a time, and which of `rows` they are: int64."""
    ends = np.searchsorted(rows, store.group_starts)
    for group in np.flatnonzero(np.diff(ends)):
        of = np.arange(ends[group], ends[group + 1])
        within = rows[of] - store.group_starts[group]
        counts = store.read_counts(int(group))
        yield counts if len(within) == counts.shape[0] else counts[within], of


def of_columns(store: CellStore, rows: np.ndarray, columns: np.ndarray) -> tuple[csr_matrix, np.ndarray]:
    """The counts of ascending `rows` in `columns`, CSR, and each row's total over all genes, float64 (N,)."""
    from scipy.sparse import csr_matrix, vstack

    parts, totals = [], np.zeros(len(rows))
    for counts, of in counts_by_group(store, rows):
        parts.append(counts[:, columns])
        totals[of] = np.asarray(counts.sum(axis=1), np.float64).ravel()
    return (vstack(parts, format="csr") if parts else csr_matrix((0, len(columns)))), totals
