"""Cell stores made to order for tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from making import MakeTestStore
from scipy.sparse import csr_matrix

from cosmic_ray import storage
from cosmic_ray.output import claim
from cosmic_ray.stores.cells import CellStore
from cosmic_ray.stores.cells_form import KNOWN, SOURCE_ROW
from cosmic_ray.stores.cells_writer import publish_cells, write_part
from cosmic_ray.stores.crops import CropStore


def table_of(ids: list[str], **more: Any) -> pa.Table:
    known = {name: [f"{name}-{i % 3}" for i in range(len(ids))] for name in KNOWN}
    return pa.table({"cell_id": ids, SOURCE_ROW: np.arange(len(ids))[::-1], **known, **more})


def genes_of(count: int) -> pa.Table:
    return pa.table({"gene_id": [f"g{i}" for i in range(count)], "symbol": [""] * count})


def cells_of(
    out: str,
    counts: csr_matrix,
    rows_per_group: int = 8,
    values: str = "raw",
    crops: CropStore | None = None,
    **more: Any,
) -> CellStore:
    """Write cells whose images are `crops`, or that have none, and open the store."""
    ids = crops.metadata(["crop_id"])["crop_id"].to_pylist() if crops else [f"cell-{i}" for i in range(counts.shape[0])]
    starts = range(0, len(ids), rows_per_group)
    parts = [
        write_part(out, index, ids[at : at + rows_per_group], counts[at : at + rows_per_group], values)
        for index, at in enumerate(starts)
    ]
    with claim(MakeTestStore(out=out)) as target:
        if crops:
            for uri in storage.listing(crops.uri):
                target.write(f"crops{uri.removeprefix(crops.uri)}", storage.read_bytes(uri))
        publish_cells(
            target,
            table_of(ids, **more),
            genes_of(counts.shape[1]),
            parts,
            values=values,
            crops=crops,
            statistics={},
            lineage={},
            job={},
            simulated=True,
        )
    return CellStore.open(out)
