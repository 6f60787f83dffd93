"""Where the row groups of a store lie, and their bytes: all that a reading task needs of a manifest, in a few arrays.

It imports little and is sent quickly, so that a task can begin to read at once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cosmic_ray import storage
from cosmic_ray.errors import NotFoundError

LOCAL_THREADS, REMOTE_THREADS = 2, 8


class Places(NamedTuple):
    """For each shard its URI and where its footer lies; for each row group, its shard and where in it it lies."""

    shards: list[str]
    footer_starts: np.ndarray
    """int64 (shards,)."""
    footer_nbytes: np.ndarray
    """int64 (shards,)."""
    shard_of: np.ndarray
    """int32 (G,)."""
    starts: np.ndarray
    """int64 (G,)."""
    nbytes: np.ndarray
    """int64 (G,)."""

    def group(self, index: int, room: memoryview | None = None) -> bytes | memoryview:
        """The bytes of a row group as they are stored, not checked; raises DataError as `read_stored`."""
        shard = self.shards[self.shard_of[index]]
        return read_stored(shard, int(self.starts[index]), int(self.nbytes[index]), room)

    def footer(self, shard: int) -> bytes | memoryview:
        """The end of a shard, which tells how its row groups are stored, not checked; raises as `group`."""
        return read_stored(self.shards[shard], int(self.footer_starts[shard]), int(self.footer_nbytes[shard]))


def read_stored(shard: str, start: int, length: int, room: memoryview | None = None) -> bytes | memoryview:
    """`length` bytes of a shard from `start`; `room`: memory that may be used for them.

    Raises:
        DataError: naming the shard, where it is missing or too short.
    """
    try:
        return storage.read_range(shard, start, length, room)
    except NotFoundError:
        problem = "this shard is missing, though the manifest names it"
        raise NotFoundError(shard, problem, "restore it or rebuild the store") from None


def reading_threads(uri: str) -> int:
    """Threads that read from the store at `uri`: more of them where it is far away."""
    return LOCAL_THREADS if storage.is_local(uri) else REMOTE_THREADS
