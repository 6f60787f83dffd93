"""The open windows of some lanes: row groups read ahead in the order of need, their crops drawn as the plan says.

A crop is copied twice: from its decompressed page to its window, and from there into the batch. The memory of a used-up
window serves the next ones, so that a long run touches no fresh page.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np

from cosmic_ray.errors import DamagedError, DataError
from cosmic_ray.ingest.plan import Plan, WindowRead
from cosmic_ray.progress import say
from cosmic_ray.stores.crops import Buffer, CropStore
from cosmic_ray.stores.places import LOCAL_THREADS, reading_threads

AHEAD_BYTES = 64 * 2**20
_SIZES = 8


class Stored(NamedTuple):
    """A row group as it is stored, and the end of its shard, which tells how; read where it is not given and needed."""

    data: Buffer
    footer: Buffer | None = None


class RowGroups(Protocol):
    """Where the stored row groups come from. They are asked for in the order of `Plan.reads`."""

    def ready(self) -> bool:
        """Whether the next row group can be asked for without waiting."""
        ...

    def ask(self, group: int) -> Callable[[], Stored]:
        """What gives a row group, or raises DataError: called in another thread."""
        ...


class Here:
    """Row groups read from the store by the threads that decode them."""

    def __init__(self, store: CropStore):
        self._store, self._thread = store, threading.local()

    def ready(self) -> bool:
        return True

    def ask(self, group: int) -> Callable[[], Stored]:
        return lambda: Stored(self._store.stored(group, room=self._room(self._store.row_groups[group].nbytes)))

    def _room(self, nbytes: int) -> memoryview:
        """Memory of this thread, for one row group after another."""
        if nbytes > getattr(self._thread, "nbytes", 0):
            self._thread.nbytes, self._thread.room = nbytes, memoryview(np.empty(nbytes * 5 // 4, np.uint8))
        return self._thread.room


class _Window(NamedTuple):
    crops: np.ndarray
    """uint8 (room, bytes of a crop): the crops that are drawn, each once; what is left of the room is unused."""
    drawn: np.ndarray
    """intp (draws,): the place in `crops` of each draw."""
    parts: list[Future]
    last_step: int


class _Rooms:
    """Memory for windows, in rooms of a few sizes, so that a used one soon serves again.

    All together they never take more than a quarter above what was in use at one time.
    """

    def __init__(self, largest: int, nbytes: int, lanes: int):
        self._unit, self._nbytes, self._patience = -(-largest // _SIZES), nbytes, 4 * lanes
        self._free: list[tuple[int, np.ndarray]] = []
        self._count = self._used = self._most = self._idle = 0

    def take(self, rows: int) -> np.ndarray:
        """A room for so many crops: uint8 (`rows` or some more, bytes of a crop)."""
        room = -(-rows // self._unit) * self._unit
        self._count += 1
        self._used += room
        self._most = max(self._most, self._used)
        found = next((at for at, (_, crops) in enumerate(self._free) if len(crops) == room), None)
        crops = None if found is None else self._give(found)
        # Between two epochs all lanes have two windows open; in long epochs what that took is given back.
        while self._free and (
            4 * (self._used + self._idle) > 5 * self._most or self._free[0][0] < self._count - self._patience
        ):
            self._give(0)
        return np.empty((room, self._nbytes), np.uint8) if crops is None else crops

    def free(self, crops: np.ndarray) -> None:
        """Take a room back."""
        self._used -= len(crops)
        self._idle += len(crops)
        self._free.append((self._count, crops))

    def _too_old(self) -> bool:
        return self._free[0][0] < self._count - self._patience

    def _give(self, at: int) -> np.ndarray:
        crops = self._free.pop(at)[1]
        self._idle -= len(crops)
        return crops


class Windows:
    """Hands out the crops of one global batch after another.

    Memory: the open windows of these lanes (`plan.open_rows`) and the windows read ahead, `ahead_bytes` or one; and a
    quarter of that, which waits to be used again.
    """

    def __init__(
        self,
        store: CropStore,
        plan: Plan,
        lanes: range,
        first_step: int,
        last_step: int,
        ahead_bytes: int = AHEAD_BYTES,
        source: RowGroups | None = None,
    ):
        """`source` of the stored row groups: by default this process reads them, with more threads where the store is
        far away.

        Raises DataError where `plan` was made for another store.
        """
        if plan.spec.store_hash != store.content_hash:
            problem = f"its content hash is {store.content_hash[:16]}, the plan's store has {plan.spec.store_hash[:16]}"
            raise DataError(store.uri, problem, "open the store that the plan was made for")
        self._store, self._plan, self._lanes = store, plan, lanes
        self._source = source or Here(store)
        self._reads = plan.reads(lanes, first_step, last_step)
        self._coming = next(self._reads, None)
        # A window that is partly drawn when the stream begins in its middle is held without what was drawn before.
        begun = plan.pieces(first_step, lanes) if first_step < last_step else []
        self._begun = {piece[:3]: piece.start for piece in reversed(begun)}
        self._open: dict[tuple[int, int, int], _Window] = {}
        self._ahead: deque[tuple[int, int]] = deque()
        self._ahead_rows, self._ahead_limit = 0, ahead_bytes // store.spec.nbytes
        self._rooms = _Rooms(plan.largest_window(lanes), store.spec.nbytes, len(lanes))
        threads = reading_threads(store.uri) if source is None else LOCAL_THREADS
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
            # Of the modes, `clip` alone writes to `out` without a copy in between.
            opened.crops.take(opened.drawn[start:stop], axis=0, out=out[at : at + stop - start], mode="clip")
            at += stop - start
        for key in [key for key, opened in self._open.items() if opened.last_step <= k]:
            self._rooms.free(self._open.pop(key).crops)

    def close(self) -> None:
        """Read no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _read_ahead(self, k: int) -> None:
        while self._ahead and self._ahead[0][0] <= k:
            self._ahead_rows -= self._ahead.popleft()[1]
        while (read := self._coming) and (read.first_step <= k or self._may_read_ahead()):
            rows = self._start(read)
            if read.first_step > k:
                self._ahead.append((read.first_step, rows))
                self._ahead_rows += rows
            self._coming = next(self._reads, None)

    def _may_read_ahead(self) -> bool:
        return self._ahead_rows < self._ahead_limit and self._source.ready()

    def _start(self, read: WindowRead) -> int:
        """Begin to read a window; gives the number of its draws."""
        rows = self._plan.window_rows(read.lane, read.epoch, read.window)
        before = self._begun.pop((read.lane, read.epoch, read.window), 0)
        crops = self._rooms.take(rows.shape[1] - before)
        drawn, parts, first = np.zeros(rows.shape[1], np.intp), [], 0
        for group in read.row_groups:
            draws = before + np.flatnonzero(rows[0, before:] == group)
            wanted, places = np.unique(rows[1, draws], return_inverse=True)
            drawn[draws] = first + places
            stored = self._source.ask(group)
            parts.append(self._pool.submit(self._load, group, stored, wanted, crops[first : first + len(wanted)]))
            first += len(wanted)
        self._open[read.lane, read.epoch, read.window] = _Window(crops, drawn, parts, read.last_step)
        return rows.shape[1]

    def _load(self, group: int, ask: Callable[[], Stored], rows: np.ndarray, out: np.ndarray) -> None:
        stored = ask()
        try:
            self._decode(group, stored, rows, out)
        except DamagedError:
            # If not in storage, then on its way here.
            self._decode(group, Stored(self._store.stored(group)), rows, out)
            say(f"{self._store.uri}: row group {group} was damaged after it was read; it was read again")

    def _decode(self, group: int, stored: Stored, rows: np.ndarray, out: np.ndarray) -> None:
        """Put the rows numbered `rows`, ascending, of a row group into `out`."""
        first = at = 0
        for crops in self._store.decoded_images(group, stored.data, stored.footer):
            end = int(np.searchsorted(rows, first + len(crops)))
            if end - at == len(crops):
                out[at:end] = crops
            elif end > at:
                crops.take(rows[at:end] - first, axis=0, out=out[at:end], mode="clip")
            first, at = first + len(crops), end
