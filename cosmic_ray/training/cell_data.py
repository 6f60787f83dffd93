"""From a cell store to the loop: a rank's cells as images, as rows of tables (latents, features) and as counts.

Images come from the crop stream. Tables lie in memory or are mapped from disk, one row a cell, in the store's order.
Counts are decoded a row group at a time, just before its window opens, and dropped when the window closes: every row
group is read once an epoch, and memory holds the sparse rows of the open windows and one dense batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from cosmic_ray.errors import DataError
from cosmic_ray.ingest.plan import Plan, WindowRead
from cosmic_ray.stores.cells import CellStore
from cosmic_ray.training.data import PlannedData, Stream

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


class CellData(PlannedData):
    """The cells of a cell store. Of each share, `tensors` holds

    `images`: uint8 (n, C, H, W), with a stream; each table's rows by its name, floating (n, ...); `counts`: float32
    (n, genes), dense, as they are stored, where `expression` is asked for.
    """

    def __init__(
        self,
        store: CellStore,
        plan: Plan,
        held_out: np.ndarray,
        stream: Stream | None = None,
        tables: Mapping[str, np.ndarray] | None = None,
        expression: bool = False,
        rank: int = 0,
        world: int = 1,
        at_once: int | None = None,
    ):
        """As `PlannedData`; `plan` is one of `order_hash(store, images)`.

        Args:
            stream: reads the images; None where they are not needed.
            tables: floating (N, ...) by name, row i of cell i of the store; a mapped file is read by row.

        Raises:
            DataError: for a plan of another store, or a table that does not have one row a cell.
            JobError: as `PlannedData`.
        """
        super().__init__(plan, held_out, rank, world, at_once)
        self._store, self._stream, self._expression = store, stream, expression
        self._tables = dict(tables or {})
        if plan.spec.store_hash != order_hash(store, stream is not None):
            raise DataError(store.uri, f"the plan is of another store, {plan.spec.store_hash[:16]}")
        for name, table in self._tables.items():
            if len(table) != len(store) or not np.issubdtype(table.dtype, np.floating):
                problem = f"{name} must be floating with a row for each of {len(store):,} cells"
                raise DataError(store.uri, f"{problem}, not {table.dtype} {table.shape}")

    def crop_ids(self, step: int) -> list[str]:
        """The ids of this rank's cells of global batch `step`, in order."""
        return self._ids(self._rows(step))

    def _steps(self, first_step: int, steps: int) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        with closing(OpenCounts(self._store, self._plan, self._lanes, first_step, steps)) as counts:
            for step, tensors in self._images(first_step, steps):
                tensors |= self._looked_up(self._rows(step))
                if self._expression:
                    tensors["counts"] = torch.from_numpy(counts.of(step))
                yield step, tensors

    def _images(self, first_step: int, steps: int) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        if self._stream is None:
            yield from ((step, {}) for step in range(first_step, steps))
            return
        for batch in self._stream(self._store.crops.uri, self._plan, self._rank, self._world, first_step, steps):
            yield batch.step, {"images": batch.images}

    def _held_out(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        tensors = self._looked_up(self._held_out_rows[start:stop])
        if self._stream is not None:
            tensors["images"] = self._held_out_images[start:stop]
        if self._expression:
            tensors["counts"] = torch.from_numpy(dense(self._held_out_counts[start:stop]))
        return tensors

    def _looked_up(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """The rows of every table.

        Raises:
            DataError: naming the cells whose row is not finite.
        """
        found = {}
        for name, table in self._tables.items():
            values = np.ascontiguousarray(table[rows])
            finite = np.isfinite(values).reshape(len(rows), -1).all(1)
            if not finite.all():
                ids = self._ids(rows[~finite])
                shown = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
                raise DataError(self._store.uri, f"{name} of {len(ids)} cells is not finite: {shown}")
            found[name] = torch.from_numpy(values)
        return found

    def _rows(self, step: int) -> np.ndarray:
        samples = self._plan.rank_step(step, self._lanes)
        return self._store.group_starts[samples.row_group] + samples.row

    def _ids(self, rows: np.ndarray) -> list[str]:
        return self._store.obs(["cell_id"], rows)["cell_id"].to_pylist()

    @cached_property
    def _held_out_images(self) -> torch.Tensor:
        return torch.from_numpy(self._store.crops.crops(self._held_out_rows))

    @cached_property
    def _held_out_counts(self) -> csr_matrix:
        return self._store.counts(self._held_out_rows)


def order_hash(store: CellStore, images: bool) -> str:
    """The content hash that a plan of the store's cells names: of its crops where `images` are streamed."""
    return store.crops.content_hash if images else store.content_hash


def dense(counts: csr_matrix) -> np.ndarray:
    """Float32 (N, genes)."""
    return counts.astype(np.float32).toarray()


class _Opened(NamedTuple):
    parts: dict[int, Future[csr_matrix]]
    """By row group."""
    last_step: int


class OpenCounts:
    """The expression of the row groups in the open windows of some lanes; a thread decodes one step ahead."""

    def __init__(self, store: CellStore, plan: Plan, lanes: range, first_step: int, last_step: int):
        """For the global batches `first_step` .. `last_step`-1, in this order."""
        self._store, self._plan, self._lanes = store, plan, lanes
        self._reads = plan.reads(lanes, first_step, last_step)
        self._coming = next(self._reads, None)
        self._open: dict[tuple[int, int, int], _Opened] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="expression")

    @property
    def open_groups(self) -> int:
        """Row groups that are held, or being read."""
        return sum(len(opened.parts) for opened in self._open.values())

    def of(self, step: int) -> np.ndarray:
        """Float32 (n, genes): the counts of what the lanes give to global batch `step`.

        Raises:
            DataError: naming the part that cannot be read.
        """
        while (read := self._coming) and read.first_step <= step + 1:
            self._start(read)
            self._coming = next(self._reads, None)
        pieces = self._plan.pieces(step, self._lanes)
        found = np.zeros((sum(p.stop - p.start for p in pieces), self._store.manifest.genes), np.float32)
        at = 0
        for lane, epoch, window, start, stop in pieces:
            groups, rows = self._plan.window_rows(lane, epoch, window)[:, start:stop]
            parts = self._open[lane, epoch, window].parts
            for group in np.unique(groups).tolist():
                places = np.flatnonzero(groups == group)
                found[at + places] = dense(parts[group].result()[rows[places]])
            at += stop - start
        for key in [key for key, opened in self._open.items() if opened.last_step <= step]:
            del self._open[key]
        return found

    def close(self) -> None:
        """Read no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _start(self, read: WindowRead) -> None:
        parts = {group: self._pool.submit(self._store.read_counts, group) for group in read.row_groups}
        self._open[read.lane, read.epoch, read.window] = _Opened(parts, read.last_step)
