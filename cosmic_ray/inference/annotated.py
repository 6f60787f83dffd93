"""Embeddings as AnnData: `embeddings.h5ad` with the store's metadata beside each row's embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmic_ray import storage
from cosmic_ray.errors import DataError
from cosmic_ray.inference import h5ad
from cosmic_ray.stores.cells import CellStore
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.embeddings import id_column, matrix, part_uri, read_part
from cosmic_ray.stores.split import PARTS

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

NAME = "embeddings.h5ad"


def write_h5ad(
    out: str,
    parts: Sequence[Mapping[str, Any]],
    width: int,
    store: CropStore | CellStore,
    codes: np.ndarray | None,
    uns: Mapping,
) -> None:
    """Write `<out>/embeddings.h5ad`: X float32 (N, D) in store order, obs the store's columns, uns the lineage.

    X is copied part by part; obs is built in memory: about half a kilobyte a crop. The file is made on the temporary
    disk (TMPDIR) first, which needs the room: 4 * N * D bytes and the metadata.

    Raises:
        DataError: where a part is damaged, or its rows are not the store's.
    """
    import pandas as pd

    name = id_column(store)
    obs, var = _obs(store, name, codes), pd.DataFrame(index=[f"e{number}" for number in range(width)])
    with h5ad.written(storage.join(out, NAME), obs, var, uns) as file:
        x = h5ad.dense(file, "X", (len(obs), width))
        row = 0
        for facts in parts:
            table = read_part(out, facts)
            if not np.array_equal(table[name].to_numpy(), obs.index[row : row + len(table)]):
                raise DataError(part_uri(out, facts["part"]), "its rows are not the store's", "delete it and run again")
            x[row : row + len(table)] = matrix(table, (width,))
            row += len(table)


def _obs(store: CropStore | CellStore, name: str, codes: np.ndarray | None) -> pd.DataFrame:
    import pandas as pd

    table = _about(store)
    columns = {column: h5ad.series(table[column]) for column in table.column_names if column != name}
    if codes is not None:
        columns["split"] = pd.Categorical.from_codes(codes.astype(np.int8), list(PARTS))
    return pd.DataFrame(columns, index=pd.Index(table[name].to_numpy(zero_copy_only=False), dtype=object))


def _about(store: CropStore | CellStore) -> pa.Table:
    """All columns of a store but `image`; of a cell store those of its crops beside its own."""
    if isinstance(store, CropStore):
        return store.metadata([name for name in store.columns if name != "image"])
    table = store.obs()
    if store.manifest.images is None:
        return table
    theirs = store.crops.metadata([name for name in store.columns if name not in (*table.column_names, "image")])
    for name in theirs.column_names:
        table = table.append_column(name, theirs[name])
    return table
