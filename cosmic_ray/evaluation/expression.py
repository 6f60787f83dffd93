"""How generated expression compares with real: per gene, in blocks of genes, so that memory stays bounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmic_ray.evaluation.generated import GeneratedExpression
from cosmic_ray.evaluation.metrics.correlation import benjamini_hochberg, gene_correlation
from cosmic_ray.evaluation.metrics.ensembles import crps, interval_coverage
from cosmic_ray.evaluation.scores import number
from cosmic_ray.stores.cells import CellStore

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

BLOCK_BYTES = 256 * 2**20
ABOVE = 0.4
SURE = 0.05
ALL = "all"


@dataclass(frozen=True)
class Real:
    """Real expression of the cells that are judged and of train cells, over the genes that were generated."""

    held: csr_matrix
    """float32 (N, G): log1p of counts scaled to `total`; columns are cheap (CSC)."""
    train: csr_matrix
    """The same of train cells (T, G)."""
    types: np.ndarray
    """Cell types (N,)."""
    train_types: np.ndarray
    """Cell types (T,)."""
    batches: np.ndarray
    """Batches (N,)."""
    groups: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Cell type -> places of its cells, for correlations within it."""
    oracle: tuple[np.ndarray, np.ndarray] | None = None
    """What an oracle knows of the judged cells (N, K) and of the train cells (T, K), where the truth is known."""

    @cached_property
    def within(self) -> np.ndarray:
        """Batch and cell type as one label (N,)."""
        return np.array([f"{batch}\n{kind}" for batch, kind in zip(self.batches, self.types, strict=True)])


def normalised(store: CellStore, rows: np.ndarray, columns: np.ndarray, total: float) -> Any:
    """log1p of the counts of `rows`, each cell scaled to `total` over ALL its genes; then `columns`: CSC float32."""
    counts = store.counts(rows).astype(np.float32)
    sums = np.asarray(counts.sum(1), np.float64).ravel()
    scale = np.divide(total, sums, out=np.zeros_like(sums), where=sums > 0)
    counts.data *= np.repeat(scale, np.diff(counts.indptr)).astype(np.float32)
    np.log1p(counts.data, out=counts.data)
    return counts.tocsc()[:, columns]


def median_total(store: CellStore, rows: np.ndarray) -> float:
    """The median of the cells' total counts."""
    return float(np.median(np.asarray(store.counts(rows).sum(1)).ravel()))


def judged(generated: GeneratedExpression, real: Real, seed: int) -> dict[str, np.ndarray]:
    """Figures of each gene, float64 (G,) each.

    `mean`: real mean. `r`, `p`, `q`: correlation within batch, averaged over batches; `r:<type>` within a cell type,
    `r_within` within batch and cell type, averaged over both; `r_oracle` the same of a linear model fitted on what the
    oracle knows of train cells. `r_cell_type`: the `r` of knowing the cell type alone, its train mean. `error` and
    `error_mean`: mean squared error, and that of the train mean. Where there are samples: `crps` and `crps_train`, the
    score of as many train cells drawn at random; where there is an interval: `held`, `width`.
    """
    genes, cells = real.held.shape[1], real.held.shape[0]
    layers = 3 + len(generated.samples) * 2 + 2
    step = max(1, BLOCK_BYTES // (8 * cells * layers))
    found: dict[str, np.ndarray] = {}
    for start in range(0, genes, step):
        block = slice(start, min(start + step, genes))
        for name, values in _block(generated, real, block, seed).items():
            found.setdefault(name, np.full(genes, np.nan))[block] = values
    found["q"] = benjamini_hochberg(found["p"])
    return found


def _block(generated: GeneratedExpression, real: Real, genes: slice, seed: int) -> dict[str, np.ndarray]:
    truth, made = real.held[:, genes].toarray(), generated.block(genes)
    by_batch = gene_correlation(truth, made, real.batches)
    centre, by_type = _train_means(real, genes)
    found = {
        "mean": truth.mean(0, dtype=np.float64),
        "r": by_batch.r,
        "p": by_batch.p,
        "r_cell_type": gene_correlation(truth, by_type, real.batches).r,
        "r_within": gene_correlation(truth, made, real.within).r,
        "error": ((truth - made) ** 2).mean(0, dtype=np.float64),
        "error_mean": ((truth - centre) ** 2).mean(0, dtype=np.float64),
    }
    for name, places in real.groups.items():
        found[f"r:{name}"] = gene_correlation(truth[places], made[places], real.batches[places]).r
    if real.oracle is not None:
        found["r_oracle"] = gene_correlation(truth, _oracle(real, genes), real.within).r
    if generated.single:
        found |= _distribution(generated, real, truth, genes, seed)
    return found


def _distribution(
    generated: GeneratedExpression, real: Real, truth: np.ndarray, genes: slice, seed: int
) -> dict[str, np.ndarray]:
    found = {}
    if len(generated.samples) >= 2:
        found["crps"] = crps(np.stack([generated.block(genes, name) for name in generated.samples]), truth)
        random = np.random.default_rng(seed)  # the same train cells for every block
        size = (len(generated.samples), len(truth))
        drawn = random.integers(real.train.shape[0], size=size)
        found["crps_train"] = crps(real.train[:, genes].toarray()[drawn], truth)
    if {"lower", "upper"} <= set(generated.layers):
        held = interval_coverage(generated.block(genes, "lower"), generated.block(genes, "upper"), truth)
        found |= {"held": held.share, "width": held.width}
    return found


def _train_means(real: Real, genes: slice) -> tuple[np.ndarray, np.ndarray]:
    """The mean of all train cells (g,), and of each judged cell's type (N, g); of a type that train lacks, of all."""
    train = real.train[:, genes].toarray()
    centre = train.mean(0, dtype=np.float64)
    names, member = np.unique(real.types, return_inverse=True)
    means = np.array(
        [train[real.train_types == name].mean(0) if name in real.train_types else centre for name in names]
    )
    return centre, means[member]


def _oracle(real: Real, genes: slice) -> np.ndarray:
    """Least squares on train cells, within cell types: float64 (N, g)."""
    held, train = real.oracle
    kinds = np.unique(real.train_types)
    designs = [np.hstack([x, types[:, None] == kinds]) for x, types in ((held, real.types), (train, real.train_types))]
    weights = np.linalg.lstsq(designs[1], real.train[:, genes].toarray().astype(np.float64), rcond=None)[0]
    return designs[0] @ weights


def summary(genes: Mapping[str, np.ndarray], generated: GeneratedExpression) -> dict[str, Any]:
    """The genes' figures in one: JSON-serialisable, None where undefined."""
    r, count = genes["r"], len(genes["r"])
    found = {
        "genes": count,
        "undefined": int(np.isnan(r).sum()),
        "pearson": _mean(r),
        "pearson_median": number(np.nanmedian(r)) if np.isfinite(r).any() else None,
        f"pearson_above_{ABOVE}": float((r > ABOVE).sum() / count),
        f"q_below_{SURE}": float((genes["q"] < SURE).sum() / count),
        "pearson_within_cell_type": _mean(genes["r_within"]),
        "pearson_of_cell_type_mean": _mean(genes["r_cell_type"]),
        f"cell_type_mean_above_{ABOVE}": float((genes["r_cell_type"] > ABOVE).sum() / count),
        "pearson_by_cell_type": {name[2:]: _mean(values) for name, values in genes.items() if name.startswith("r:")},
        "error": _mean(genes["error"]),
        "error_of_train_mean": _mean(genes["error_mean"]),
    }
    if "crps" in genes:
        found |= {"crps": _mean(genes["crps"]), "crps_of_train_cells": _mean(genes["crps_train"])}
        found["samples"] = len(generated.samples)
    if "held" in genes:
        level = generated.note.get("level")
        found["interval"] = {"level": level, "held": _mean(genes["held"]), "width": _mean(genes["width"])}
    return found


def _mean(values: np.ndarray) -> float | None:
    return float(np.nanmean(values)) if np.isfinite(values).any() else None
