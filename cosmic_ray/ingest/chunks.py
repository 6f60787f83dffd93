"""What a Ray worker runs to feed one rank: a generator of chunks, each some stored row groups in the order of need.

A chunk is an Arrow table of one row, so that Ray Data hands it on as it is: neither merged with others nor cut. Row
groups travel as they are stored: they are a third of the size of the crops in them, and arrive with their digests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import accumulate, islice, pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from cosmic_ray.errors import DataError, packed
from cosmic_ray.ingest.plan import Plan
from cosmic_ray.stores.places import Places, reading_threads

CHUNK_BYTES = 32 * 2**20
_FOOTERS_KEPT = 256
SCHEMA = pa.schema(
    {
        "first": pa.int64(),
        "row_groups": pa.list_(pa.int64()),
        "sizes": pa.list_(pa.int64()),
        "stored": pa.large_binary(),
        "error": pa.string(),
    }
)
"""The number of the first row group in the stream; the row groups; of each, bytes of its data and of its shard's
footer; these bytes, one after another; or else why the next row group cannot be read: a DataError, packed."""


def read_chunks(
    order: pa.Table,
    places: Places,
    plan: Plan,
    lanes: range,
    first_step: int,
    last_step: int,
    skip: int,
    ahead_bytes: int,
) -> Iterator[pa.Table]:
    """The row groups that `plan.reads` names, without the first `skip` of them, at most `ahead_bytes` read ahead.

    `order` is the one row that starts the task. Data that cannot be read end the stream with a chunk that says why:
    an exception would reach the consumer as Ray's, after hundreds of lines of traceback.
    """
    groups = (group for read in plan.reads(lanes, first_step, last_step) for group in read.row_groups)
    reading = _Reading(places, islice(groups, skip, None), ahead_bytes)
    first = skip
    try:
        while chunk := reading.take():
            done, failure = chunk.done()
            if done:
                yield chunk.table(first, done)
            if failure:
                yield _failed(first + done, failure)
                return
            first += done
    finally:
        reading.close()


class _Chunk(NamedTuple):
    groups: list[int]
    sizes: list[int]
    """Of each row group, bytes of its data and of its shard's footer."""
    room: np.ndarray
    """uint8: they come one after another; what is left of the room is unused."""
    parts: list[Future]

    def done(self) -> tuple[int, DataError | None]:
        """Row groups that are read, and why the one after them is not."""
        for number, part in enumerate(self.parts):
            try:
                part.result()
            except DataError as error:
                return number, error
        return len(self.parts), None

    def table(self, first: int, done: int) -> pa.Table:
        """The first `done` row groups, of which the first one is number `first` of the stream."""
        groups, sizes = self.groups[:done], self.sizes[: 2 * done]
        nbytes = sum(sizes)
        offsets = pa.py_buffer(np.array([0, nbytes], np.int64))
        stored = pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(self.room[:nbytes])])
        return pa.table([[first], [groups], [sizes], stored, [""]], schema=SCHEMA)


class _Reading:
    """Row groups of a store in a given order, read ahead by threads into memory that is used again."""

    def __init__(self, places: Places, groups: Iterator[int], ahead_bytes: int):
        self._places, self._groups, self._ahead_bytes = places, groups, ahead_bytes
        self._group = next(groups, None)
        self._coming: deque[_Chunk] = deque()
        self._taken: deque[np.ndarray] = deque()
        self._wanted = 1
        self._footer = lru_cache(_FOOTERS_KEPT)(places.footer)
        self._pool = ThreadPoolExecutor(reading_threads(places.shards[0]), thread_name_prefix="row-groups")

    def take(self) -> _Chunk | None:
        """The next chunk, or None after the last one; it is valid until the next but one is taken."""
        while self._group is not None and sum(map(_nbytes, self._coming)) < self._ahead_bytes:
            self._coming.append(self._begin())
        if not self._coming:
            return None
        self._taken.append(self._coming[0].room)
        return self._coming.popleft()

    def close(self) -> None:
        """Read no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self) -> _Chunk:
        groups, sizes = [], []
        while self._group is not None and sum(sizes) < self._wanted:
            groups.append(self._group)
            shard = self._places.shard_of[self._group]
            sizes += [int(self._places.nbytes[self._group]), int(self._places.footer_nbytes[shard])]
            self._group = next(self._groups, None)
        # The first ones are short, so that the consumer need not wait long for its first batch.
        self._wanted = min(4 * sum(sizes), CHUNK_BYTES)
        room = self._room(sum(sizes))
        ends = [0, *accumulate(sizes)]
        parts = [memoryview(room)[start:end] for start, end in pairwise(ends)]
        reads = zip(groups, parts[::2], parts[1::2], strict=True)
        return _Chunk(groups, sizes, room, [self._pool.submit(self._read, *read) for read in reads])

    def _room(self, nbytes: int) -> np.ndarray:
        # The one that was taken last is perhaps still being stored.
        room = self._taken.popleft() if len(self._taken) > 2 else np.empty(0, np.uint8)
        return room if len(room) >= nbytes else np.empty(nbytes * 5 // 4, np.uint8)

    def _read(self, group: int, data: memoryview, footer: memoryview) -> None:
        found = self._places.group(group, data)
        if not isinstance(found, memoryview):
            data[:] = found
        footer[:] = self._footer(int(self._places.shard_of[group]))


def _nbytes(chunk: _Chunk) -> int:
    return sum(chunk.sizes)


def _failed(first: int, error: DataError) -> pa.Table:
    return pa.table([[first], [[]], [[]], [b""], [packed(error)]], schema=SCHEMA)
