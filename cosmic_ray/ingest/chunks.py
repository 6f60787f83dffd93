"""What a Ray worker runs to feed one rank: a generator of chunks, each a few global batches' worth of crops in order.

A chunk is an Arrow table of one row, so that Ray Data hands it on as it is: neither merged with others nor cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from cosmic_ray.errors import DataError, packed
from cosmic_ray.ingest.plan import Plan
from cosmic_ray.ingest.windows import Windows
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.manifest import CropSpec

CHUNK_BYTES = 64 * 2**20
SCHEMA = pa.schema(
    {
        "step": pa.int64(),
        "steps": pa.int64(),
        "shape": pa.list_(pa.int64()),
        "images": pa.large_binary(),
        "digest": pa.string(),
        "error": pa.string(),
    }
)
"""First global batch, number of them, (C, H, W), their crops' bytes in order, `digest`; or else a DataError, packed."""


def read_chunks(
    order: pa.Table, store_uri: str, plan: Plan, lanes: range, first_step: int, last_step: int, **reading: Any
) -> Iterator[pa.Table]:
    """The chunks of `lanes` from global batch `first_step` to `last_step`-1.

    `order` is the one row that starts the task. Data that cannot be read end the stream with a chunk that says why:
    an exception would reach the consumer as Ray's, after hundreds of lines of traceback.
    """
    k = first_step
    try:
        store = CropStore.open(store_uri)
        windows = Windows(store, plan, lanes, first_step, last_step, **reading)
    except DataError as error:
        yield _failed(k, error)
        return
    nbytes = store.spec.nbytes
    rooms = [np.empty((0, nbytes), np.uint8)] * 2
    wanted = 1
    try:
        while k < last_step:
            sizes = _sizes(plan, lanes, k, last_step, wanted // nbytes)
            if len(rooms[0]) < sum(sizes):
                rooms[0] = np.empty((sum(sizes) + 4 * len(sizes), nbytes), np.uint8)
            done, failure = _fill(windows, k, sizes, rooms[0])
            if done:
                yield _chunk(k, done, store.spec, rooms[0][: sum(sizes[:done])])
            if failure:
                yield _failed(k + done, failure)
                return
            # The next chunk is written while the last one is perhaps still being stored. The first ones are short, so
            # that the consumer need not wait long for its first batch.
            rooms.reverse()
            k, wanted = k + done, min(4 * max(wanted, sum(sizes) * nbytes), CHUNK_BYTES)
    finally:
        windows.close()


def _sizes(plan: Plan, lanes: range, k: int, last_step: int, rows: int) -> list[int]:
    """The rows of the global batches from `k` on that together make a chunk of about `rows`; at least one batch."""
    sizes = [len(plan.positions(k, lanes))]
    while k + len(sizes) < last_step and sum(sizes) + sizes[0] <= rows:
        sizes.append(len(plan.positions(k + len(sizes), lanes)))
    return sizes


def _fill(windows: Windows, k: int, sizes: list[int], room: np.ndarray) -> tuple[int, DataError | None]:
    at = 0
    for done, size in enumerate(sizes):
        try:
            windows.fill(k + done, room[at : at + size])
        except DataError as error:
            return done, error
        at += size
    return len(sizes), None


def _chunk(k: int, steps: int, spec: CropSpec, crops: np.ndarray) -> pa.Table:
    offsets = pa.py_buffer(np.array([0, crops.nbytes], np.int64))
    images = pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(crops)])
    return pa.table([[k], [steps], [spec.shape], images, [digest(crops)], [""]], schema=SCHEMA)


def _failed(k: int, error: DataError) -> pa.Table:
    return pa.table([[k], [0], [[]], [b""], [""], [packed(error)]], schema=SCHEMA)


def digest(crops: np.ndarray) -> str:
    """xxh3_64 of 64 bytes in the middle of each crop: enough to notice a chunk that was overwritten on its way."""
    middle = crops.shape[1] // 2
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(crops[:, middle : middle + 64]))
