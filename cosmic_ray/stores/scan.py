"""One pass over a store for `split`: grouping columns, and what tells near-duplicates.

Measured per million crops: 60 CPU-s (mostly the textures of images), 0.1 GB of memory for near-duplicates and 0.05 GB
for each grouping column, 64 MB in a temporary file. So 21.8 M crops take 3 GB and 25 CPU-minutes, reading aside.
"""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from cosmic_ray.progress import progress
from cosmic_ray.stores.cells import CellStore
from cosmic_ray.stores.columns import images
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.duplicates import BITS, Fingerprints, exact_pairs, fingerprints, similar
from cosmic_ray.stores.groups import Column
from cosmic_ray.stores.layouts import same_layouts
from cosmic_ray.stores.manifest import FIELD

_NAMED = 20


class Scan:
    """What one pass over `store` kept.

    Args:
        by: grouping keys, as `Column` takes them.
        crops: least correlation of similar crops, or None to leave images unread.
        fields: least share of coinciding nuclei of similar fields, or None.
        also: a further column to keep, as `by` names them.
    """

    def __init__(
        self,
        store: CropStore | CellStore,
        by: list[str],
        crops: float | None,
        fields: float | None,
        also: str | None = None,
    ):
        self.store = store
        self.columns = [Column(key) for key in by]
        self._crops, self._fields = crops, fields
        self.also = Column(also) if also else None
        self._field = Column(FIELD)
        self._kept = [*self.columns, *([self.also] if self.also else []), *([self._field] if fields else [])]
        self._places: list[np.ndarray] = []
        self._exact = np.zeros(len(store), np.uint64)
        self._area = np.zeros(len(store), np.int32)
        self._read()

    def _read(self) -> None:
        places = ("centroid_y", "centroid_x") if self._fields else ()
        names = {*places, *(name for column in self._kept for name in column.reads)}
        wanted = [*sorted(names), *(["image"] if self._crops is not None else [])]
        with tempfile.TemporaryFile() as file, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            self._bits = np.memmap(file, np.uint8, "w+", shape=(len(self.store), BITS // 8))
            with progress("split: read", len(self.store), "crops") as bar:
                for group, (rows, prints) in enumerate(
                    _ahead(pool, self._row_group, wanted, len(self.store.row_groups))
                ):
                    self._keep(group, rows, prints)
                    bar.update(int(self.store.group_starts[group + 1]))

    def _row_group(self, group: int, wanted: list[str]) -> tuple[pa.Table, Fingerprints | None]:
        rows = self.store.read_row_group(group, wanted)
        if "image" not in wanted:
            return rows, None
        return rows.drop_columns(["image"]), fingerprints(images(rows, self.store.spec))

    def _keep(self, group: int, rows: pa.Table, prints: Fingerprints | None) -> None:
        for column in self._kept:
            column.add(rows)
        if self._fields:
            self._places.append(np.stack([rows["centroid_y"].to_numpy(), rows["centroid_x"].to_numpy()]))
        if prints is not None:
            here = slice(*self.store.group_starts[group : group + 2])
            self._exact[here], self._area[here], self._bits[here] = prints

    def near_duplicates(self) -> tuple[np.ndarray, dict[str, Any]]:
        """Row pairs int64 (P, 2) of near-duplicates, and how many there are of each kind."""
        none = np.empty((0, 2), np.int64)
        same = exact_pairs(self._exact) if self._crops is not None else none
        alike = none
        if self._crops is not None:
            crops = self.store if isinstance(self.store, CropStore) else self.store.crops
            alike = similar(crops, self._area, self._bits, self._crops)
        fields = (
            same_layouts(self._field.codes, *np.concatenate(self._places, axis=1), self._fields)
            if self._fields
            else none
        )
        names = list(self._field.values)
        found = {
            "identical_crops": len(same),
            "similar_crops": len(alike),
            "similar_fields": len(fields),
            "such_as": [[names[one], names[other]] for one, other in fields[:_NAMED]],
        }
        return np.concatenate([same, alike, self._rows_of(fields)]), found

    def _rows_of(self, fields: np.ndarray) -> np.ndarray:
        """Chains through all rows of each pair of fields."""
        if not len(fields):
            return np.empty((0, 2), np.int64)
        order = np.argsort(self._field.codes, kind="stable")
        ends = np.searchsorted(self._field.codes[order], np.arange(len(self._field.values) + 1))
        chains = [np.empty((0, 2), np.int64)]
        for pair in fields:
            rows = np.concatenate([order[ends[field] : ends[field + 1]] for field in pair])
            chains.append(np.stack([rows[:-1], rows[1:]], axis=1))
        return np.concatenate(chains)


def _ahead(pool: ThreadPoolExecutor, read: Any, wanted: list[str], count: int) -> Iterator[Any]:
    """Results of `read(0), read(1), ...` in order, a few of them under way."""
    waiting: deque[Future] = deque()
    for group in range(count):
        waiting.append(pool.submit(read, group, wanted))
        if len(waiting) > 16:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
