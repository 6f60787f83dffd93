"""The truth of simulated cells: which genes were planted, and what one would tell who sees what the images show.

`truth.parquet` has a row a gene: `gene_id`, `planted` (bool), `strength`, `matched` (the gene's own control, "" for
none). `factors.parquet` beside it has a row a cell: `cell_id`, and as numbers the factors that planted genes follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cosmic_ray import storage
from cosmic_ray.errors import DataError
from cosmic_ray.evaluation.planted import planted_curve

FACTORS = "factors.parquet"
_NEEDED = ("gene_id", "planted", "strength")
_DEGREE = 4


def judge(uri: str, genes: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """AUROC of planted against matched unplanted genes by strength, beside the oracle's; see `planted_curve`.

    It is made from `r_within`, the correlation within batch AND cell type: genes that differ between cell types would
    else look as if they followed the morphology.

    Args:
        uri: of `truth.parquet`.
        genes: `gene_id`, `mean`, `r_within`, and where there are factors `r_oracle`.

    Raises:
        DataError: where it is no truth, lacks a gene, or planted nothing.
    """
    truth = _read(uri, _NEEDED)
    place = {gene: row for row, gene in enumerate(truth["gene_id"].to_pylist())}
    if missing := [gene for gene in genes["gene_id"] if gene not in place]:
        problem = f"{len(missing)} of {len(genes['gene_id'])} genes are not in it: {', '.join(missing[:5])}"
        raise DataError(uri, problem, "name the truth that these cells were simulated by")
    rows = np.array([place[gene] for gene in genes["gene_id"]])
    planted = truth["planted"].to_numpy(zero_copy_only=False)[rows].astype(bool)
    strength = np.where(planted, truth["strength"].to_numpy()[rows], 0.0)
    try:
        found = planted_curve(
            genes["r_within"],
            strength,
            np.log(np.maximum(genes["mean"], 1e-9)),
            genes.get("r_oracle"),
            controls=_controls(truth, rows, genes["gene_id"]),
        )
    except ValueError as error:
        raise DataError(uri, str(error)) from None
    return found | {"planted": int(planted.sum())}


def _controls(truth: pa.Table, rows: np.ndarray, gene_ids: np.ndarray) -> np.ndarray | None:
    """The place of each gene's control among `gene_ids`, -1 where it has none."""
    if "matched" not in truth.column_names:
        return None
    here = {gene: at for at, gene in enumerate(gene_ids)}
    names = truth["matched"].to_pylist()
    return np.array([here.get(names[row], -1) for row in rows], np.int64)


def oracle_design(uri: str, cell_ids: list[str]) -> np.ndarray | None:
    """What the oracle knows of each cell: powers 1 to 4 of every factor, float64 (N, 4 F). None without factors.

    It sees all that shows in an image and nothing else of the cell; what it cannot tell nobody can, but for effects
    that no such polynomial follows.

    Raises:
        DataError: where a cell has no factors.
    """
    at = storage.join(uri.rsplit("/", 1)[0] if "/" in uri else ".", FACTORS)
    if not storage.exists(at):
        return None
    table = _read(at, ("cell_id",))
    place = {cell_id: row for row, cell_id in enumerate(table["cell_id"].to_pylist())}
    if missing := [cell_id for cell_id in cell_ids if cell_id not in place]:
        raise DataError(at, f"{len(missing)} of {len(cell_ids)} cells are not in it: {missing[0]!r}")
    rows = np.array([place[cell_id] for cell_id in cell_ids])
    columns = [table[name].to_numpy()[rows] for name in table.column_names if pa.types.is_floating(table[name].type)]
    return np.stack([column**power for column in columns for power in range(1, _DEGREE + 1)], 1)


def _read(uri: str, needed: tuple[str, ...]) -> pa.Table:
    try:
        table = pq.read_table(pa.BufferReader(storage.read_bytes(uri)))
    except pa.ArrowException as error:
        raise DataError(uri, f"not a Parquet file: {error}") from None
    if missing := [name for name in needed if name not in table.column_names]:
        raise DataError(uri, f"no column {', '.join(missing)}", f"it has {', '.join(table.column_names)}")
    return table
