"""What a run needs of the cluster, looked at before any work starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosmic_ray.cluster import Resources
from cosmic_ray.errors import JobError
from cosmic_ray.training import room

if TYPE_CHECKING:
    from cosmic_ray.training.base import TrainingJob
    from cosmic_ray.training.stage import Stage


def require_resources(stage: Stage, found: Resources) -> float:
    """See that the cluster can hold the fewest workers, their readers and the network; return the GPUs of a worker.

    `found`: what the connected cluster has.

    Raises:
        JobError: naming the key, its value and the remedy.
    """
    gpus = _gpus(stage.job, found)
    _require_cpus(stage.job, found)
    _require_memory(stage, found, gpus)
    return gpus


def _gpus(job: TrainingJob, found: Resources) -> float:
    wanted, workers = job.scaling.gpus_per_worker, job.scaling.fewest
    if wanted is None:
        wanted = 1.0 if found.gpus else 0.0
    if wanted * workers > found.gpus:
        problem = f"{workers} workers of {wanted:g} GPUs, and the cluster has {found.gpus:g}"
        raise JobError(
            "scaling.workers", job.scaling.workers, problem, "use fewer workers or scaling.gpus_per_worker=0"
        )
    return wanted


def _require_cpus(job: TrainingJob, found: Resources) -> None:
    """A worker and its reader share a node, so they are counted node by node."""
    scaling = job.scaling
    fits = room.fits(({"CPU": cpus} for cpus in found.node_cpus), room.bundle(scaling, 0))
    if scaling.fewest <= fits:
        return
    nodes = ", ".join(f"{cpus:g}" for cpus in found.node_cpus)
    problem = (
        f"{scaling.fewest} workers of {scaling.cpus_per_worker:g} CPUs, and {scaling.cpus_per_reader:g} on the same "
        f"node for Ray Data to read for each; the nodes have {nodes}, which is room for {fits}"
    )
    remedy = f"scaling.workers={fits}, or " if fits else ""
    raise JobError("scaling.workers", scaling.workers, problem, f"{remedy}a smaller scaling.cpus_per_worker")


def _require_memory(stage: Stage, found: Resources, gpus: float) -> None:
    """On CPUs: weights, gradients, two moments and averages of every worker, in float32 (GPUs tell it themselves).
    Everywhere: what reading for the workers holds in memory."""
    from cosmic_ray.ingest.stream import reading_bytes

    job, plan, count = stage.job, stage.plan, stage.parameters
    workers = job.scaling.fewest
    copies = (5 if job.ema else 4) * (1 if job.scaling.strategy == "fsdp2" else workers)
    network = 0 if gpus else 4 * count * copies
    shares = [plan.lanes_of(rank, workers) for rank in range(workers)]
    reading = sum(reading_bytes(plan, lanes, stage.row_bytes) for lanes in shares)
    if network + reading <= found.memory_bytes:
        return
    has = f"the cluster has {found.memory_bytes / 1e9:.1f} GB"
    if network < reading:
        problem = f"{workers} readers hold {reading / 1e9:.1f} GB of open windows; {has}"
        raise JobError("data.window", job.data.window, problem, "choose a smaller data.window, or build smaller groups")
    problem = (
        f"{count / 1e6:,.0f} M parameters take {network / 1e9:.1f} GB on {workers} CPU workers, beside their "
        f"activations and {reading / 1e9:.1f} GB for reading; {has}"
    )
    raise JobError("model.preset", job.model.preset, problem, "choose a smaller preset, or train on GPUs")
