"""Embeddings as AnnData: `embeddings.h5ad` with the store's metadata beside each crop's embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmic_ray import storage
from cosmic_ray.errors import DataError
from cosmic_ray.inference import h5ad
from cosmic_ray.inference.parts import matrix, part_uri, read_part
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.split import PARTS

if TYPE_CHECKING:
    import pandas as pd

NAME = "embeddings.h5ad"


def write_h5ad(
    out: str, parts: Sequence[Mapping[str, Any]], width: int, store: CropStore, codes: np.ndarray | None, uns: Mapping
) -> None:
    """Write `<out>/embeddings.h5ad`: X float32 (N, D) in store order, obs the store's columns, uns the lineage.

    X is copied part by part; obs is built in memory: about half a kilobyte a crop. The file is made on the temporary
    disk (TMPDIR) first, which needs the room: 4 * N * D bytes and the metadata.

    Raises:
        DataError: where a part is damaged, or its rows are not the store's.
    """
    import pandas as pd

    obs, var = _obs(store, codes), pd.DataFrame(index=[f"e{number}" for number in range(width)])
    with h5ad.written(storage.join(out, NAME), obs, var, uns) as file:
        x = h5ad.dense(file, "X", (len(obs), width))
        row = 0
        for facts in parts:
            table = read_part(out, facts)
            if not np.array_equal(table["crop_id"].to_numpy(), obs.index[row : row + len(table)]):
                raise DataError(part_uri(out, facts["part"]), "its rows are not the store's", "delete it and run again")
            x[row : row + len(table)] = matrix(table["embedding"])
            row += len(table)


def _obs(store: CropStore, codes: np.ndarray | None) -> pd.DataFrame:
    import pandas as pd

    table = store.metadata([name for name in store.columns if name != "image"])
    columns = {name: h5ad.series(table[name]) for name in table.column_names if name != "crop_id"}
    if codes is not None:
        columns["split"] = pd.Categorical.from_codes(codes.astype(np.int8), list(PARTS))
    return pd.DataFrame(columns, index=pd.Index(table["crop_id"].to_numpy(zero_copy_only=False), dtype=object))
