"""What a run needs of the cluster, looked at before any work starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosmic_ray.cluster import Resources
from cosmic_ray.errors import JobError

if TYPE_CHECKING:
    from cosmic_ray.training.job import PretrainMAE


def require_resources(job: PretrainMAE, parameters: int, found: Resources) -> float:
    """See that the cluster can hold the workers, their readers and the network; return the GPUs of a worker.

    `parameters`: of the network. `found`: what the connected cluster has.

    Raises:
        JobError: naming the key, its value and the remedy.
    """
    gpus = _gpus(job, found)
    _require_cpus(job, found)
    _require_memory(job, parameters, found, gpus)
    return gpus


def _gpus(job: PretrainMAE, found: Resources) -> float:
    wanted = job.scaling.gpus_per_worker
    if wanted is None:
        wanted = 1.0 if found.gpus else 0.0
    if wanted * job.scaling.workers > found.gpus:
        problem = f"{job.scaling.workers} workers of {wanted:g} GPUs, and the cluster has {found.gpus:g}"
        raise JobError(
            "scaling.workers", job.scaling.workers, problem, "use fewer workers or scaling.gpus_per_worker=0"
        )
    return wanted


def _require_cpus(job: PretrainMAE, found: Resources) -> None:
    """A worker and its reader share a node, so they are counted node by node."""
    scaling = job.scaling
    each = scaling.cpus_per_worker + scaling.cpus_per_reader
    fits = sum(int(cpus / each + 1e-6) for cpus in found.node_cpus)
    if scaling.workers <= fits:
        return
    nodes = ", ".join(f"{cpus:g}" for cpus in found.node_cpus)
    problem = (
        f"{scaling.workers} workers of {scaling.cpus_per_worker:g} CPUs, and {scaling.cpus_per_reader:g} on the same "
        f"node for Ray Data to read for each; the nodes have {nodes}, which is room for {fits}"
    )
    remedy = f"scaling.workers={fits}, or " if fits else ""
    raise JobError("scaling.workers", scaling.workers, problem, f"{remedy}a smaller scaling.cpus_per_worker")


def _require_memory(job: PretrainMAE, parameters: int, found: Resources, gpus: float) -> None:
    """On CPUs: weights, gradients, two moments and averages of every worker, in float32. (GPUs tell it themselves.)"""
    copies = 5 if job.ema else 4
    shared = job.scaling.workers if job.scaling.strategy == "fsdp2" else 1
    needed = 4 * parameters * copies * job.scaling.workers / shared
    if gpus or needed <= found.memory_bytes:
        return
    problem = (
        f"{parameters / 1e6:,.0f} M parameters take {needed / 1e9:.1f} GB on {job.scaling.workers} CPU workers, "
        f"beside their activations; the cluster has {found.memory_bytes / 1e9:.1f} GB"
    )
    raise JobError("model.preset", job.model.preset, problem, "choose a smaller preset, or train on GPUs")
