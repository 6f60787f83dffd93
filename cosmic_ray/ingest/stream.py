"""Store to batches: a rank's slices of the global batches, through Ray Data or in this process, byte for byte the same.

`batches` runs one long Ray Data task beside the rank, which reads the stored row groups in the order of need; threads
of the rank verify and decode them, and each batch is drawn from the open windows into a staging buffer. `plain_batches`
reads them in the calling process, too. Epochs are one stream, and any step can be the first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing
from functools import cached_property
from typing import TYPE_CHECKING

from cosmic_ray.ingest.chunks import CHUNK_BYTES
from cosmic_ray.ingest.plan import Plan, Samples
from cosmic_ray.ingest.staging import Staging
from cosmic_ray.ingest.windows import AHEAD_BYTES, Windows
from cosmic_ray.stores.crops import CropStore

if TYPE_CHECKING:
    import torch

READ_CPUS = 0.25
"""Logical CPUs that the reading task of a rank needs beside the rank's own."""


class Batch:
    """A rank's slice of one global batch, or one part of it where `micro` cuts it up.

    `step`: the global batch, from 0 across epochs. `images`: uint8 (n, C, H, W), page-locked where CUDA is there.
    `last`: whether the slice of this step ends here. `wait_s`:
    seconds that the consumer waited. A slice may be empty (n = 0) where the global batch is hardly larger than the
    number of lanes.

    The memory of `images` is used again: it is valid until the next batch is asked for. Copies to a device are safe
    if they were enqueued on the current CUDA stream before that.
    """

    def __init__(
        self, plan: Plan, lanes: range, step: int, images: torch.Tensor, part: slice, last: bool, wait_s: float
    ):
        self.step, self.images, self.last, self.wait_s = step, images[part], last, wait_s
        self._plan, self._lanes, self._part = plan, lanes, part

    @cached_property
    def positions(self) -> torch.Tensor:
        """Global sample positions, int64 (n,)."""
        import torch

        positions = self._plan.positions(self.step, self._lanes)[self._part]
        return torch.arange(positions.start, positions.stop)

    @cached_property
    def samples(self) -> Samples:
        """Row references, epochs and lanes, arrays of n; computed when asked for."""
        return Samples(*(array[self._part] for array in self._plan.rank_step(self.step, self._lanes)))

    def __len__(self) -> int:
        return len(self.images)


def batches(
    store_uri: str,
    plan: Plan,
    rank: int,
    world: int,
    first_step: int,
    last_step: int,
    *,
    micro: int | None = None,
    read_cpus: float = READ_CPUS,
    ahead_bytes: int = AHEAD_BYTES,
) -> Iterator[Batch]:
    """The slices of `rank` of the global batches `first_step` .. `last_step`-1, read by a Ray Data task on this node.

    Ray must be initialised. Closing the iterator ends the task.

    Args:
        store_uri: the crop store, at a URI that means the same in every process.
        micro: at most so many crops a batch; a slice then comes in parts.
        read_cpus: logical CPUs of the task.
        ahead_bytes: so much is read ahead, in the task as it is stored, and in the calling process decoded.

    Raises:
        JobError: for more ranks than lanes.
        DataError: naming the shard that cannot be read, or the store where the plan was made for another.
    """
    from cosmic_ray.ingest.remote import RemoteRowGroups

    lanes = plan.lanes_of(rank, world)
    steps = range(first_step, last_step)
    store = CropStore.open(store_uri)
    with closing(RemoteRowGroups(store, plan, lanes, first_step, last_step, read_cpus, ahead_bytes)) as source:
        windows = Windows(store, plan, lanes, first_step, last_step, ahead_bytes, source)
        with closing(windows):
            yield from _staged(windows, plan, lanes, steps, micro)


def plain_batches(
    store_uri: str,
    plan: Plan,
    rank: int,
    world: int,
    first_step: int,
    last_step: int,
    *,
    micro: int | None = None,
    ahead_bytes: int = AHEAD_BYTES,
) -> Iterator[Batch]:
    """As `batches`, without Ray: threads of this process read ahead."""
    lanes = plan.lanes_of(rank, world)
    windows = Windows(CropStore.open(store_uri), plan, lanes, first_step, last_step, ahead_bytes)
    with closing(windows):
        yield from _staged(windows, plan, lanes, range(first_step, last_step), micro)


def reading_bytes(plan: Plan, lanes: range, crop_bytes: int, ahead_bytes: int = AHEAD_BYTES) -> int:
    """What reading for a rank with these lanes holds in memory: in the rank's process the open windows, those read
    ahead, and a quarter of them that waits to be used again; in its task what that has read ahead and two chunks. Code
    and Arrow's buffers come on top: about 300 MB.
    """
    windows = (plan.open_rows(lanes) + plan.largest_window(lanes)) * 5 // 4
    return windows * crop_bytes + 2 * ahead_bytes + 2 * CHUNK_BYTES


def _staged(windows: Windows, plan: Plan, lanes: range, steps: range, micro: int | None) -> Iterator[Batch]:
    asked = time.perf_counter()
    staging = Staging(plan.largest_slice(lanes), windows.shape) if steps else None
    for k in steps:
        rows = len(plan.positions(k, lanes))
        images = staging.take(rows)
        windows.fill(k, images.numpy().reshape(rows, math.prod(windows.shape)))
        wait_s = time.perf_counter() - asked
        size = micro or max(rows, 1)
        for start in range(0, max(rows, 1), size):
            part = slice(start, min(start + size, rows))
            yield Batch(plan, lanes, k, images, part, start + size >= rows, 0.0 if start else wait_s)
        asked = time.perf_counter()
