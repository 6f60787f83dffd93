"""Read all of a published store again and say what is wrong with it; cell stores here, crop stores in `verify`."""

from __future__ import annotations

import numpy as np

from cosmic_ray import storage
from cosmic_ray.errors import CosmicError
from cosmic_ray.output import read_manifest
from cosmic_ray.progress import Progress
from cosmic_ray.stores import cells_form as form
from cosmic_ray.stores.cells import CellStore
from cosmic_ray.stores.cells_form import Part
from cosmic_ray.stores.cells_writer import part_content
from cosmic_ray.stores.verify import verify_store
from cosmic_ray.stores.writer import content_digest


def verify_published(uri: str, progress: Progress | None = None) -> list[str]:
    """Read every byte of the crop store or cell store at `uri`; one line for each problem, none where all is well."""
    try:
        cells = read_manifest(storage.absolute(uri)).get("format") == form.FORMAT
    except CosmicError as error:
        return [str(error)]
    return verify_cells(uri, progress) if cells else verify_store(uri, progress)


def verify_cells(uri: str, progress: Progress | None = None) -> list[str]:
    """Read every byte of the cell store at `uri`; one line for each problem.

    Checked: the manifest; digest and content of both tables and of each part; that parts, tables and crops name the
    same cells in the same order; that genes are ascending and there, and values positive; and all of the crop store.
    """
    try:
        store = CellStore.open(uri)
        ids = store.obs(["cell_id"])["cell_id"]
        problems = _check_tables(store)
    except CosmicError as error:
        return [str(error)]
    for group in range(len(store.row_groups)):
        try:
            here = ids.slice(int(store.group_starts[group]), int(store.rows_per_group[group]))
            problems += _check_part(store, group, here.to_pylist())
        except CosmicError as error:
            problems.append(str(error))
        if progress:
            progress.update(group + 1, f"{len(problems)} problems" if problems else "")
    return problems + (_check_crops(store, ids.to_pylist(), progress) if store.manifest.images else [])


def _check_tables(store: CellStore) -> list[str]:
    """Columns, rows and content of `cells.parquet` and `genes.parquet`."""
    manifest, problems = store.manifest, []
    expected = {"cell_id": "string", **manifest.columns}
    wanted = (
        (form.CELLS, store.obs(), manifest.rows, manifest.cells_file.content, expected),
        (form.GENES, store.genes, manifest.genes, manifest.genes_file.content, dict.fromkeys(_GENES, "string")),
    )
    for name, table, rows, content, columns in wanted:
        at = storage.join(store.uri, name)
        if content_digest(table.combine_chunks()) != content:
            problems.append(f"{at}: its decoded content does not match the manifest's digest")
        types = {field.name: field.type for field in table.schema}
        if len(table) != rows or types != {column: form.OBS_TYPES[kind] for column, kind in columns.items()}:
            problems.append(f"{at}: its rows or columns are not those of the manifest")
        if len(table[table.column_names[0]].unique()) != len(table):
            problems.append(f"{at}: a {table.column_names[0]} stands twice")
    return problems


_GENES = ("gene_id", "symbol")


def _check_part(store: CellStore, group: int, cell_ids: list[str]) -> list[str]:
    at = storage.join(store.uri, form.EXPRESSION, Part.name(group))
    table = store.read_part(group)
    problems = []
    if part_content(table) != store.manifest.parts[group].content:
        problems.append(f"{at}: its decoded content does not match the manifest's digest")
    if table["cell_id"].to_pylist() != cell_ids:
        problems.append(f"{at}: its cells are not those of {form.CELLS}")
    matrix = store.read_counts(group)
    starts = np.zeros(len(matrix.indices), bool)
    starts[matrix.indptr[:-1][np.diff(matrix.indptr) > 0]] = True
    ascending = (np.diff(matrix.indices, prepend=-1) > 0) | starts
    inside = (matrix.indices >= 0) & (matrix.indices < store.manifest.genes)
    if not (ascending & inside).all() or not (np.isfinite(matrix.data) & (matrix.data > 0)).all():
        problems.append(f"{at}: genes out of order or unknown, or values that are not positive")
    return problems


def _check_crops(store: CellStore, cell_ids: list[str], progress: Progress | None) -> list[str]:
    problems = verify_store(storage.join(store.uri, form.CROPS), progress)
    if problems:
        return problems
    try:
        crop_ids = store.crops.metadata(["crop_id"])["crop_id"].to_pylist()
    except CosmicError as error:
        return [str(error)]
    return [] if crop_ids == cell_ids else [f"{store.crops.uri}: its crops are not those of {form.CELLS}"]
