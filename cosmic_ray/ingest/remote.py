"""The windows of a rank, open in a Ray Data task on its node: chunks of crops come through Ray's object store."""

from __future__ import annotations

import functools
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import DataContext
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
)
from ray.data._internal.execution.backpressure_policy.backpressure_policy import BackpressurePolicy
from ray.data._internal.execution.interfaces import PhysicalOperator
from ray.util.annotations import RayDeprecationWarning

from cosmic_ray.errors import unpacked
from cosmic_ray.ingest import chunks
from cosmic_ray.ingest.plan import Plan
from cosmic_ray.progress import say

QUEUED_CHUNKS = 2
QUICK_S, SLOW_S = 0.005, 0.1
RESTARTS, RESTART_PAUSE_S = 3, 1.0


_STREAM = "cosmic_ray.ingest.stream"
_TAKEN: dict[str, threading.Event] = {}
"""For each stream of this process, set when its rank takes a chunk: a context that is sent to tasks holds its name."""


class RemoteWindows:
    """As `Windows`, read by one long Ray Data task that runs until the last step.

    Memory: in the task, the open windows and what it reads ahead; in the object store, half a dozen chunks, and those
    that were used and that Ray has not freed yet: never more than fits there, and nothing is spilled.

    A task that dies (killed for memory, its node lost) is started again from the step that the rank needs next; what
    was handed out is not read again.
    """

    def __init__(
        self,
        store_uri: str,
        plan: Plan,
        lanes: range,
        first_step: int,
        last_step: int,
        read_cpus: float,
        ahead_bytes: int,
    ):
        self._uri, self._first_step, self._read_cpus = store_uri, first_step, read_cpus
        self._read = functools.partial(
            chunks.read_chunks,
            store_uri=store_uri,
            plan=plan,
            lanes=lanes,
            last_step=last_step,
            ahead_bytes=ahead_bytes,
        )
        self._restarts, self._steps_left = 0, 0
        self._name, self._taken = uuid.uuid4().hex, threading.Event()
        _TAKEN[self._name] = self._taken
        self._crops, self._at = np.empty((0, 0), np.uint8), 0
        self._blocks = self._start(first_step)

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the store's crops; the task has to have begun.

        Raises DataError as `fill`.
        """
        return self._open(self._next_chunk(self._first_step), self._first_step)

    def fill(self, k: int, out: np.ndarray) -> None:
        """Copy what the lanes give to global batch `k` to `out`, uint8 (rows, bytes of a crop). Steps ascend by one.

        Raises:
            DataError: naming the shard that cannot be read.
        """
        if not self._steps_left:
            self._open(self._next_chunk(k), k)
        out[:] = self._crops[self._at : self._at + len(out)]
        self._at += len(out)
        self._steps_left -= 1

    def close(self) -> None:
        """End the task."""
        self._blocks.close()
        _TAKEN.pop(self._name, None)

    def _next_chunk(self, k: int) -> pa.Table:
        self._crops = np.empty((0, 0), np.uint8)
        while True:
            try:
                chunk = next(self._blocks)
                self._taken.set()
                return chunk
            except ray.exceptions.RayTaskError:
                raise
            except ray.exceptions.RayError as error:
                self._restart(k, error)

    def _open(self, chunk: pa.Table, k: int) -> tuple[int, int, int]:
        if error := chunk["error"][0].as_py():
            raise unpacked(error)
        channels, height, width = chunk["shape"][0].as_py()
        values = np.frombuffer(chunk["images"].chunk(0).buffers()[2], np.uint8)
        self._crops, self._at = values.reshape(-1, channels * height * width), 0
        if chunk["step"][0].as_py() != k or chunks.digest(self._crops) != chunk["digest"][0].as_py():
            raise RuntimeError(f"{self._uri}: global batch {k} was damaged between its reading and its use")
        self._steps_left, self._restarts = chunk["steps"][0].as_py(), 0
        return channels, height, width

    def _restart(self, k: int, error: Exception) -> None:
        self._blocks.close()
        self._restarts += 1
        if self._restarts > RESTARTS:
            raise error
        say(f"the reading task died ({type(error).__name__}); starting it again at step {k}")
        time.sleep(RESTART_PAUSE_S)
        self._blocks = self._start(k)

    def _start(self, first_step: int) -> Iterator[pa.Table]:
        # from_arrow would start a task of one CPU for the schema, and wait for ever where ranks and readers hold them.
        dataset = ray.data.from_blocks([pa.table({"first_step": [first_step]})])
        with warnings.catch_warnings():
            # Ray would run a task that died again from its own first step, however long ago that was. There is no
            # other way to forbid it in this version, which warns that the way will change.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            dataset = dataset.map_batches(
                functools.partial(self._read, first_step=first_step),
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=self._read_cpus,
                label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
                max_retries=0,
            )
        _configure(dataset.context, self._name)
        return iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))


class _QueueIsFull(BackpressurePolicy):
    """Leaves further chunks with the task while the rank has enough to go on with.

    Ray Data's own limit, by bytes, does the same at the cost of a whole core: its loop asks again at once. Here it
    waits until the rank takes a chunk, and then looks often, because the queue follows a little later.
    """

    def __init__(self, data_context: DataContext, topology: Any, resource_manager: Any):
        super().__init__(data_context, topology, resource_manager)
        self._taken = _TAKEN[data_context.get_config(_STREAM)]
        self._quick_until = 0.0

    def max_task_output_bytes_to_read(self, op: PhysicalOperator) -> int | None:
        if op.output_dependencies or self._topology[op].total_enqueued_output_blocks() < QUEUED_CHUNKS:
            return None
        if time.monotonic() < self._quick_until:
            time.sleep(QUICK_S)
        elif self._taken.wait(SLOW_S):
            self._taken.clear()
            self._quick_until = time.monotonic() + 20 * QUICK_S
        return 0


def _configure(context: DataContext, name: str) -> None:
    # Every chunk becomes a block of its own: larger than this, and of one row, which cannot be cut.
    context.target_max_block_size = 1
    context.execution_options.preserve_order = True
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, _QueueIsFull])
    context.set_config(_STREAM, name)
    # A rank may pause for as long as it likes: to evaluate, to write a checkpoint.
    context.execution_no_progress_timeout_s = -1
    context.memory_usage_poll_interval_s = None
    context.print_on_execution_start = False
    context.enable_progress_bars = False
