"""What is known of each cell: the obs of all files as one table of plain types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from cosmic_ray.cells.h5ad import H5ad, ids_of
from cosmic_ray.stores.cells_form import KNOWN, SOURCE_ROW

if TYPE_CHECKING:
    import pandas as pd

    from cosmic_ray.cells.job import Expression

COUNTED = ("q_counts", "q_genes", "q_mito_share")
"""Columns that the job adds: sum of the values, genes found, share of `q_counts` in mitochondrial genes; before genes
are left out."""

_TAKEN = {"cell_id", SOURCE_ROW, *KNOWN, *COUNTED}


def read_obs(files: Sequence[H5ad], expression: Expression) -> pd.DataFrame:
    """One row a cell, over all files in order: `cell_id`, `source_row`, `batch`, `cell_type`, `donor`, and every column
    of obs under its own name (`obs_...` where that name is taken). Columns that only some files have are NaN or "".

    Raises:
        DataError: where a column that the job names is not there.
    """
    import pandas as pd

    frames = []
    for file in files:
        frame = pd.DataFrame({"cell_id": ids_of(file.obs, expression.cell_id, file.uri, "expression.cell_id")})
        for name in KNOWN:
            column = getattr(expression, name)
            key = f"expression.{name}"
            frame[name] = ids_of(file.obs, column, file.uri, key) if column else ""
        for column in file.obs.columns:
            if str(column) == expression.cell_id or (
                str(column) in KNOWN and str(column) == _named(expression, column)
            ):
                continue
            named = f"obs_{column}" if str(column) in _TAKEN else str(column)
            frame[named] = _plain(file.obs[column])
        frames.append(frame)
    merged = pd.concat(frames, ignore_index=True)
    merged.insert(1, SOURCE_ROW, np.arange(len(merged)))
    return merged


def _named(expression: Expression, column: object) -> str | None:
    return getattr(expression, str(column))


def _plain(values: pd.Series) -> np.ndarray:
    """Numbers and truth values as they are, everything else as text."""
    kind = getattr(values.dtype, "kind", "O")
    if isinstance(values.dtype, np.dtype) and kind in "iufb":
        return values.to_numpy()
    if kind in "iuf":  # pandas' own, with missing values
        whole = kind != "f" and not values.isna().any()
        return values.to_numpy(np.int64) if whole else values.to_numpy(np.float64, na_value=np.nan)
    return np.array(["" if missing else str(value) for value, missing in zip(values, values.isna(), strict=True)], "O")


def to_table(frame: pd.DataFrame) -> pa.Table:
    """As columns of a cell store: string, int64, float64, bool, without nulls; every NaN the same."""
    columns = {}
    for name in frame.columns:
        values = frame[name]
        kind = values.dtype.kind
        if kind == "b":
            columns[name] = pa.array(values.to_numpy(bool))
        elif kind in "iu":
            columns[name] = pa.array(values.to_numpy(np.int64))
        elif kind == "f":
            numbers = values.to_numpy(np.float64)
            columns[name] = pa.array(np.where(np.isnan(numbers), np.nan, numbers))
        else:
            columns[name] = pa.array(["" if v is None or v != v else str(v) for v in values], pa.string())
    return pa.table(columns)
