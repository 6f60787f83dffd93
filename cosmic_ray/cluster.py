"""Ray, started once and quietly: the cluster of `RAY_ADDRESS` (or of the job that this is), else a local one."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

# What they warn of is what we asked for: a local cluster of our own, without Ray Data's progress bars.
_NOISY = ("ray._private.authentication.authentication_token_setup", "ray.data._internal.progress")


@dataclass(frozen=True)
class Resources:
    """What the connected cluster has, in logical units, summed over its live nodes."""

    nodes: int
    cpus: float
    gpus: float
    memory_bytes: float
    object_store_bytes: float


def connect(num_cpus: int | None = None) -> Resources:
    """Connect to Ray, starting a local one where no cluster is given; a second call only looks.

    Args:
        num_cpus: logical CPUs of a local Ray; the machine's by default. A given cluster has its own.
    """
    import ray
    from ray.data import DataContext

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not ray.is_initialized():
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": num_cpus, "include_dashboard": False}
        ray.init(logging_level=logging.WARNING, log_to_driver=True, **local)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return resources()


def resources() -> Resources:
    """What the connected cluster has now."""
    import ray

    total = ray.cluster_resources()
    return Resources(
        nodes=sum(1 for node in ray.nodes() if node["Alive"]),
        cpus=total.get("CPU", 0.0),
        gpus=total.get("GPU", 0.0),
        memory_bytes=total.get("memory", 0.0),
        object_store_bytes=total.get("object_store_memory", 0.0),
    )
