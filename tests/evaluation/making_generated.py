"""Simulated cells of three types whose law is known, and generators of known quality for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
from making import MakeTestStore, make_rows, make_store
from making_cell_stores import cells_of
from scipy.sparse import csr_matrix
from tiny_encoder import SIDE, export

from cosmic_ray.output import claim
from cosmic_ray.registry.load import load_model
from cosmic_ray.stores.columns import image_column
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.embeddings import write_embeddings
from cosmic_ray.stores.manifest import CropSpec, Intensity
from cosmic_ray.stores.split import MakeSplit, Split
from cosmic_ray.stores.writer import encode_shard, publish_store, write_shard

TYPES = ("bright", "dark", "ring")
GENES = 24
SPEC = CropSpec(channels=("channel-0",), height=SIDE, width=SIDE)


def drawn(types: np.ndarray, seed: int) -> np.ndarray:
    """Fresh images of cells of these types: uint8 (N, 1, SIDE, SIDE)."""
    random = np.random.default_rng(seed)
    yy, xx = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    away = np.hypot(yy, xx)
    radius = random.uniform(5, 7, (len(types), 1, 1))
    level = np.select([types == "bright", types == "dark"], [190, 90], 140)[:, None, None]
    level = level + random.normal(0, 12, (len(types), 1, 1)) + random.normal(0, 6, (len(types), SIDE, SIDE))
    hollow = (types == "ring")[:, None, None] & (away < radius * 0.6)
    inside = away <= radius
    return (np.where(hollow, 30, np.clip(level, 1, 255)) * inside).astype(np.uint8)[:, None]


def rates(types: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Expected counts (N, GENES): 4 genes of each type, 6 that follow the hidden number of a cell, the rest flat."""
    found = np.full((len(types), GENES), 8.0)
    for place, name in enumerate(TYPES):
        found[types == name, 4 * place : 4 * place + 4] *= 4
    found[:, 12:18] *= np.exp(0.6 * hidden)[:, None]
    return found


class World:
    """A cell store, its split, and what it was drawn from."""

    def __init__(self, folder: Path, cells: int = 330):
        random = np.random.default_rng(7)
        self.folder = folder
        self.types = np.array(TYPES)[np.arange(cells) % 3]
        self.hidden = random.normal(size=cells)
        counts = random.poisson(rates(self.types, self.hidden)).astype(np.int32)
        images = {"image": image_column(drawn(self.types, 1))}
        crops = make_store(str(folder / "crops"), cells, size=SIDE, rows_per_group=64, columns=images)
        columns = {"cell_type": self.types.tolist(), "batch": [f"b{i // 3 % 2}" for i in range(cells)]}
        self.cells = cells_of(str(folder / "cells"), csr_matrix(counts), rows_per_group=64, crops=crops, **columns)
        self.split = self.split_of("split", seed=0)
        self.fm = self.model("fm", seed=0)
        self.seq2img = self.model("seq2img", seed=1)

    def split_of(self, name: str, seed: int) -> Split:
        MakeSplit(
            store=self.cells.uri,
            out=str(self.folder / name),
            by=["cell_id"],
            stratify="cell_type",
            fractions={"train": 0.4, "val": 0.3, "test": 0.3},
            near_duplicates={"crops": None, "fields": None},
            seed=seed,
        ).run()
        return Split.open(str(self.folder / name), self.cells)

    def model(self, name: str, seed: int, **lineage: Any) -> str:
        """A model folder, fitted (it says) on the cells' train; `lineage` says otherwise."""
        said = {
            "store": {"uri": self.cells.uri, "content_hash": self.cells.content_hash},
            "split": {"uri": self.split.uri, "content_hash": self.split.content_hash},
            "job": "0" * 16,
        }
        said = {key: value for key, value in (said | lineage).items() if value is not None}
        uri = str(self.folder / name)
        export(uri, seed=seed, lineage=said)
        return uri

    def rows(self, part: str = "val") -> np.ndarray:
        return self.split.rows(part)

    def ids(self, rows: np.ndarray) -> list[str]:
        return self.cells.obs(["cell_id"], rows)["cell_id"].to_pylist()

    def images(self, name: str, rows: np.ndarray, images: np.ndarray, model: str | None = None, **more: Any) -> str:
        """Publish generated images (N, S, 1, SIDE, SIDE) of the cells `rows` as a generate job does."""
        count, samples = images.shape[:2]
        table = make_rows(count * samples, SPEC)
        ids = np.repeat(self.ids(rows), samples).tolist()
        sample = np.tile(np.arange(samples), count).astype(np.int32)
        columns = {
            "crop_id": pa.array([f"{cell}#{number}" for cell, number in zip(ids, sample, strict=True)]),
            "image": image_column(np.ascontiguousarray(images.reshape(-1, 1, SIDE, SIDE))),
        }
        for key, values in columns.items():
            table = table.set_column(table.column_names.index(key), key, values)
        table = table.append_column("cell_id", pa.array(more.get("cell_ids", ids))).append_column(
            "sample", sample_of(sample)
        )
        order = np.random.default_rng(0).permutation(len(table))  # a store's rows are in the order of a hash
        return self._published(name, table.take(order), {model or self.seq2img: digest(model or self.seq2img)})

    def _published(self, name: str, table: pa.Table, lineage: dict[str, str]) -> str:
        uri = str(self.folder / name)
        entries = [write_shard(uri, 0, encode_shard(table, SPEC, 256))]
        intensity = Intensity(scope="stored", description="made for a test", masked=True)
        with claim(MakeTestStore(out=uri)) as target:
            publish_store(target, SPEC, entries, {}, intensity, lineage, {"kind": "test-store"}, True)
        return CropStore.open(uri).uri

    def expression(
        self,
        name: str,
        rows: np.ndarray,
        mean: np.ndarray,
        model: str | None = None,
        *,
        lineage: dict[str, Any] | None = None,
        note: dict[str, Any] | None = None,
        **more: np.ndarray,
    ) -> str:
        """Write `expression.h5ad` of the cells `rows` as a generate job does; `more` are layers."""
        model = model or self.seq2img
        lineage = {"img2seq": {"uri": model, "digest": digest(model)}, **(lineage or {})}
        note = {"lineage": json.dumps(lineage), "simulated": True, "level": 0.9, **(note or {})}
        var = pd.DataFrame(index=[f"g{i}" for i in range(mean.shape[1])])
        made = anndata.AnnData(
            mean.astype(np.float32),
            obs=pd.DataFrame(index=self.ids(rows)),
            var=var,
            layers={key: value.astype(np.float32) for key, value in more.items()},
            uns={"cosmic_ray": note},
        )
        (self.folder / name).mkdir(parents=True)
        made.write_h5ad(self.folder / name / "expression.h5ad")
        return str(self.folder / name)

    def features(self, name: str, model: str) -> str:
        """Embeddings of all cells' crops by a model, as an embed job leaves them."""
        crops, fm = self.cells.crops, load_model(model, device="cpu")
        vectors = fm.embed(crops.crops(np.arange(len(crops))))
        lineage = {"model": {"uri": model, "content_hash": fm.config.digest, "lineage": fm.config.lineage}}
        ids = crops.metadata(["crop_id"])["crop_id"].combine_chunks()
        with claim(MakeTestStore(out=str(self.folder / name))) as target:
            inside = target.inside("features")
            write_embeddings(inside, ids, vectors, store=crops, lineage=lineage, simulated=True, job={})
        return inside.uri

    def log(self, rows: np.ndarray) -> np.ndarray:
        """Real log expression (N, GENES)."""
        from cosmic_ray.evaluation.expression import median_total, normalised

        total = median_total(self.cells, self.rows("train"))
        return normalised(self.cells, rows, np.arange(GENES), total).toarray()


def sample_of(values: np.ndarray) -> pa.Array:
    return pa.array(values, pa.int32())


def digest(model: str) -> str:
    from cosmic_ray.registry.package import read_config

    return read_config(model).digest
