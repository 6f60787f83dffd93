"""Cells and images joined by id; what does not match is listed, never dropped unsaid."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from cosmic_ray.stores.writer import order_keys

if TYPE_CHECKING:
    import pandas as pd

    from cosmic_ray.cells.images import Source

Fault = tuple[str, str]
"""(reason, detail)."""

REJECTED = pa.schema(
    {"what": pa.string(), "id": pa.string(), "source_row": pa.int64(), "reason": pa.string(), "detail": pa.string()}
)
"""Columns of `rejected.parquet`: `what` is `cell`, `gene` or `image`; `source_row` is -1 where there is none."""


@dataclass
class Joined:
    """Cells with what was found out before anything of them was read."""

    obs: pd.DataFrame
    """As of `annotations.read_obs`."""
    where: list[str | int | None]
    """Where the image of each cell is; None without images."""
    order: np.ndarray
    """uint64 (N,): the key of each cell in the order of the store."""
    faults: dict[int, Fault]
    """Row -> why this cell is left out."""
    orphans: list[str]
    """Images of no cell."""
    images: int
    """Images in all."""

    @functools.cached_property
    def ids(self) -> list[str]:
        """The cell ids."""
        return self.obs["cell_id"].tolist()


def join(obs: pd.DataFrame, source: Source | None, seed: int) -> Joined:
    """Find the image of every cell, and what is wrong with the ids. Of cells with one id none is kept: nobody knows
    which of them the image shows.
    """
    ids = obs["cell_id"].tolist()
    times = Counter(ids)
    faults: dict[int, Fault] = {}
    for row, cell_id in enumerate(ids):
        if not cell_id:
            faults[row] = ("no id", "")
        elif times[cell_id] > 1:
            faults[row] = ("duplicate id", f"{times[cell_id]} cells have it")
    if source is None:
        return Joined(obs, [None] * len(ids), order_keys(ids, seed), faults, [], 0)
    found = source.find(obs)
    for row, cell_id in enumerate(ids):
        if row in faults:
            continue
        if cell_id in found.faults:
            faults[row] = found.faults[cell_id]
        elif cell_id not in found.where:
            faults[row] = ("no image", "")
    where = [found.where.get(cell_id) for cell_id in ids]
    return Joined(obs, where, order_keys(ids, seed), faults, found.orphans, found.total)


def rejected_table(joined: Joined, faults: dict[int, Fault], genes: list[tuple[str, str, str]]) -> pa.Table:
    """All that is left out: `faults` of cells by row, images of no cell, and genes as (id, reason, detail)."""
    ids = joined.ids
    rows = [("cell", ids[row], row, *faults[row]) for row in sorted(faults)]
    rows += [("image", name, -1, "no cell", "") for name in sorted(joined.orphans)]
    rows += [("gene", gene, -1, reason, detail) for gene, reason, detail in genes]
    columns = zip(*rows, strict=True) if rows else [[] for _ in REJECTED]
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, REJECTED, strict=True)], REJECTED)
