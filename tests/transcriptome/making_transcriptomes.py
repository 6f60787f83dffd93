"""Simulated transcriptomes of a few cell types in a few batches, as a cell store with its split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from making_cell_stores import cells_of
from scipy.sparse import csr_matrix

from cosmic_ray.stores.cells import CellStore
from cosmic_ray.stores.split import MakeSplit, Split
from cosmic_ray.transcriptome.job import FitTranscriptome


def expression(cells: int, genes: int, types: int = 3, seed: int = 0) -> tuple[csr_matrix, np.ndarray]:
    """Negative binomial counts with a depth of their own and ten marker genes a type; and the type of each cell."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, types, cells)
    mean = np.tile(rng.gamma(0.6, 1.5, genes), (types, 1))
    for kind in range(types):
        mean[kind, 10 * kind : 10 * kind + 10] = mean[kind, 10 * kind : 10 * kind + 10] * 6 + 2
    rate = mean[kinds] * rng.lognormal(0, 0.3, cells)[:, None]
    return csr_matrix(rng.poisson(rate * rng.gamma(2, 0.5, rate.shape))), kinds


@dataclass
class Cells:
    """A cell store, its split, and the types of its cells."""

    store: CellStore
    split: str
    kinds: np.ndarray
    folder: str

    @classmethod
    def make(cls, folder: str, cells: int = 240, genes: int = 60, **options: Any) -> Cells:
        """The batch is the library's column `batch`, of three values in turn."""
        counts, kinds = expression(cells, genes)
        store = cells_of(f"{folder}/cells", counts, 50, **options)
        near = {"crops": None, "fields": None}
        MakeSplit(store=store.uri, by=["cell_id"], out=f"{folder}/split", near_duplicates=near).run()
        return cls(store, f"{folder}/split", kinds, folder)

    def opened_split(self) -> Split:
        return Split.open(self.split, self.store)

    def job(self, name: str = "fit", **changes: Any) -> FitTranscriptome:
        """A small fit: 3 epochs, 30 genes, a latent of 5."""
        keys = {
            "out": f"{self.folder}/{name}",
            "cells": self.store.uri,
            "split": self.split,
            "genes": 30,
            "latent": 5,
            "scvi": {"hidden": 16, "epochs": 3, "batch_size": 32},
            "tracking": None,
        }
        return FitTranscriptome(**(keys | changes))
