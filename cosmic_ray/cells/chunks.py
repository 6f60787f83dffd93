"""Step one: cells in the order of their files, checked and put aside in buckets of the order that the store will have.

`scratch/<chunk>.json` says what became of the cells of a chunk; `scratch/<chunk>-bucket-0003.parquet` holds those of
its cells that stay and lie in the fourth of the store's buckets: ranges of the order key, about a shard each. So each
bucket is read again once or twice, and nothing is held but a chunk.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cosmic_ray import output, storage
from cosmic_ray.cells.h5ad import H5ad, unusable
from cosmic_ray.cells.images import Source
from cosmic_ray.cells.join import Fault, Joined
from cosmic_ray.errors import NotFoundError
from cosmic_ray.stores.cells_form import Values

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from cosmic_ray.cells.job import CellQuality

SCRATCH = "scratch"
NO_IMAGES = f"{0:064x}"


class Span(NamedTuple):
    """Cells that are read together."""

    file: int
    """Index of the file."""
    start: int
    """First cell in the file."""
    stop: int
    first: int
    """Row of the first in `Joined.obs`."""

    @property
    def name(self) -> str:
        """Of its files in `scratch/`."""
        return f"chunk-{self.first:09}-{self.first + self.stop - self.start:09}"


def spans(sizes: Sequence[int], chunk_cells: int) -> list[Span]:
    """All cells of files with so many, `chunk_cells` at a time."""
    found, before = [], 0
    for file, size in enumerate(sizes):
        for start in range(0, size, chunk_cells):
            found.append(Span(file, start, min(start + chunk_cells, size), before + start))
        before += size
    return found


@dataclass
class Genes:
    """The genes of all files, in the order of the first."""

    ids: list[str]
    symbols: list[str]
    mitochondrial: np.ndarray
    """bool (genes,)."""
    orders: list[np.ndarray]
    """For each file: where each gene stands there, int64 (genes,)."""


@dataclass
class Reader:
    """Reads chunks: what is the same for all of them."""

    files: Sequence[H5ad]
    genes: Genes
    joined: Joined
    images: Source | None
    values: Values
    quality: CellQuality
    buckets: int

    def read(self, span: Span) -> tuple[dict[str, Any], pa.Table]:
        """One chunk: what became of its cells (JSON-serialisable), and those that stay, in the order of the store."""
        counts = self._counts(span)
        rows = np.arange(span.first, span.first + counts.shape[0])
        ids = self.joined.ids[span.first : span.first + len(rows)]
        faults: dict[int, Fault] = {}
        bad = unusable(counts, self.values, self.files[span.file].uri, ids, self.genes.ids)
        faults |= {
            int(rows[index]): fault for index, fault in bad.items() if int(rows[index]) not in self.joined.faults
        }
        good = np.array([int(row) not in self.joined.faults and int(row) not in faults for row in rows], bool)
        measured = _measured(counts, self.genes.mitochondrial)
        low = self._low(measured, good)
        kept = np.array([index for index in np.flatnonzero(good) if index not in low], np.int64)
        columns: dict[str, Any] = {}
        digest = NO_IMAGES
        if self.images is not None and self.images.late:
            columns["crop_row"] = pa.array([self.joined.where[row] for row in rows[kept]], pa.int64())
        elif self.images is not None:
            found = self.images.read([ids[i] for i in kept], [self.joined.where[row] for row in rows[kept]])
            faults |= {int(rows[i]): found.faults[ids[i]] for i in kept if ids[i] in found.faults}
            kept = np.array([i for i in kept if ids[i] not in found.faults], np.int64)
            columns |= {name: found.rows[name] for name in found.rows.column_names if name != "crop_id"}
            digest = found.digest
        about = {
            "faults": [[row, *fault] for row, fault in sorted(faults.items())],
            "low": [[int(rows[index]), *fault] for index, fault in sorted(low.items())],
            "rows": rows[kept].tolist(),
            **{name: _plain(values[kept]) for name, values in measured.items()},
            "gene_cells": np.bincount(counts[kept].indices, minlength=len(self.genes.ids)).tolist(),
            "images": digest,
        }
        return about, self._table(rows[kept], [ids[i] for i in kept], counts[kept], columns)

    def _counts(self, span: Span) -> csr_matrix:
        """The values of a chunk, genes in our order, without stored zeros."""
        counts = self.files[span.file].rows(span.start, span.stop)
        order = self.genes.orders[span.file]
        if not np.array_equal(order, np.arange(len(order))):
            counts = counts[:, order]
        counts.sum_duplicates()
        counts.eliminate_zeros()
        return counts

    def _low(self, measured: dict[str, np.ndarray], good: np.ndarray) -> dict[int, Fault]:
        """Cells of too little quality: index in the chunk -> why."""
        quality, low = self.quality, {}
        for index in np.flatnonzero(good & (measured["q_genes"] < quality.min_genes)):
            low[int(index)] = ("few genes", f"{measured['q_genes'][index]} genes, fewer than {quality.min_genes}")
        if quality.max_mito_share is not None:
            for index in np.flatnonzero(good & (measured["q_mito_share"] > quality.max_mito_share)):
                low.setdefault(int(index), ("mitochondrial", f"{measured['q_mito_share'][index]:.3f} of its counts"))
        return low

    def _table(self, rows: np.ndarray, ids: list[str], counts: csr_matrix, columns: dict[str, Any]) -> pa.Table:
        offsets = pa.array(counts.indptr.astype(np.int32))
        dtype = np.int32 if self.values == "raw" else np.float32
        lists = {"genes": counts.indices.astype(np.int32), "values": counts.data.astype(dtype)}
        known = {"cell_id": pa.array(ids, pa.string()), "order": pa.array(self.joined.order[rows])}
        known |= {name: pa.ListArray.from_arrays(offsets, pa.array(part)) for name, part in lists.items()}
        return pa.table({**known, **columns})


def _measured(counts: csr_matrix, mitochondrial: np.ndarray) -> dict[str, np.ndarray]:
    """`annotations.COUNTED` of each cell; NaN is the share of a cell without counts."""
    exact = counts.astype(np.float64)
    total = np.asarray(exact.sum(axis=1)).ravel()
    with np.errstate(invalid="ignore"):
        share = np.asarray(exact[:, mitochondrial].sum(axis=1)).ravel() / total
    return {"q_counts": total, "q_genes": np.diff(counts.indptr).astype(np.int64), "q_mito_share": share}


def _plain(values: np.ndarray) -> list[Any]:
    return [None if value != value else value for value in values.tolist()]


def bucket_of(order: np.ndarray, buckets: int) -> np.ndarray:
    """The bucket of each order key: int64 (N,), 0..buckets-1, ascending with the key."""
    return ((order >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32)).astype(np.int64)


def write_chunk(
    target: output.Output, span: Span, about: dict[str, Any], cells: pa.Table, buckets: int
) -> dict[str, Any]:
    """Put a chunk aside: its cells by bucket first, then what became of them, as `finished_chunk` returns it."""
    bucket = bucket_of(cells["order"].to_numpy(), buckets)
    filled = np.unique(bucket).tolist()
    for number in filled:
        sink = io.BytesIO()
        pq.write_table(cells.filter(pa.array(bucket == number)), sink, compression="lz4", use_dictionary=False)
        target.write(f"{SCRATCH}/{span.name}-bucket-{number:04}.parquet", sink.getvalue())
    about = {**about, "buckets": filled}
    target.write(f"{SCRATCH}/{span.name}.json", output.encode(about))
    return about


def finished_chunk(target: output.Output, span: Span) -> dict[str, Any] | None:
    """What became of the cells of a chunk, where an earlier run has put it aside."""
    try:
        return storage.read_json(target.at(SCRATCH, f"{span.name}.json"))
    except NotFoundError:
        return None


def read_bucket(
    target: output.Output, number: int, chunks: Sequence[tuple[Span, dict[str, Any]]]
) -> Iterator[pa.Table]:
    """The cells of one bucket, chunk by chunk."""
    for span, about in chunks:
        if number in about["buckets"]:
            data = storage.read_bytes(target.at(SCRATCH, f"{span.name}-bucket-{number:04}.parquet"))
            yield pq.read_table(pa.BufferReader(data), use_threads=False)
