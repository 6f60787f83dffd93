"""The Ray Data actors that make the parts of a result: how many, on what, and how far they are."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray

from cosmic_ray import cluster
from cosmic_ray.errors import JobError, unpacked
from cosmic_ray.inference.actors import PartsActor
from cosmic_ray.progress import progress


@dataclass(frozen=True)
class Pool:
    """Workers, and the CPUs and accelerators of each."""

    workers: int
    cpus: int
    gpus: float


def plan_pool(workers: int | None, cpus: int, gpus: float | None) -> Pool:
    """Connect to Ray and see what fits; None lets the cluster decide.

    Raises:
        JobError: where the cluster is too small.
    """
    have = cluster.connect()
    each = min(1.0, have.gpus) if gpus is None else gpus
    most = int(have.cpus // cpus)
    if each:
        most = min(most, int(have.gpus / each))
    if (workers or 1) > most:
        needs = f"{cpus} CPUs" + (f" and {each:g} accelerators" if each else "")
        problem = f"a worker needs {needs}; the cluster has {have.cpus:g} CPUs and {have.gpus:g} accelerators"
        raise JobError("workers", workers, problem, f"at most {most} fit")
    return Pool(workers or most, cpus, each)


def make_parts(
    actor: type[PartsActor], work: Any, missing: Mapping[int, int], total: int, pool: Pool, doing: str, unit: str
) -> dict[str, float]:
    """Make the `missing` parts (number -> rows) of a result of `total` rows, with `actor(work)` in each worker.

    Args:
        doing: what the progress says is done.
        unit: what rows are, in the plural.

    Returns:
        `<unit>_per_s`, and `data_wait_share`: of the workers' time, the share spent waiting for input.

    Raises:
        CosmicError: from a worker, such as a DataError: what it could not read.
    """
    done = total - sum(missing.values())
    began, first, busy_s, wait_s = time.monotonic(), done, 0.0, 0.0
    said = ray.data.from_arrow([pa.table({"part": [part]}) for part in missing]).map_batches(
        actor,
        fn_constructor_args=(work,),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(pool.workers, len(missing))),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
    )
    with progress(doing, total, unit) as shown:
        shown.update(done)
        for row in said.iter_rows():
            one = json.loads(row["said"])
            if "error" in one:
                raise unpacked(one["error"])
            done, busy_s, wait_s = done + one["rows"], busy_s + one["seconds"], wait_s + one["read_wait_s"]
            shown.update(done, f"data wait {wait_s / busy_s:.0%}")
    return {f"{unit}_per_s": (done - first) / (time.monotonic() - began), "data_wait_share": wait_s / busy_s}
