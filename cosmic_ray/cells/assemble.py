"""Step two: the row groups of the store, each from the buckets that hold its cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cosmic_ray.cells.chunks import Span, bucket_of, read_bucket
from cosmic_ray.cells.images import Source
from cosmic_ray.output import Output
from cosmic_ray.stores import cells_form as form
from cosmic_ray.stores.cells_form import KNOWN, Part
from cosmic_ray.stores.cells_writer import finished_part, write_part
from cosmic_ray.stores.manifest import ShardEntry
from cosmic_ray.stores.writer import COMPRESSION, encode_shard, finished_shard, write_shard

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from cosmic_ray.cells.job import BuildCells

_OWN = ("cell_id", "order", "genes", "values", "crop_row")


@dataclass
class Assembly:
    """What all shards are made from."""

    job: BuildCells
    target: Output
    chunks: Sequence[tuple[Span, dict[str, Any]]]
    images: Source | None
    cells: pa.Table
    """Those that stay, in stored order: `cells.parquet`."""
    order: np.ndarray
    """uint64 (N,): their order keys, ascending."""
    genes: np.ndarray
    """bool (genes,): which stay."""
    buckets: int

    def shard(self, index: int, first: int, last: int) -> tuple[list[Part], ShardEntry | None]:
        """Write rows `first`..`last`-1: their expression, and their images as shard `index` of the crops. What an
        earlier run has finished is left as it is.
        """
        size = self.job.rows_per_group
        groups = range(first // size, -(-last // size))
        crops = self.target.at(form.CROPS)
        parts = [finished_part(self.target.uri, group) for group in groups]
        entry = finished_shard(crops, index) if self.images else None
        if all(parts) and (entry or not self.images):
            return parts, entry
        rows = self._rows(first, last)
        counts = _matrix(rows, len(self.genes))[:, self.genes]
        ids = rows["cell_id"].to_pylist()
        for place, group in enumerate(groups):
            if parts[place] is None:
                self.target.require()
                here = slice(group * size - first, min(last, (group + 1) * size) - first)
                values = self.job.expression.values
                parts[place] = write_part(self.target.uri, group, ids[here], counts[here], values)
        if self.images and entry is None:
            self.target.require()
            encoded = encode_shard(self._crops(rows, first, last), self.images.spec, size, COMPRESSION)
            entry = write_shard(crops, index, encoded)
        return parts, entry

    def _rows(self, first: int, last: int) -> pa.Table:
        bucket = bucket_of(self.order, self.buckets)
        low, high = int(bucket[first]), int(bucket[last - 1])
        found = [part for number in range(low, high + 1) for part in read_bucket(self.target, number, self.chunks)]
        rows = pa.concat_tables(found)
        by_key = np.lexsort((np.array(rows["cell_id"].to_pylist()), rows["order"].to_numpy()))
        before = int(np.searchsorted(bucket, low))
        rows = rows.take(by_key[first - before : last - before])
        if rows["cell_id"].to_pylist() != self.cells["cell_id"][first:last].to_pylist():
            raise RuntimeError("the buckets do not hold the cells that were counted")
        return rows

    def _crops(self, rows: pa.Table, first: int, last: int) -> pa.Table:
        """Rows of the crop store: what is known of the cells beside what is known of the crops."""
        ids = rows["cell_id"]
        if self.images.late:
            crops = self.images.read(ids.to_pylist(), rows["crop_row"].to_numpy()).rows
        else:
            crops = rows.drop_columns([name for name in _OWN if name in rows.column_names])
        known = {name: self.cells[name].slice(first, last - first) for name in KNOWN}
        kept = [name for name in crops.column_names if name not in (*KNOWN, "crop_id")]
        return pa.table({"crop_id": ids, **{name: crops[name] for name in kept}, **known})


def _matrix(rows: pa.Table, genes: int) -> csr_matrix:
    from scipy.sparse import csr_matrix

    lists = [rows[name].combine_chunks() for name in ("values", "genes")]
    data, indices = (array.flatten().to_numpy() for array in lists)
    lengths = lists[0].value_lengths().to_numpy()
    return csr_matrix((data, indices, np.concatenate([[0], np.cumsum(lengths)])), shape=(len(rows), genes))
