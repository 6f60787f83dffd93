"""Cell store format, version 1: cells with their expression and, where there are any, their images, in one row order.

    <store>/manifest.json                    this module's `CellManifest`; written last
    <store>/crops/                           a crop store, `crop_id` = `cell_id`; absent where cells have no images
    <store>/expression/part-00000.parquet    one row group of cells: `cell_id`, `genes`, `values`
    <store>/cells.parquet                    one row a cell: `cell_id` and what is known of it
    <store>/genes.parquet                    one row a gene: `gene_id`, `symbol`

Row i is the same cell everywhere, and part g holds the rows of row group g of the crop store. So a plan, a split or a
stream over the crops is one over the cells, and a batch's expression is found by the row group and row of its images.
`genes` and `values` are lists of int32 (float32 where values are soft): the columns, ascending, and values of a CSR
matrix. Plain Parquet: 1.1 bytes a nonzero and 135 million nonzeros a CPU-second (3,000 of 18,000 genes a cell).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from pydantic import Field, ValidationError

from cosmic_ray import output
from cosmic_ray.config import Config
from cosmic_ray.errors import DataError
from cosmic_ray.stores import manifest as crops_form
from cosmic_ray.stores.manifest import CropSpec, self_digest

FORMAT, VERSION = crops_form.CELLS, 1
CROPS, EXPRESSION, CELLS, GENES = "crops", "expression", "cells.parquet", "genes.parquet"
Values = Literal["raw", "soft"]

KNOWN = ("batch", "cell_type", "donor")
"""Text columns that every cell store has; "" where it is unknown."""

SOURCE_ROW = "source_row"
"""int64: which cell of the source this is, counted from 0 over its files in the order of their names."""

OBS_TYPES = {"string": pa.string(), "float64": pa.float64(), "int64": pa.int64(), "bool": pa.bool_()}
"""Types of a column of `cells.parquet`. No value is null: unknown text is "", an unknown number NaN (float64)."""


class Part(NamedTuple):
    """The expression of one row group."""

    rows: int
    nonzeros: int
    nbytes: int
    digest: str
    """xxh3_128 of the file."""
    content: str
    """sha256 of the decoded content: ids, genes, values."""

    @staticmethod
    def name(index: int) -> str:
        """File name of part `index`, inside `expression/`."""
        return f"part-{index:05}.parquet"


class TableFile(Config):
    """`cells.parquet` or `genes.parquet`."""

    nbytes: int
    digest: str
    """xxh3_128 of the file."""
    content: str
    """sha256 of the decoded content."""


class Images(Config):
    """What the crop store inside holds."""

    spec: CropSpec
    content_hash: str
    """That of the crop store."""


class CellManifest(Config):
    """The manifest of a cell store, version 1."""

    format: Literal["cosmic-ray/cells"] = FORMAT
    version: Literal[1] = VERSION
    rows: int
    """Cells in all."""
    genes: int
    """Genes in all."""
    values: Values
    """`raw`: counts, int32. `soft`: what a model made of counts, float32 >= 0: no counts."""
    rows_per_group: int
    """Rows of every part but the last."""
    columns: dict[str, Literal["string", "float64", "int64", "bool"]]
    """Columns of `cells.parquet` beside `cell_id`, by name."""
    images: Images | None
    """None where cells have no images."""
    content_hash: str
    """sha256 of the content alone, images included."""
    simulated: bool
    """Whether any cell comes from a simulator."""
    statistics: dict[str, Any]
    """What the job counted."""
    lineage: dict[str, str]
    """URIs of the inputs and their content hashes."""
    job: dict[str, Any]
    """The resolved job that made it."""
    cells_file: TableFile
    genes_file: TableFile
    parts: tuple[Part, ...] = Field(min_length=1)
    digest: str = ""
    """sha256 of everything above: the manifest checks itself."""


def content_hash(
    values: Values, columns: Mapping[str, str], images: Images | None, cells: str, genes: str, parts: Iterable[Part]
) -> str:
    """sha256 over the content digests of the tables `cells` and `genes`, of the parts in order, and of the images."""
    about = {"version": VERSION, "values": values, "columns": dict(columns), "cells": cells, "genes": genes}
    about["images"] = images.content_hash if images else ""
    total = hashlib.sha256(output.canonical(about))
    for part in parts:
        total.update(f"{part.rows} {part.content}\n".encode())
    return total.hexdigest()


def parse_manifest(uri: str, data: bytes) -> CellManifest:
    """Check the bytes of a manifest read from `uri`.

    Raises:
        DataError: for another format, an unknown version, ill-formed content, or content that its digests deny.
    """
    try:
        manifest = CellManifest.model_validate_json(data)
    except ValidationError as error:
        raise _refusal(uri, data, error) from None
    if manifest.digest != self_digest(data):
        remedy = "it was changed or damaged after publication"
        raise DataError(uri, "the manifest does not match its own digest", remedy)
    tables = manifest.cells_file.content, manifest.genes_file.content
    if manifest.content_hash != content_hash(
        manifest.values, manifest.columns, manifest.images, *tables, manifest.parts
    ):
        raise DataError(uri, "the content hash does not follow from the digests of the parts")
    return manifest


def _refusal(uri: str, data: bytes, error: ValidationError) -> DataError:
    try:
        tree = json.loads(data)
    except ValueError as broken:
        return DataError(uri, f"not valid JSON: {broken}")
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        kind = tree.get("format") if isinstance(tree, dict) else type(tree).__name__
        return DataError(uri, f"not a cell store: its format is {kind!r}", f"expected {FORMAT!r}")
    if tree.get("version") != VERSION:
        return DataError(uri, f"unknown version {tree.get('version')!r} of {FORMAT}", f"this program reads {VERSION}")
    first = error.errors(include_url=False)[0]
    return DataError(uri, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
