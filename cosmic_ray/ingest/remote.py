"""The stored row groups of a rank, read by a Ray Data task on its node; they come in chunks, by Ray's object store."""

from __future__ import annotations

import functools
import threading
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

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

from cosmic_ray.errors import DataError, unpacked
from cosmic_ray.ingest import chunks
from cosmic_ray.ingest.plan import Plan
from cosmic_ray.ingest.windows import Stored
from cosmic_ray.progress import say
from cosmic_ray.stores.crops import CropStore

QUEUED_CHUNKS = 1
QUICK_S, SLOW_S = 0.005, 0.1
RESTARTS, RESTART_PAUSE_S = 3, 1.0


_STREAM = "cosmic_ray.ingest.stream"


class _Queue:
    """What a rank and Ray Data's loop, in another thread of its process, tell each other."""

    def __init__(self) -> None:
        self.taken = threading.Event()
        """Set when the rank takes a chunk."""
        self.waiting = 0
        """Chunks that wait for the rank, as the loop saw last."""


_QUEUES: dict[str, _Queue] = {}
"""For each stream of this process: a context that is sent to tasks holds its name."""


class RemoteRowGroups:
    """Row groups as they are stored, read by one long Ray Data task that runs until the last step.

    Memory: in the task, `ahead_bytes` and two chunks; in the object store, half a dozen chunks, and those that were
    used and that Ray has not freed yet: never more than fits there, and nothing is spilled.

    A task that dies (killed for memory, its node lost) is started again at the row group that comes next; what was
    handed out is not read again.
    """

    def __init__(
        self,
        store: CropStore,
        plan: Plan,
        lanes: range,
        first_step: int,
        last_step: int,
        read_cpus: float,
        ahead_bytes: int,
    ):
        self._uri, self._read_cpus = store.uri, read_cpus
        self._read = functools.partial(
            chunks.read_chunks,
            places=store.places,
            plan=plan,
            lanes=lanes,
            first_step=first_step,
            last_step=last_step,
            ahead_bytes=ahead_bytes,
        )
        self._restarts, self._received = 0, 0
        self._here: deque[tuple[int, Stored]] = deque()
        self._error: DataError | None = None
        self._name, self._queue = uuid.uuid4().hex, _Queue()
        _QUEUES[self._name] = self._queue
        self._blocks = self._start()

    def ready(self) -> bool:
        """Whether the next row group can be asked for without waiting."""
        return bool(self._here or self._error or self._queue.waiting)

    def ask(self, group: int) -> Callable[[], Stored]:
        """What gives a row group, or raises DataError."""
        if not self._here and self._error is None:
            self._receive()
        if not self._here:
            return self._fail
        came, stored = self._here.popleft()
        if came != group:
            raise RuntimeError(f"{self._uri}: row group {came} came where {group} was to come")
        return lambda: stored

    def close(self) -> None:
        """End the task."""
        self._blocks.close()
        _QUEUES.pop(self._name, None)

    def _fail(self) -> Stored:
        raise self._error

    def _receive(self) -> None:
        chunk = self._next_chunk()
        if error := chunk["error"][0].as_py():
            self._error = unpacked(error)
            return
        groups, sizes = chunk["row_groups"][0].as_py(), chunk["sizes"][0].as_py()
        if chunk["first"][0].as_py() != self._received:
            raise RuntimeError(f"{self._uri}: row groups came in another order than they were read in")
        stored, at = chunk["stored"].chunk(0).buffers()[2], 0
        for group, data, footer in zip(groups, sizes[::2], sizes[1::2], strict=True):
            parts = stored.slice(at, data), stored.slice(at + data, footer)
            self._here.append((group, Stored(*parts)))
            at += data + footer
        self._received += len(groups)
        self._restarts = 0

    def _next_chunk(self) -> pa.Table:
        while True:
            try:
                chunk = next(self._blocks)
                self._queue.waiting = max(self._queue.waiting - 1, 0)
                self._queue.taken.set()
                return chunk
            except ray.exceptions.RayTaskError:
                raise
            except ray.exceptions.RayError as error:
                self._restart(error)

    def _restart(self, error: Exception) -> None:
        self._blocks.close()
        self._restarts += 1
        if self._restarts > RESTARTS:
            raise error
        say(f"the reading task died ({type(error).__name__}); starting it again at its row group {self._received}")
        time.sleep(RESTART_PAUSE_S)
        self._blocks = self._start()

    def _start(self) -> Iterator[pa.Table]:
        # from_arrow would start a task of one CPU for the schema, and wait for ever where ranks and readers hold them.
        dataset = ray.data.from_blocks([pa.table({"skip": [self._received]})])
        with warnings.catch_warnings():
            # Ray would run a task that died again from its own first step, however long ago that was. There is no
            # other way to forbid it in this version, which warns that the way will change.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            dataset = dataset.map_batches(
                functools.partial(self._read, skip=self._received),
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
        self._queue = _QUEUES[data_context.get_config(_STREAM)]
        self._quick_until = 0.0

    def max_task_output_bytes_to_read(self, op: PhysicalOperator) -> int | None:
        if op.output_dependencies:
            return None
        self._queue.waiting = self._topology[op].total_enqueued_output_blocks()
        if self._queue.waiting < QUEUED_CHUNKS:
            return None
        if time.monotonic() < self._quick_until:
            time.sleep(QUICK_S)
        elif self._queue.taken.wait(SLOW_S):
            self._queue.taken.clear()
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
