"""The files of simulated cells: AnnData, a zip of images, truth and factors; each says that it is simulated."""

from __future__ import annotations

import hashlib
import io
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmic_ray.simulation.files import parquet_bytes, png_bytes
from cosmic_ray.simulation.genes import PLANTED, Genes
from cosmic_ray.simulation.paired_spec import FACTORS
from cosmic_ray.simulation.population import Cells

if TYPE_CHECKING:
    import pyarrow as pa
    from scipy.sparse import csr_matrix

NOTE = {"simulated": "true"}
_THEN = (1980, 1, 1, 0, 0, 0)


def h5ad_bytes(counts: csr_matrix, obs: Mapping[str, Any], genes: Iterable[str], about: Mapping[str, Any]) -> bytes:
    """An AnnData file: raw counts in X (CSR int32), `cell_id` among `obs`, `uns["simulated"]` true.

    Args:
        about: further entries of `uns`.
    """
    import anndata
    import pandas as pd

    frame = pd.DataFrame(dict(obs))
    frame.index = pd.Index(frame["cell_id"].to_numpy(object))
    var = pd.DataFrame(index=pd.Index(list(genes), dtype=object))
    data = anndata.AnnData(counts, obs=frame, var=var, uns={"simulated": True, **about})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "expression.h5ad")
        data.write_h5ad(path, compression="gzip")
        return path.read_bytes()


def zip_bytes(images: Iterable[tuple[str, bytes]]) -> bytes:
    """A zip of named files as they are; equal files give equal bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in images:
            archive.writestr(zipfile.ZipInfo(name, _THEN), data)
    return file.getvalue()


def part_bytes(cell_ids: list[str], crops: np.ndarray) -> bytes:
    """The images of one chunk of cells in a Parquet file: `cell_id`, `png`, and `pixels`, the sha256 of the pixels."""
    import pyarrow as pa

    digests = [hashlib.sha256(crop.tobytes()).hexdigest() for crop in crops]
    png = pa.array([png_bytes(crop) for crop in crops], pa.binary())
    table = pa.table({"cell_id": cell_ids, "png": png, "pixels": digests})
    return parquet_bytes(table.replace_schema_metadata(NOTE))


def content(counts: csr_matrix, pixels: Iterable[str], tables: Iterable[pa.Table]) -> str:
    """Hex digest of counts, pixels and tables; the encoding of files and the code's version do not enter."""
    digest = hashlib.sha256(counts.toarray().astype("<i4").tobytes())
    for text in (*pixels, *(repr(table.to_pydict()) for table in tables)):
        digest.update(text.encode())
    return digest.hexdigest()


def truth_table(genes: Genes) -> pa.Table:
    """One row a gene, in the order of the counts' columns: what was planted, and how strongly it shows at best."""
    import pyarrow as pa

    planted = genes.factor >= 0
    columns = {
        "gene_id": genes.gene_id,
        "planted": [role == PLANTED for role in genes.role],
        "role": genes.role,
        "matched": genes.twin,
        "effect": genes.effect,
        "factor": [FACTORS[index] if there else "" for index, there in zip(genes.factor, planted, strict=True)],
        "function": genes.function,
        "slope": genes.slope,
        "strength": genes.strength,
        "ceiling": genes.ceiling,
        "mean": np.exp(genes.log_means).mean(axis=(1, 2, 3)),
        "dispersion": genes.dispersion,
    }
    return pa.table(columns).replace_schema_metadata(NOTE)


def factors_table(cells: Cells, types: list[str]) -> pa.Table:
    """One row a cell: its group, and the factors z (within type) that planted genes follow."""
    import pyarrow as pa

    columns = {**obs_columns(cells, types), **dict(zip(FACTORS, cells.factors.T, strict=True))}
    return pa.table(columns).replace_schema_metadata(NOTE)


def obs_columns(cells: Cells, types: list[str]) -> dict[str, list[str]]:
    """What an experiment would know of each cell: id, type, batch, donor. No factor is among it."""
    return {
        "cell_id": cells.cell_id,
        "cell_type": [types[kind] for kind in cells.kind],
        "batch": [f"sim-batch-{batch + 1}" for batch in cells.batch],
        "donor": [f"sim-donor-{donor + 1}" for donor in cells.donor],
    }
