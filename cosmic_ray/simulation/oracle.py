"""What a predictor that sees the planted truth reaches: correlations and AUROC, to stand beside those of a model.

For judging alone: nothing that is fitted may read `truth.parquet` and `factors.parquet`. A model that predicts
expression from expression by way of an image (the cycle) may return a gene's own noise and so pass the oracle's
correlation; the oracle bounds what goes through the morphology.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cosmic_ray import storage
from cosmic_ray.errors import DataError
from cosmic_ray.simulation.files import parquet_table
from cosmic_ray.simulation.links import link

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Truth:
    """The planted truth of simulated or semi-real cells."""

    genes: pd.DataFrame
    """By gene id: `planted`, `role` (planted, control, background), `matched`, `effect`, `factor`, `function`,
    `slope`, `strength`, `ceiling`, `mean`."""
    cells: pd.DataFrame
    """By cell id: the group, and the factors."""

    @classmethod
    def open(cls, uri: str) -> Truth:
        """Read what `simulate-cells` or `semi-real` left at `uri`.

        Raises:
            DataError: where there is none.
        """
        genes, cells = (
            parquet_table(storage.read_bytes(storage.join(uri, name))).to_pandas()
            for name in ("truth.parquet", "factors.parquet")
        )
        return cls(genes.set_index("gene_id"), cells.set_index("cell_id"))

    def oracle(self, cell_ids: Sequence[str], gene_ids: Sequence[str]) -> np.ndarray:
        """What the morphology says of each gene: the noise-free function of its factor, with its sign.

        A control is given the function that its planted gene follows: what it shows is chance. Background genes are
        NaN, for nothing is said of them.

        Returns:
            float64 (cells, genes), mean 0 and variance 1 within a type.

        Raises:
            DataError: naming cells or genes that the truth lacks.
        """
        for what, asked, known in (("cells", cell_ids, self.cells.index), ("genes", gene_ids, self.genes.index)):
            if missing := sorted(set(asked) - set(known)):
                raise DataError("truth", f"{len(missing)} {what} are not in it: {', '.join(missing[:5])}")
        cells, found = self.cells.loc[list(cell_ids)], np.full((len(cell_ids), len(gene_ids)), np.nan)
        for column, gene in enumerate(self.genes.loc[list(gene_ids)].itertuples()):
            if gene.factor:
                found[:, column] = math.copysign(1, gene.slope) * link(gene.function, cells[gene.factor].to_numpy())
        return found

    def auroc(self, scores: pd.Series) -> pd.DataFrame:
        """How well `scores` tell planted genes from their matched controls, at each planted strength.

        Args:
            scores: by gene id, higher where a gene is thought to follow the morphology; those of an oracle or of a
                cycle. Genes without a score (NaN, or filtered out) drop out with their twin.

        Returns:
            By strength: `auroc` (probability that a planted gene scores higher than a control, ties half; NaN where
            none is left) and `pairs`, the number of planted genes, each with its control.
        """
        import pandas as pd

        known = scores.dropna()
        planted = self.genes[self.genes["planted"]]
        planted = planted[planted.index.isin(known.index) & planted["matched"].isin(known.index)]
        rows = {}
        for strength in np.unique(self.genes.loc[self.genes["planted"], "strength"]):
            mine = planted[planted["strength"] == strength]
            ours, theirs = known[mine.index].to_numpy(), known[mine["matched"]].to_numpy()
            rows[float(strength)] = {"auroc": probability_higher(ours, theirs), "pairs": len(mine)}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("strength")


def probability_higher(ours: np.ndarray, theirs: np.ndarray) -> float:
    """AUROC: the probability that one of `ours` is higher than one of `theirs`, ties half; NaN where one is empty."""
    if not len(ours) or not len(theirs):
        return float("nan")
    above = (ours[:, None] > theirs).mean() + (ours[:, None] == theirs).mean() / 2
    return float(above)


def normalised(counts: np.ndarray) -> np.ndarray:
    """log1p of counts scaled to the median total: float64 (N, G). Cells without any count stay 0."""
    totals = counts.sum(axis=1, keepdims=True).astype(float)
    scale = np.divide(np.median(totals), totals, out=np.zeros_like(totals), where=totals > 0)
    return np.log1p(counts * scale)


def within(first: np.ndarray, second: np.ndarray, groups: np.ndarray, least: int = 10) -> np.ndarray:
    """Pearson correlation of each column within groups, averaged over groups of `least` cells or more.

    Args:
        first: (N, G).
        second: (N, G).
        groups: (N,), equal within a group: type and batch, say.

    Returns:
        float64 (G,); NaN where a column is constant in every group. A group where it is constant does not count.
    """
    found = []
    for group in np.unique(groups):
        rows = groups == group
        if rows.sum() < least:
            continue
        a, b = (values[rows] - values[rows].mean(axis=0) for values in (first, second))
        scale = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
        found.append(np.divide((a * b).sum(axis=0), scale, out=np.full(len(scale), np.nan), where=scale > 1e-9))
    stacked = np.array(found).reshape(-1, first.shape[1])
    there = ~np.isnan(stacked)
    return np.divide(np.nansum(stacked, axis=0), there.sum(axis=0), out=np.full(stacked.shape[1], np.nan),
                     where=there.any(axis=0))  # fmt: skip


def expected_auroc(strength: float, group_sizes: Sequence[int]) -> float:
    """AUROC that an oracle reaches on average with so many cells in each group (type and batch), by Fisher's z.

    A planted gene scores N(atanh r, v), its control N(0, v), v = mean over groups of 1 / (n - 3), divided by their
    number; so the AUROC is Phi(atanh r / sqrt(2 v)). With fewer than 4 cells in a group: ValueError.
    """
    if not len(group_sizes) or min(group_sizes) < 4:
        raise ValueError("groups of 4 cells or more are needed")
    variance = float(np.mean([1 / (size - 3) for size in group_sizes])) / len(group_sizes)
    return 0.5 * (1 + math.erf(math.atanh(strength) / math.sqrt(2 * variance) / math.sqrt(2)))
