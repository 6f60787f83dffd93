"""Independent tasks on all CPUs of a cluster, through Ray Data; a single one in this process, without Ray."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cosmic_ray.errors import CosmicError, packed, unpacked

Task = Callable[..., dict[str, Any]]


def each(
    task: Task,
    units: Sequence[dict[str, Any]],
    shared: dict[str, Any],
    workers: int | None,
    memory_bytes: int,
    seen: dict[str, str],
) -> Iterator[dict[str, Any]]:
    """Call `task(**unit, **shared)` for every unit and yield what it returns, in the order in which they end.

    Ray repeats what a lost node had begun, so a task must do the same when it is called again.

    Args:
        task: a function of an importable module that returns JSON-serialisable data.
        units: JSON-serialisable.
        shared: the same for all, sent once.
        workers: tasks at a time; None for one a CPU, 0 for this process and no Ray.
        memory_bytes: what Ray sets aside for each task; at most what its largest node has.
        seen: key of the job -> URI that every node has to see.

    Raises:
        CosmicError: the one that a task raised.
        JobError: where a node does not see a local path.
    """
    if workers == 0 or len(units) <= 1:
        for unit in units:
            yield task(**unit, **shared)
        return
    import ray
    from ray.data import TaskPoolStrategy

    from cosmic_ray.cluster import connect, require_seen_everywhere

    connect()
    require_seen_everywhere(seen)
    # A task that no node has the memory for would wait for one for ever.
    largest = max(node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"])
    items = [{"unit": json.dumps(unit)} for unit in units]
    results = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _call,
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={"task": task, "shared": shared},
        compute=TaskPoolStrategy(size=workers),
        num_cpus=1,
        memory=min(memory_bytes, largest),
    )
    for block in results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for text in block["result"].to_pylist():
            result = json.loads(text)
            if "error" in result:
                raise unpacked(result["error"])
            yield result


def _call(block: Any, task: Task, shared: dict[str, Any]) -> Any:
    """An error that is the user's to mend comes back as a result: as an exception, Ray would bury it in its own."""
    import pyarrow as pa

    results = []
    for text in block["unit"].to_pylist():
        try:
            results.append(json.dumps(task(**json.loads(text), **shared)))
        except CosmicError as error:
            results.append(json.dumps({"error": packed(error)}))
    return pa.table({"result": results})
