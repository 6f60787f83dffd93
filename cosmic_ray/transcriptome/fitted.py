"""What is fitted, on which cells, and what comes of it: the frame around scVI and PCA, in the one process that fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmic_ray.errors import DataError, JobError
from cosmic_ray.stores.cells import CellStore
from cosmic_ray.stores.split import Split
from cosmic_ray.transcriptome.genes import counts_by_group, highly_variable, of_columns

if TYPE_CHECKING:
    import torch
    from scipy.sparse import csr_matrix

    from cosmic_ray.models.transcriptome import TranscriptomeSpec
    from cosmic_ray.transcriptome.job import FitTranscriptome

Report = Callable[[Mapping[str, Any]], None]
"""Takes {"say": text}, or {"epoch": number, metric: value, ...}."""


@dataclass(frozen=True)
class Cells:
    """Cells of one part of the split: their counts in the chosen genes."""

    counts: csr_matrix
    """(N, G)."""
    totals: np.ndarray
    """float64 (N,), over all genes."""
    codes: np.ndarray
    """int64 (N,), the batch; -1 for one that `train` does not hold."""

    def __len__(self) -> int:
        return len(self.totals)

    def found(self) -> Cells:
        """Those with a count in the chosen genes; scVI takes the logarithm of their sum."""
        kept = np.asarray(self.counts.sum(axis=1)).ravel() > 0
        return Cells(self.counts[kept], self.totals[kept], self.codes[kept])


@dataclass(frozen=True)
class Fitted:
    """An encoder, and what it makes of every cell."""

    spec: TranscriptomeSpec
    weights: dict[str, torch.Tensor]
    genes: list[str]
    """The ids of the genes that go in, in their order."""
    total_genes: list[str] | None
    """Those over which a cell's total is taken; None where it does not matter."""
    batches: list[str]
    """Of the cells that it was fitted on."""
    latents: np.ndarray
    """float32 (N, D), of all cells of the store."""
    facts: dict[str, Any]
    """Counts of cells and genes, what was left out, the last metrics."""


def fit(job: FitTranscriptome, report: Report) -> Fitted:
    """Choose the genes, fit on `train`, watch `val`, and embed all cells.

    Raises:
        JobError: where the store, the split and the keys do not go together.
        DataError: where an input is damaged.
        CosmicError: where the loss is no number any more.
    """
    from cosmic_ray.models.transcriptome import build_transcriptome

    store = CellStore.open(job.cells)
    split = Split.open(job.split, store)
    columns, batches, train, val, facts = _chosen(job, store, split, report)
    if job.method == "scvi":
        from cosmic_ray.transcriptome.fit_scvi import fit_scvi as fit_with
    else:
        from cosmic_ray.transcriptome.fit_pca import fit_pca as fit_with
    spec, weights, metrics = fit_with(job, train, val, report)
    network = build_transcriptome(spec)
    network.load_state_dict(weights)
    latents = _embedded(network.eval(), spec, store, columns)
    ids = store.genes["gene_id"].to_pylist()
    total_genes = ids if job.method == "pca" else None
    genes = [ids[column] for column in columns]
    return Fitted(spec, weights, genes, total_genes, batches, latents, {**facts, **metrics})


def _chosen(
    job: FitTranscriptome, store: CellStore, split: Split, report: Report
) -> tuple[np.ndarray, list[str], Cells, Cells, dict[str, Any]]:
    """The columns of the chosen genes, the batches and cells of `train`, the cells of `val`, and how many of each."""
    rows, held_out = split.rows("train"), split.rows("val")
    if len(rows) < 2:
        raise JobError("split", job.split, f"{len(rows)} cells are in train", "make a split with more")
    batch = [str(value) for value in store.obs([job.batch])[job.batch].to_pylist()] if job.batch else [""] * len(store)
    of_cell = np.array(batch, object)
    names, codes = np.unique(of_cell[rows], return_inverse=True)
    choice = highly_variable(store, rows, codes, names.tolist(), job.genes)
    known = {name: code for code, name in enumerate(names)}
    val_codes = np.array([known.get(name, -1) for name in of_cell[held_out]], np.int64)
    train = Cells(*of_columns(store, rows, choice.columns), codes.astype(np.int64))
    val = Cells(*of_columns(store, held_out, choice.columns), val_codes)
    facts = {
        "cells_fitted": len(train),
        "genes": len(choice.columns),
        "genes_of_store": store.manifest.genes,
        "batches": len(names),
        "batches_without_a_say": choice.left_out,
        "val_cells": len(val),
        "val_cells_of_unseen_batches": int((val_codes < 0).sum()),
    }
    _tell(facts, report, job.genes)
    return choice.columns, names.tolist(), train, val, facts


def _tell(facts: Mapping[str, Any], report: Report, asked: int) -> None:
    genes, have = facts["genes"], facts["genes_of_store"]
    which = f"all {genes:,} genes, which is fewer than the {asked:,} asked for" if genes < asked else f"{genes:,} genes"
    report({"say": f"{which}, of {have:,}; {facts['cells_fitted']:,} cells of {facts['batches']} batches to fit on"})
    for name, why in facts["batches_without_a_say"].items():
        report({"say": f"batch {name!r} had no say in which genes vary: {why}"})


def _embedded(network: torch.nn.Module, spec: TranscriptomeSpec, store: CellStore, columns: np.ndarray) -> np.ndarray:
    """The latents of all cells, a row group at a time."""
    from cosmic_ray.models.transcriptome import encode

    latents = np.empty((len(store), spec.latent), np.float32)
    for counts, of in counts_by_group(store, np.arange(len(store))):
        try:
            latents[of] = encode(network, spec, counts, columns)
        except ValueError as error:
            raise DataError(store.uri, f"rows {of[0]}..{of[-1]}: {error}") from None
    return latents
