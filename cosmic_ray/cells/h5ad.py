"""AnnData files read row by row: h5ad from any storage, the counts in pieces and checked."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from cosmic_ray import storage
from cosmic_ray.errors import DataError, JobError

if TYPE_CHECKING:
    import h5py
    import pandas as pd
    from scipy.sparse import csr_matrix

    from cosmic_ray.cells.job import Expression

_LIMIT = 2.0**31


def sha256(file: BinaryIO) -> str:
    """Of all of a file."""
    return hashlib.file_digest(file, "sha256").hexdigest()


def find(expression: Expression) -> list[str]:
    """URIs of the h5ad files, sorted.

    Raises:
        JobError: where there is none.
    """
    uri = storage.absolute(expression.uri)
    if uri.endswith(".h5ad"):
        return [uri]
    found = storage.listing(uri, expression.pattern)
    if not found:
        raise JobError("expression.uri", expression.uri, f"no file there matches {expression.pattern!r}")
    return found


@dataclass
class H5ad:
    """An open h5ad file."""

    uri: str
    sha256: str
    """Of the file."""
    obs: pd.DataFrame
    var: pd.DataFrame
    """That of the counts: of `raw` where these are AnnData's `raw`."""
    simulated: bool
    """What `uns["simulated"]` says; False where it says nothing."""
    _counts: h5py.Dataset | h5py.Group
    _what: str

    @classmethod
    @contextmanager
    def open(cls, uri: str, expression: Expression) -> Iterator[H5ad]:
        """Open the file at `uri` for the block.

        Raises:
            DataError: where it is no AnnData, or lacks the layer that `expression.counts` names.
        """
        import h5py
        from anndata.io import read_elem

        with storage.local_file(uri) as path:
            try:
                with open(path, "rb") as raw:
                    digest = sha256(raw)
                file = h5py.File(path, "r")
            except OSError as error:
                raise DataError(uri, f"not an HDF5 file, or a damaged one: {error}", "write it again") from None
            with file:
                at = _place(uri, file, expression.counts)
                try:
                    var = read_elem(file["raw/var" if expression.counts == "raw" else "var"])
                    obs = read_elem(file["obs"])
                    simulated = bool(read_elem(file["uns/simulated"])) if "uns/simulated" in file else False
                except (KeyError, OSError, ValueError, TypeError) as error:
                    raise DataError(uri, f"not an AnnData file: {error}", "write it with anndata") from None
                opened = cls(uri, digest, obs, var, simulated, file[at], at)
                opened._check_form()
                yield opened

    def __len__(self) -> int:
        return len(self.obs)

    def rows(self, start: int, stop: int) -> csr_matrix:
        """The values of cells `start`..`stop`-1 as they are stored: CSR (stop - start, genes).

        Raises:
            DataError: where they do not decode.
        """
        from anndata.io import sparse_dataset
        from scipy.sparse import csr_matrix

        try:
            if hasattr(self._counts, "keys"):
                return csr_matrix(sparse_dataset(self._counts)[start:stop])
            return csr_matrix(self._counts[start:stop])
        except (OSError, ValueError, IndexError) as error:
            raise DataError(self.uri, f"{self._what}: cells {start}..{stop} do not decode: {error}") from None

    def _check_form(self) -> None:
        encoding = self._counts.attrs.get("encoding-type", "array")
        if encoding == "csc_matrix":
            remedy = "save it by rows: adata.X = adata.X.tocsr()"
            raise DataError(self.uri, f"{self._what} is stored by genes (CSC), and is read by cells", remedy)
        if encoding not in ("csr_matrix", "array"):
            raise DataError(self.uri, f"{self._what} is a {encoding}, neither a dense nor a CSR matrix")
        sparse = encoding == "csr_matrix"
        shape = tuple(self._counts.attrs["shape"] if sparse else self._counts.shape)
        dtype = self._counts["data"].dtype if sparse else self._counts.dtype
        if shape != (len(self.obs), len(self.var)):
            raise DataError(self.uri, f"{self._what} is {shape}, not {len(self.obs)} cells x {len(self.var)} genes")
        if dtype.kind not in "iuf" or dtype == np.float16:
            raise DataError(self.uri, f"{self._what} holds {dtype}", "integers, float32 and float64 are read")


def _place(uri: str, file: h5py.File, counts: str) -> str:
    at = {"X": "X", "raw": "raw/X"}.get(counts, f"layers/{counts}")
    if at not in file:
        layers = list(file["layers"]) if "layers" in file else []
        known = [name for name, path in (("X", "X"), ("raw", "raw/X")) if path in file] + layers
        raise DataError(uri, f"no counts {counts!r}", f"expression.counts is one of {', '.join(known)}")
    return at


def ids_of(frame: pd.DataFrame, column: str | None, uri: str, key: str) -> list[str]:
    """The ids in `column` of obs or var, or its index: text, "" where there is none.

    Raises:
        DataError: where there is no such column.
    """
    if column is None:
        return [str(name) for name in frame.index]
    require_column(frame, column, uri, key)
    values = frame[column]
    return ["" if missing else str(value) for value, missing in zip(values, values.isna(), strict=True)]


def require_column(frame: pd.DataFrame, column: str, uri: str, key: str) -> None:
    """Raises DataError, naming the key of the job and the columns that there are, where `frame` lacks `column`."""
    if column not in frame.columns:
        known = ", ".join(map(str, frame.columns)) or "none"
        raise DataError(uri, f"no column {column!r}", f"see {key}; columns there: {known}")


def gene_order(genes: list[str], here: list[str], uri: str, first: str) -> np.ndarray:
    """Where each of `genes` stands in `here`, the genes of another file: int64 (genes,).

    Raises:
        DataError: naming the genes that one has and the other lacks.
    """
    place = {gene: index for index, gene in enumerate(here)}
    if missing := [gene for gene in genes if gene not in place]:
        raise DataError(uri, f"lacks {len(missing)} genes of {first}: {', '.join(missing[:5])}")
    if extra := set(here) - set(genes):
        raise DataError(uri, f"has {len(extra)} genes that {first} lacks: {', '.join(sorted(extra)[:5])}")
    return np.array([place[gene] for gene in genes], np.int64)


def require_unique_genes(genes: list[str], uri: str) -> None:
    """Raises DataError where a gene id is empty or stands twice."""
    seen, twice = set(), {}
    for gene in genes:
        if gene in seen:
            twice[gene] = None
        seen.add(gene)
    if twice or "" in seen:
        what = f"{len(twice)} gene ids stand twice: {', '.join(list(twice)[:5])}" if twice else "a gene id is empty"
        raise DataError(uri, what, "use unique ids (Ensembl), and name their column in expression.gene_id")


def mitochondrial(genes: list[str], symbols: list[str], pattern: str) -> np.ndarray:
    """Which genes are mitochondrial: bool (genes,)."""
    found = re.compile(pattern)
    return np.array([bool(found.search(symbol or gene)) for gene, symbol in zip(genes, symbols, strict=True)], bool)


def unusable(values: csr_matrix, kind: str, at: str, cells: list[str], genes: list[str]) -> dict[int, tuple[str, str]]:
    """Cells whose values cannot be: row -> (reason, detail). NaN and infinity, negative, too large.

    Raises:
        DataError: of `raw` values, where one is no whole number: then none of them are counts.
    """
    data = values.data
    bad = {
        "not finite": ~np.isfinite(data),
        "negative": data < 0,
        "too large": data >= (_LIMIT if kind == "raw" else np.finfo(np.float32).max),
    }
    row_of = np.repeat(np.arange(values.shape[0]), np.diff(values.indptr))
    found: dict[int, tuple[str, str]] = {}
    for reason, where in bad.items():
        for row, first in zip(*np.unique(row_of[where], return_index=True), strict=True):
            place = np.flatnonzero(where)[first]
            found.setdefault(int(row), (f"{reason} values", f"{genes[values.indices[place]]}: {data[place]}"))
    if kind == "raw" and data.dtype.kind == "f":
        usable = np.isfinite(data)
        fraction = usable.copy()
        fraction[usable] = data[usable] != np.rint(data[usable])
        if fraction.any():
            place = int(fraction.argmax())
            cell, gene = cells[row_of[place]], genes[values.indices[place]]
            problem = f"not raw counts: {fraction.mean():.0%} of the values read are no whole numbers"
            remedy = "name the raw counts in expression.counts, or say expression.values=soft"
            raise DataError(at, f"{problem}, such as {data[place]} for {gene} in cell {cell!r}", remedy)
    return found
