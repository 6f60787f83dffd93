"""Cells to parts to a published cell store. A part is a pure function of its cells, so builds can resume and repeat."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from cosmic_ray import output, storage
from cosmic_ray.errors import DataError, NotFoundError
from cosmic_ray.output import Output
from cosmic_ray.stores import cells_form as form
from cosmic_ray.stores.cells_form import CellManifest, Images, Part, TableFile, Values
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.manifest import self_digest
from cosmic_ray.stores.writer import content_digest

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

_ENCODING = {"raw": "DELTA_BINARY_PACKED", "soft": "BYTE_STREAM_SPLIT"}
_DTYPE = {"raw": np.int32, "soft": np.float32}
_ZSTD = 3


def write_part(store: str, index: int, cell_ids: Sequence[str], counts: csr_matrix, values: Values) -> Part:
    """Write the expression of row group `index` of the store at URI `store`, and beside it the entry that says so.

    Args:
        counts: (len(cell_ids), genes); zeros that are stored are dropped. `raw`: integers 0..2**31-1. `soft`: finite
            numbers >= 0, stored as float32.

    Raises:
        ValueError: for other values, or no cells.
    """
    table = _expression(cell_ids, counts, values)
    sink = io.BytesIO()
    encoding = {"genes.list.element": _ENCODING["raw"], "values.list.element": _ENCODING[values]}
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=_ZSTD,
        use_dictionary=False,
        column_encoding=encoding,
        write_statistics=False,
        row_group_size=len(table),
    )
    data = sink.getvalue()
    nonzeros = len(table["genes"].chunk(0).values)
    part = Part(len(table), nonzeros, len(data), xxhash.xxh3_128_hexdigest(data), part_content(table))
    storage.write_bytes(storage.join(store, form.EXPRESSION, Part.name(index)), data)
    storage.write_bytes(_sidecar(store, index), output.encode(part._asdict()))
    return part


def finished_part(store: str, index: int) -> Part | None:
    """The entry of part `index` where an earlier run has finished it, else None."""
    try:
        part = Part(**storage.read_json(_sidecar(store, index)))
        written = storage.size(storage.join(store, form.EXPRESSION, Part.name(index)))
    except (NotFoundError, TypeError):
        return None
    return part if written == part.nbytes else None


def part_content(table: pa.Table) -> str:
    """sha256 of the decoded content of a part: ids, how many genes each cell has, which, and their values."""
    genes, values = (table[name].combine_chunks() for name in ("genes", "values"))
    total = hashlib.sha256(content_digest(table.select(["cell_id"])).encode())
    total.update(np.diff(genes.offsets.to_numpy()).astype("<i4").tobytes())
    for array in (genes.values.to_numpy(), values.values.to_numpy()):
        total.update(f"{array.dtype.name}\n".encode())
        total.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return total.hexdigest()


def publish_cells(
    target: Output,
    cells: pa.Table,
    genes: pa.Table,
    parts: Sequence[Part],
    *,
    values: Values,
    crops: CropStore | None,
    statistics: dict[str, Any],
    lineage: Mapping[str, str],
    job: dict[str, Any],
    simulated: bool,
) -> dict[str, Any]:
    """Publish a cell store from its finished parts, in their order, and its published crops.

    Args:
        cells: `cell_id` and columns of `form.OBS_TYPES`, `form.KNOWN` and `form.SOURCE_ROW` among them, no nulls, in
            stored order.
        genes: `gene_id` and `symbol`, strings, in the order of the columns.
        crops: row i is the image of row i, in row groups of the same sizes; None where there are no images.

    Returns:
        The manifest.

    Raises:
        DataError: where these do not make one store.
        FencedError: where the claim was lost.
    """
    _require_one_store(target.uri, cells, genes, parts, crops)
    columns = {field.name: _kind(field.type) for field in cells.schema if field.name != "cell_id"}
    files = {name: _write_table(target, name, table) for name, table in ((form.CELLS, cells), (form.GENES, genes))}
    images = Images(spec=crops.spec, content_hash=crops.content_hash) if crops else None
    contents = files[form.CELLS].content, files[form.GENES].content
    record = CellManifest(
        rows=len(cells),
        genes=len(genes),
        values=values,
        rows_per_group=parts[0].rows,
        columns=columns,
        images=images,
        content_hash=form.content_hash(values, columns, images, *contents, parts),
        simulated=simulated,
        statistics=statistics,
        lineage=dict(lineage),
        job=job,
        cells_file=files[form.CELLS],
        genes_file=files[form.GENES],
        parts=tuple(parts),
    ).model_dump(mode="json")
    record["digest"] = self_digest(output.encode(record))
    target.publish(record)
    return record


def _expression(cell_ids: Sequence[str], counts: csr_matrix, values: Values) -> pa.Table:
    from scipy.sparse import csr_matrix

    counts = csr_matrix(counts, copy=True)
    counts.sum_duplicates()
    counts.eliminate_zeros()
    stored = counts.data.astype(_DTYPE[values])
    if not len(cell_ids) or counts.shape[0] != len(cell_ids):
        raise ValueError(f"{counts.shape[0]} rows of expression for {len(cell_ids)} cells")
    if not np.isfinite(stored).all() or (stored < 0).any() or (values == "raw" and (stored != counts.data).any()):
        raise ValueError(f"{values} values are {'integers 0..2**31-1' if values == 'raw' else 'finite and >= 0'}")
    offsets = pa.array(counts.indptr.astype(np.int32))
    lists = {"genes": pa.array(counts.indices.astype(np.int32)), "values": pa.array(stored)}
    columns = {name: pa.ListArray.from_arrays(offsets, array) for name, array in lists.items()}
    return pa.table({"cell_id": pa.array(cell_ids, pa.string()), **columns})


def _write_table(target: Output, name: str, table: pa.Table) -> TableFile:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue()
    target.write(name, data)
    table = table.combine_chunks()
    return TableFile(nbytes=len(data), digest=xxhash.xxh3_128_hexdigest(data), content=content_digest(table))


def _kind(kind: pa.DataType) -> str:
    return next(name for name, known in form.OBS_TYPES.items() if known == kind)


def _require_one_store(
    uri: str, cells: pa.Table, genes: pa.Table, parts: Sequence[Part], crops: CropStore | None
) -> None:
    types = set(cells.schema.types) - set(form.OBS_TYPES.values())
    needed = ["cell_id", *form.KNOWN, form.SOURCE_ROW]
    if types or cells.column_names[0] != "cell_id" or not set(needed) <= set(cells.column_names):
        raise DataError(uri, f"cells need the columns {', '.join(needed)}, of {', '.join(form.OBS_TYPES)}")
    if nulls := [name for table in (cells, genes) for name in table.column_names if table[name].null_count]:
        raise DataError(uri, f"nulls in {', '.join(nulls)}", 'write "" for unknown text, NaN for an unknown number')
    for table, name in ((cells, "cell_id"), (genes, "gene_id")):
        if len(table[name].unique()) != len(table):
            raise DataError(uri, f"a {name} stands twice")
    rows = [part.rows for part in parts]
    if sum(rows) != len(cells) or not len(cells) or any(count != rows[0] for count in rows[:-1]) or rows[-1] > rows[0]:
        raise DataError(uri, f"parts of {rows[:3]}... rows do not make {len(cells)} cells in even row groups")
    if crops is not None and crops.rows_per_group.tolist() != rows:
        raise DataError(crops.uri, "its row groups are not those of the expression")


def _sidecar(store: str, index: int) -> str:
    return storage.join(store, form.EXPRESSION, f"part-{index:05}.json")
