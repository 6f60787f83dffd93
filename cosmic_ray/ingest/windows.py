"""The open windows of some lanes: row groups read ahead in the order of need, their rows put into drawn order.

A row is copied twice: from its decoded row group to its place in the window, and from there, as part of a run, into
the batch. The memory of a used-up window serves the next ones, so that a long run touches no fresh page.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from cosmic_ray import storage
from cosmic_ray.errors import DataError
from cosmic_ray.ingest.plan import Plan, WindowRead
from cosmic_ray.stores.columns import images
from cosmic_ray.stores.crops import CropStore

AHEAD_BYTES = 64 * 2**20
LOCAL_THREADS, REMOTE_THREADS = 2, 8
_RUN = 32
_KEPT = 4


class _Window(NamedTuple):
    rows: np.ndarray
    """uint8 (room, bytes of a crop): the window's rows in drawn order; what is left of the room is unused."""
    parts: list[Future]
    last_step: int


class Windows:
    """Hands out the crops of one global batch after another.

    Memory: the open windows of these lanes (`plan.open_rows`) and the windows read ahead, `ahead_bytes` or one.
    """

    def __init__(
        self,
        store: CropStore,
        plan: Plan,
        lanes: range,
        first_step: int,
        last_step: int,
        ahead_bytes: int = AHEAD_BYTES,
        threads: int | None = None,
    ):
        """`threads` that read and decode; by default more of them where the store is far away.

        Raises DataError where `plan` was made for another store.
        """
        if plan.spec.store_hash != store.content_hash:
            problem = f"its content hash is {store.content_hash[:16]}, the plan's store has {plan.spec.store_hash[:16]}"
            raise DataError(store.uri, problem, "open the store that the plan was made for")
        self._store, self._plan, self._lanes = store, plan, lanes
        self._reads = plan.reads(lanes, first_step, last_step)
        self._coming = next(self._reads, None)
        self._open: dict[tuple[int, int, int], _Window] = {}
        self._ahead: deque[tuple[int, int]] = deque()
        self._ahead_rows, self._ahead_limit = 0, ahead_bytes // store.spec.nbytes
        self._room, self._free = plan.largest_window(lanes), []
        if threads is None:
            threads = LOCAL_THREADS if storage.is_local(store.uri) else REMOTE_THREADS
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="row-groups")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the store's crops."""
        return self._store.spec.shape

    def fill(self, k: int, out: np.ndarray) -> None:
        """Copy what the lanes give to global batch `k` to `out`, uint8 (rows, bytes of a crop). Steps ascend by one.

        Raises:
            DataError: naming the shard that cannot be read.
        """
        self._read_ahead(k)
        at = 0
        for lane, epoch, window, start, stop in self._plan.pieces(k, self._lanes):
            opened = self._open[lane, epoch, window]
            while opened.parts:
                opened.parts[-1].result()
                opened.parts.pop()
            out[at : at + stop - start] = opened.rows[start:stop]
            at += stop - start
        for key in [key for key, opened in self._open.items() if opened.last_step <= k]:
            self._free.append(self._open.pop(key).rows)
        # Between two epochs all lanes have two windows open; what that took is given back.
        del self._free[_KEPT:]

    def close(self) -> None:
        """Read no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _read_ahead(self, k: int) -> None:
        while self._ahead and self._ahead[0][0] <= k:
            self._ahead_rows -= self._ahead.popleft()[1]
        while (read := self._coming) and (read.first_step <= k or self._ahead_rows < self._ahead_limit):
            rows = self._plan.window_rows(read.lane, read.epoch, read.window)
            self._start(read, rows)
            if read.first_step > k:
                self._ahead.append((read.first_step, rows.shape[1]))
                self._ahead_rows += rows.shape[1]
            self._coming = next(self._reads, None)

    def _start(self, read: WindowRead, rows: np.ndarray) -> None:
        room = self._free.pop() if self._free else np.empty((self._room, self._store.spec.nbytes), np.uint8)
        parts = []
        for group in read.row_groups:
            places = np.flatnonzero(rows[0] == group)
            parts.append(self._pool.submit(self._load, group, rows[1, places], room, places))
        self._open[read.lane, read.epoch, read.window] = _Window(room, parts, read.last_step)

    def _load(self, group: int, rows: np.ndarray, room: np.ndarray, places: np.ndarray) -> None:
        stored = images(self._store.read_row_group(group, ["image"]), self._store.spec).reshape(-1, room.shape[1])
        # In short runs, because the gathered copy then stays in the processor's cache.
        for start in range(0, len(rows), _RUN):
            room[places[start : start + _RUN]] = stored[rows[start : start + _RUN]]
