"""The windows of a rank, open in a Ray Data task on its node: chunks of crops come through Ray's object store."""

from __future__ import annotations

import functools
import json
import time
import warnings
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import ray
from ray.data import DataContext
from ray.util.annotations import RayDeprecationWarning

from cosmic_ray.errors import DataError
from cosmic_ray.ingest import chunks
from cosmic_ray.ingest.plan import Plan
from cosmic_ray.progress import say

RESTARTS, RESTART_PAUSE_S = 3, 1.0


class RemoteWindows:
    """As `Windows`, read by one long Ray Data task that runs until the last step.

    Memory: in the task, the open windows and what it reads ahead; in the object store, up to eight chunks.

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
        self._uri, self._last_step, self._read_cpus = store_uri, last_step, read_cpus
        self._read = functools.partial(
            chunks.read_chunks,
            store_uri=store_uri,
            plan=plan,
            lanes=lanes,
            last_step=last_step,
            ahead_bytes=ahead_bytes,
        )
        self._restarts, self._steps_left = 0, 0
        self._crops, self._at = np.empty((0, 0), np.uint8), 0
        self._blocks = self._start(first_step)

    def fill(self, k: int, out: np.ndarray) -> None:
        """Copy what the lanes give to global batch `k` to `out`, uint8 (rows, bytes of a crop). Steps ascend by one.

        Raises:
            DataError: naming the shard that cannot be read.
        """
        if not self._steps_left:
            chunk = self._next_chunk(k)
            self._steps_left = chunk["steps"][0].as_py()
            values = chunk["images"].chunk(0).buffers()[2]
            self._crops, self._at = np.frombuffer(values, np.uint8).reshape(-1, out.shape[1]), 0
        out[:] = self._crops[self._at : self._at + len(out)]
        self._at += len(out)
        self._steps_left -= 1

    def close(self) -> None:
        """End the task."""
        self._blocks.close()

    def _next_chunk(self, k: int) -> pa.Table:
        self._crops = np.empty((0, 0), np.uint8)
        while True:
            try:
                chunk = next(self._blocks)
                break
            except ray.exceptions.RayTaskError:
                raise
            except ray.exceptions.RayError as error:
                self._restart(k, error)
        if error := chunk["error"][0].as_py():
            raise DataError(**json.loads(error))
        crops = np.frombuffer(chunk["images"].chunk(0).buffers()[2], np.uint8)
        if chunk["step"][0].as_py() != k or chunks.digest(crops) != chunk["digest"][0].as_py():
            raise DataError(self._uri, f"global batch {k} was damaged between reading and training", "report this")
        self._restarts = 0
        return chunk

    def _restart(self, k: int, error: Exception) -> None:
        self._blocks.close()
        self._restarts += 1
        if self._restarts > RESTARTS:
            raise error
        say(f"the reading task died ({type(error).__name__}); starting it again at step {k}")
        time.sleep(RESTART_PAUSE_S)
        self._blocks = self._start(k)

    def _start(self, first_step: int) -> Iterator[pa.Table]:
        dataset = ray.data.from_arrow(pa.table({"first_step": [first_step]}))
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
        _configure(dataset.context)
        return iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))


def _configure(context: DataContext) -> None:
    # Every chunk becomes a block of its own: larger than this, and of one row, which cannot be cut.
    context.target_max_block_size = 1
    context.print_on_execution_start = False
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
        object_store_memory=4 * chunks.CHUNK_BYTES
    )
