"""A small cell store with images, its split and latents, and training jobs on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from making import MakeTestStore, make_store
from making_cell_stores import cells_of
from scipy.sparse import csr_matrix

from cosmic_ray.output import claim
from cosmic_ray.stores.cells import CellStore
from cosmic_ray.stores.embeddings import write_embeddings
from cosmic_ray.stores.split import MakeSplit, Split
from cosmic_ray.training.seq2img_job import TrainSeq2Img

DIGEST = "5" * 64


@dataclass
class Cells:
    """A cell store with images of 64 px, its split, latents of four numbers, and where jobs may write."""

    store: CellStore
    split: str
    latents: str
    folder: str

    @classmethod
    def make(cls, folder: str, rows: int = 120, genes: int = 12) -> Cells:
        random = np.random.default_rng(5)
        crops = make_store(f"{folder}/crops", rows, size=64, rows_per_group=12)
        store = cells_of(f"{folder}/cells", csr_matrix(random.poisson(1.5, (rows, genes))), 12, crops=crops)
        near = {"crops": None, "fields": None}
        MakeSplit(store=store.uri, by=["cell_id"], out=f"{folder}/split", near_duplicates=near).run()
        found = cls(store, f"{folder}/split", f"{folder}/fitted/latents", folder)
        found.embed("fitted", random.normal(size=(rows, 4)).astype(np.float32))
        return found

    def embed(self, name: str, values: np.ndarray, digest: str | None = DIGEST) -> str:
        """Publish `values` as embeddings of the cells."""
        ids = self.store.obs(["cell_id"])["cell_id"].combine_chunks()
        model = {"uri": "models:/made-for-a-test/1", "content_hash": digest, "lineage": {}}
        about = {"store": self.store, "lineage": {"model": model} if digest else {}, "simulated": True, "job": {}}
        with claim(MakeTestStore(out=f"{self.folder}/{name}")) as target:
            write_embeddings(target.inside("latents"), pa.array(ids), values, **about)
        return f"{self.folder}/{name}/latents"

    def opened_split(self) -> Split:
        return Split.open(self.split, self.store)

    def keys(self, name: str = "run", **changes: Any) -> dict[str, Any]:
        """What small jobs share: 6 steps of 16 cells."""
        keys = {
            "out": f"{self.folder}/{name}",
            "cells": self.store.uri,
            "split": self.split,
            "steps": 6,
            "global_batch": 16,
            "log_every": 2,
            "eval": {"every": 3, "crops": 10},
            "checkpoint": {"every": 3},
            "data": {"lanes": 4},
            "tracking": None,
        }
        return keys | changes

    def seq2img(self, name: str = "run", **changes: Any) -> TrainSeq2Img:
        return TrainSeq2Img(**self.keys(name, latents=self.latents, model={"preset": "tiny"}, **changes))
