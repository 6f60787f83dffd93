"""Open a cell store and read it: expression and images by row, as tables, as AnnData; every byte is checked."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from cosmic_ray import storage
from cosmic_ray.errors import DamagedError, DataError
from cosmic_ray.output import MANIFEST, manifest_bytes, read_manifest
from cosmic_ray.stores import cells_form as form
from cosmic_ray.stores.cells_form import CellManifest, Part
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.manifest import CropSpec

if TYPE_CHECKING:
    import anndata
    import pandas as pd
    from scipy.sparse import csr_matrix

_REMEDY = "it was damaged: restore it or build the store again"


class CellStore:
    """A published cell store. Rows are numbered 0..len-1 in stored order, as those of its crop store are."""

    def __init__(self, uri: str, manifest: CellManifest):
        self.uri = uri
        self.manifest = manifest

    @classmethod
    def open(cls, uri: str) -> CellStore:
        """Open the store at `uri`: reads and checks its manifest, nothing else.

        Raises:
            DataError: where there is no store, its version is unknown, or the manifest does not match its digests.
        """
        uri = storage.absolute(uri)
        return cls(uri, form.parse_manifest(storage.join(uri, MANIFEST), manifest_bytes(uri)))

    def __reduce__(self) -> tuple[Any, ...]:
        return CellStore.open, (self.uri,)

    def __len__(self) -> int:
        return self.manifest.rows

    def __repr__(self) -> str:
        images = f"images of {self.spec.shape}" if self.manifest.images else "no images"
        return f"CellStore({self.uri!r}: {len(self):,} cells, {self.manifest.genes:,} genes, {images})"

    @property
    def content_hash(self) -> str:
        """sha256 of the content alone."""
        return self.manifest.content_hash

    @property
    def simulated(self) -> bool:
        """Whether any cell comes from a simulator."""
        return self.manifest.simulated

    @property
    def spec(self) -> CropSpec:
        """Channels, height, width, dtype of the images.

        Raises:
            DataError: where the cells have none.
        """
        return self._images().spec

    @functools.cached_property
    def crops(self) -> CropStore:
        """The images: a crop store in the same row order, with the same row groups.

        Raises:
            DataError: where the cells have none, or it is not the crop store that was published with them.
        """
        published = self._images().content_hash
        crops = CropStore.open(storage.join(self.uri, form.CROPS))
        same = crops.content_hash == published
        if not same or not np.array_equal(crops.rows_per_group, self.rows_per_group):
            raise DataError(crops.uri, "not the crop store that was published with these cells", _REMEDY)
        return crops

    @property
    def columns(self) -> list[str]:
        """Names of all columns that `read_row_group` knows: those of the cells, then of their crops, `image` last."""
        own = ["cell_id", *self.manifest.columns]
        return own + ([name for name in self.crops.columns if name not in own] if self.manifest.images else [])

    @functools.cached_property
    def rows_per_group(self) -> np.ndarray:
        """Rows of each row group: int64 (G,)."""
        return np.array([part.rows for part in self.manifest.parts], np.int64)

    @functools.cached_property
    def group_starts(self) -> np.ndarray:
        """The first row of each row group, and at the end the number of rows: int64 (G + 1,)."""
        return np.concatenate([[0], np.cumsum(self.rows_per_group)])

    @property
    def row_groups(self) -> tuple[Part, ...]:
        """The expression of every row group in order."""
        return self.manifest.parts

    @functools.cached_property
    def genes(self) -> pa.Table:
        """`gene_id` and `symbol` ("" where unknown), one row a gene, in the order of the columns of `counts`."""
        return self._table(form.GENES, self.manifest.genes_file)

    @functools.cached_property
    def _cells(self) -> pa.Table:
        return self._table(form.CELLS, self.manifest.cells_file)

    def obs(self, columns: Sequence[str] | None = None, rows: np.ndarray | None = None) -> pa.Table:
        """What is known of the cells: `columns` (default: `cell_id` and all that `manifest.columns` names) of row
        numbers `rows`, in that order, or of all rows.

        Raises:
            KeyError: for a column that the store does not have.
            IndexError: for a row that it does not have.
        """
        known = self._cells.column_names
        if unknown := [name for name in columns or () if name not in known]:
            raise KeyError(f"{self.uri} has no column {', '.join(unknown)}; it has {', '.join(known)}")
        table = self._cells if columns is None else self._cells.select(list(columns))
        return table if rows is None else table.take(self._located(rows)[0])

    def columns_of(self, gene_ids: Sequence[str]) -> np.ndarray:
        """The columns of `counts` that hold `gene_ids`, in their order: int64 (len(gene_ids),).

        Raises:
            DataError: naming the genes that the store does not have.
        """
        place = {gene: column for column, gene in enumerate(self.genes["gene_id"].to_pylist())}
        if missing := [gene for gene in gene_ids if gene not in place]:
            shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
            problem = f"{len(missing)} of {len(gene_ids)} genes are not in this store: {shown}"
            raise DataError(self.uri, problem, "the same gene ids (Ensembl, symbols) and species?")
        return np.array([place[gene] for gene in gene_ids], np.int64)

    def counts(self, rows: np.ndarray | None = None) -> csr_matrix:
        """The expression of row numbers `rows`, in that order, or of all rows: CSR (N, genes), int32; of a `soft` store
        float32. Genes of a cell are ascending. Each part that holds one of the rows is read once.

        Raises:
            DataError: naming the part that is missing or damaged.
            IndexError: for a row that the store does not have.
        """
        from scipy.sparse import csr_matrix, vstack

        if rows is None:
            return self._all_counts()
        rows, groups = self._located(rows)
        if not len(rows):
            return csr_matrix((0, self.manifest.genes), dtype=self._dtype)
        found = []
        for group in np.unique(groups):
            found.append(self.read_counts(int(group))[rows[groups == group] - self.group_starts[group]])
        stacked = vstack(found, format="csr")
        order = np.argsort(groups, kind="stable")
        return stacked if (np.diff(order) == 1).all() else stacked[np.argsort(order)]

    def read_counts(self, group: int) -> csr_matrix:
        """The expression of row group `group`, its stored bytes checked first: CSR as of `counts`.

        Raises:
            DataError: naming the part, where it is missing, or its bytes do not match the manifest.
        """
        from scipy.sparse import csr_matrix

        part = self.manifest.parts[group]
        rows = self.read_part(group)
        genes, values = (rows[name].combine_chunks() for name in ("genes", "values"))
        matrix = csr_matrix(
            (values.values.to_numpy(), genes.values.to_numpy(), genes.offsets.to_numpy()),
            shape=(part.rows, self.manifest.genes),
        )
        matrix.has_sorted_indices = matrix.has_canonical_format = True
        return matrix

    def read_row_group(self, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Row group `index` with `columns` (all by default) of the cells and of their crops.

        Raises:
            DataError: as `CropStore.read_row_group`.
            KeyError: for a column that the store does not have.
        """
        wanted = list(self.columns if columns is None else columns)
        cells = self._cells.slice(int(self.group_starts[index]), int(self.rows_per_group[index]))
        theirs = [name for name in wanted if name not in cells.column_names]
        if unknown := [name for name in theirs if name not in self.columns]:
            raise KeyError(f"{self.uri} has no column {', '.join(unknown)}; it has {', '.join(self.columns)}")
        crops = self.crops.read_row_group(index, theirs) if theirs else None
        return pa.table({name: cells[name] if name in cells.column_names else crops[name] for name in wanted})

    def to_anndata(self, rows: np.ndarray | None = None) -> anndata.AnnData:
        """The cells of row numbers `rows`, or all, as AnnData: X as of `counts`, obs by cell id, var by gene id.

        Text columns become categories. `uns["cosmic_ray"]` says which store it was, and whether it is simulated. The
        images stay in `crops`; `crops.crops(rows)` has them in this order.
        """
        import anndata
        import pandas as pd

        obs = self.obs(rows=rows)
        frame = pd.DataFrame({name: _series(obs[name]) for name in obs.column_names[1:]})
        frame.index = pd.Index(obs["cell_id"].to_pylist(), dtype=object)
        var = pd.DataFrame({"symbol": self.genes["symbol"].to_pylist()}, index=self.genes["gene_id"].to_pylist())
        uns = {"uri": self.uri, "content_hash": self.content_hash, "values": self.manifest.values}
        about = {**uns, "simulated": self.simulated}
        return anndata.AnnData(self.counts(rows), obs=frame, var=var, uns={"cosmic_ray": about})

    def _all_counts(self) -> csr_matrix:
        """Part by part into place, so that it is in memory once: 8 bytes a nonzero."""
        from scipy.sparse import csr_matrix

        total = sum(part.nonzeros for part in self.row_groups)
        wide = np.int32 if total < 2**31 else np.int64
        data, genes = np.empty(total, self._dtype), np.empty(total, wide)
        ends = np.zeros(len(self) + 1, wide)
        done = 0
        for group, first in enumerate(self.group_starts[:-1]):
            part = self.read_counts(group)
            data[done : done + part.nnz], genes[done : done + part.nnz] = part.data, part.indices
            ends[first + 1 : first + 1 + part.shape[0]] = part.indptr[1:].astype(wide) + done
            done += part.nnz
        matrix = csr_matrix((data, genes, ends), shape=(len(self), self.manifest.genes))
        matrix.has_sorted_indices = matrix.has_canonical_format = True
        return matrix

    def _images(self) -> form.Images:
        if self.manifest.images is None:
            raise DataError(self.uri, "these cells have no images", "build the cells with `images`")
        return self.manifest.images

    @property
    def _dtype(self) -> type:
        return np.int32 if self.manifest.values == "raw" else np.float32

    def _located(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`rows` as int64, and the row group of each."""
        rows = np.asarray(rows, np.int64)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"rows {rows.min()}..{rows.max()} of a store with {len(self)}")
        return rows, np.searchsorted(self.group_starts, rows, side="right") - 1

    def read_part(self, group: int) -> pa.Table:
        """Row group `group` as it is stored: `cell_id`, `genes`, `values`. Raises as `read_counts`."""
        part = self.manifest.parts[group]
        uri = storage.join(self.uri, form.EXPRESSION, Part.name(group))
        table = _decoded(uri, part.nbytes, part.digest)
        if len(table) != part.rows or len(table["genes"].combine_chunks().values) != part.nonzeros:
            raise DamagedError(uri, f"does not hold {part.rows} cells with {part.nonzeros} values", _REMEDY)
        return table

    def _table(self, name: str, file: form.TableFile) -> pa.Table:
        return _decoded(storage.join(self.uri, name), file.nbytes, file.digest)


def open_store(uri: str) -> CropStore | CellStore:
    """The crop store or the cell store at `uri`.

    Raises:
        DataError: where there is neither, or as their `open`.
    """
    cells = read_manifest(storage.absolute(uri)).get("format") == form.FORMAT
    return CellStore.open(uri) if cells else CropStore.open(uri)


def _decoded(uri: str, nbytes: int, digest: str) -> pa.Table:
    data = storage.read_bytes(uri)
    if len(data) != nbytes or xxhash.xxh3_128_hexdigest(data) != digest:
        raise DamagedError(uri, "its bytes do not match the manifest's digest", _REMEDY)
    try:
        return pq.read_table(pa.BufferReader(data), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise DamagedError(uri, f"does not decode: {error}", _REMEDY) from None


def _series(column: pa.ChunkedArray) -> pd.Series:
    """Text as categories: there are few batches and many cells."""
    if pa.types.is_string(column.type):
        return column.combine_chunks().dictionary_encode().to_pandas()
    return column.to_pandas()
