"""Embeddings as AnnData: `embeddings.h5ad` with the store's metadata beside each crop's embedding."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cosmic_ray import storage
from cosmic_ray.errors import DataError
from cosmic_ray.inference.parts import matrix, part_uri, read_part
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.split import PARTS

if TYPE_CHECKING:
    import pandas as pd

NAME = "embeddings.h5ad"
_CHUNK_ROWS = 1024


def write_h5ad(
    out: str, parts: Sequence[Mapping[str, Any]], width: int, store: CropStore, codes: np.ndarray | None, uns: Mapping
) -> None:
    """Write `<out>/embeddings.h5ad`: X float32 (N, D) in store order, obs the store's columns, uns the lineage.

    X is copied part by part; obs is built in memory: about half a kilobyte a crop. The file is made on the temporary
    disk (TMPDIR) first, which needs the room: 4 * N * D bytes and the metadata.

    Raises:
        DataError: where a part is damaged, or its rows are not the store's.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, NAME)
        obs = _obs(store, codes)
        _write_frame(path, obs, width, uns)
        _write_x(path, out, parts, obs.index, width)
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            view = memoryview(data)
            storage.write_bytes(storage.join(out, NAME), view)
            view.release()


def _obs(store: CropStore, codes: np.ndarray | None) -> pd.DataFrame:
    import pandas as pd

    table = store.metadata([name for name in store.columns if name != "image"])
    columns = {name: _series(table[name]) for name in table.column_names if name != "crop_id"}
    if codes is not None:
        columns["split"] = pd.Categorical.from_codes(codes.astype(np.int8), list(PARTS))
    return pd.DataFrame(columns, index=pd.Index(table["crop_id"].to_numpy(zero_copy_only=False), dtype=object))


def _series(column: pa.ChunkedArray) -> Any:
    """Text as categories: there are few plates and many crops."""
    if pa.types.is_string(column.type):
        return column.combine_chunks().dictionary_encode().to_pandas().array
    return column.to_numpy()


def _write_frame(path: Path, obs: pd.DataFrame, width: int, uns: Mapping) -> None:
    import anndata
    import pandas as pd

    var = pd.DataFrame(index=[f"e{number}" for number in range(width)])
    anndata.AnnData(obs=obs, var=var, uns=dict(uns)).write_h5ad(path)


def _write_x(path: Path, out: str, parts: Sequence[Mapping[str, Any]], ids: pd.Index, width: int) -> None:
    """X as AnnData stores a dense array, without ever holding it whole."""
    import h5py

    with h5py.File(path, "r+") as file:
        if "X" in file:
            del file["X"]
        chunks = (min(_CHUNK_ROWS, len(ids)), width)
        x = file.create_dataset("X", (len(ids), width), np.float32, chunks=chunks)
        x.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        row = 0
        for facts in parts:
            table = read_part(out, facts)
            if not np.array_equal(table["crop_id"].to_numpy(), ids[row : row + len(table)]):
                raise DataError(part_uri(out, facts["part"]), "its rows are not the store's", "delete it and run again")
            x[row : row + len(table)] = matrix(table["embedding"])
            row += len(table)
