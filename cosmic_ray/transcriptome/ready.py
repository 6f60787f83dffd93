"""Ready embeddings out of `adata.obsm`, joined to the cells of a store by their id."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmic_ray import storage
from cosmic_ray.errors import DataError

if TYPE_CHECKING:
    from cosmic_ray.stores.cells import CellStore
    from cosmic_ray.transcriptome.job import Obsm

_SHOWN = 5


def read_obsm(source: Obsm, store: CellStore) -> tuple[np.ndarray, dict[str, Any]]:
    """The embedding of every cell of the store, and what it was read from.

    Returns:
        float32 (N, D) in the store's row order; {uri, content_hash (sha256 of the file), key}.

    Raises:
        DataError: where it is no AnnData, has no such key or column, the embedding has not two dimensions or one row a
            cell, an id stands twice, a cell of the store is missing, or one of its numbers is not finite.
    """
    uri = storage.absolute(source.adata)
    with storage.local_file(uri) as path:
        ids, values = _read(uri, path, source)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    place = {cell: row for row, cell in enumerate(ids)}
    wanted = store.obs(["cell_id"])["cell_id"].to_pylist()
    if len(place) < len(ids):
        raise _refused(uri, "stand twice", _twice(ids), len(ids))
    if missing := [cell for cell in wanted if cell not in place]:
        raise _refused(uri, f"of {store.uri} are missing", missing, len(wanted))
    found = values[[place[cell] for cell in wanted]].astype(np.float32)
    finite = np.isfinite(found).all(axis=1)
    if not finite.all():
        raise _refused(
            uri, "have numbers that are not finite", [wanted[row] for row in np.flatnonzero(~finite)], len(wanted)
        )
    return found, {"uri": uri, "content_hash": digest, "key": source.key}


def _read(uri: str, path: Path, source: Obsm) -> tuple[list[str], np.ndarray]:
    """Ids, and the embedding as it is stored (N, D)."""
    import h5py
    from anndata.io import read_elem

    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DataError(uri, f"not an HDF5 file, or a damaged one: {error}", "write it again") from None
    with file:
        keys = sorted(file["obsm"]) if "obsm" in file else []
        if source.key not in keys:
            raise DataError(uri, f"obsm has no {source.key!r}", f"it has {', '.join(keys) or 'nothing'}")
        try:
            obs, values = read_elem(file["obs"]), read_elem(file["obsm"][source.key])
        except (KeyError, OSError, ValueError, TypeError) as error:
            raise DataError(uri, f"not an AnnData file: {error}", "write it with anndata") from None
    if source.cell_id is not None and source.cell_id not in obs:
        raise DataError(uri, f"obs has no column {source.cell_id!r}", f"it has {', '.join(map(str, obs.columns))}")
    ids = obs.index if source.cell_id is None else obs[source.cell_id]
    values = np.asarray(values.toarray() if hasattr(values, "toarray") else values)
    at = f"obsm[{source.key!r}]"
    if values.ndim != 2 or values.shape[0] != len(obs) or not values.shape[1] or values.dtype.kind not in "fiu":
        problem = f"{at} is {values.dtype} {values.shape}; expected numbers ({len(obs)}, D)"
        raise DataError(uri, problem, "one row of numbers a cell")
    return [str(one) for one in ids], values


def _twice(ids: Sequence[str]) -> list[str]:
    values, counts = np.unique(np.array(ids, object).astype(str), return_counts=True)
    return values[counts > 1].tolist()


def _refused(uri: str, what: str, cells: Sequence[str], of: int) -> DataError:
    shown = ", ".join(cells[:_SHOWN]) + (", ..." if len(cells) > _SHOWN else "")
    return DataError(uri, f"{len(cells):,} of {of:,} cells {what}: {shown}", "every cell of the store needs one row")
