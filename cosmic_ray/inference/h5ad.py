"""AnnData files larger than memory: obs and var first, then dense matrices block by block, then the upload."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cosmic_ray import storage

if TYPE_CHECKING:
    import h5py
    import pandas as pd

_CHUNK_ROWS = 1024
_CHUNK_BYTES = 2**22


@contextmanager
def written(uri: str, obs: pd.DataFrame, var: pd.DataFrame, uns: Mapping[str, Any]) -> Iterator[h5py.File]:
    """An open file with `obs`, `var` and `uns`, for matrices to be added; it lies at `uri` when the block ends.

    It is made on the temporary disk (TMPDIR) first, which needs the room.
    """
    import anndata
    import h5py

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, storage.name(uri))
        anndata.AnnData(obs=obs, var=var, uns=dict(uns)).write_h5ad(path)
        with h5py.File(path, "r+") as file:
            yield file
        with open(path, "rb") as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as data:
            view = memoryview(data)
            storage.write_bytes(uri, view)
            view.release()


def dense(file: h5py.File, name: str, shape: tuple[int, int]) -> h5py.Dataset:
    """An empty float32 matrix in the file, as AnnData stores one; `name`: `X`, or `layers/<layer>`."""
    if name in file:
        del file[name]
    rows = max(1, min(_CHUNK_ROWS, shape[0], _CHUNK_BYTES // (4 * max(shape[1], 1))))
    found = file.create_dataset(name, shape, np.float32, chunks=(rows, shape[1]) if shape[0] and shape[1] else None)
    found.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    return found


def series(column: pa.ChunkedArray) -> Any:
    """A column of obs. Text as categories: there are few plates and many crops."""
    if pa.types.is_string(column.type):
        return column.combine_chunks().dictionary_encode().to_pandas().array
    return column.to_numpy()
