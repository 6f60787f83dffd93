"""Ray, started once and quietly: the cluster of `RAY_ADDRESS` (or of the job that this is), else a local one."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cosmic_ray import storage
from cosmic_ray.errors import JobError
from cosmic_ray.progress import say

# What they warn of is what we asked for: a local cluster of our own, without Ray Data's progress bars.
_NOISY = ("ray._private.authentication.authentication_token_setup", "ray.data._internal.progress")


@dataclass(frozen=True)
class Resources:
    """What the connected cluster has, in logical units, summed over its live nodes."""

    nodes: int
    node_cpus: tuple[float, ...]
    """CPUs of each node."""
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
        # "local", or Ray would join whatever cluster was last started on this machine.
        own = {"address": "local", "num_cpus": num_cpus, "include_dashboard": False}
        local = {} if os.environ.get("RAY_ADDRESS") else own
        ray.init(logging_level=logging.WARNING, log_to_driver=True, **local)
    interrupt_on_sigterm()
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return resources()


def interrupt_on_sigterm() -> None:
    """From here on a SIGTERM, by which a cluster takes its node back or stops a job, is a Ctrl-C: save and stop.

    Ray puts its own handlers on it when it is imported and when it starts, which would end this process on the spot.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


def disconnect() -> None:
    """Leave Ray, and end it where it is a local one: no line of a worker's log is printed after this."""
    if (ray := sys.modules.get("ray")) is not None:
        ray.shutdown()


def _interrupt(*_: object) -> None:
    """As a Ctrl-C, also where a shell started this process in the background, in which SIGINT is ignored."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        raise KeyboardInterrupt
    handler(signal.SIGINT, None)


def resources() -> Resources:
    """What the connected cluster has now."""
    import ray

    total = ray.cluster_resources()
    alive = [node for node in ray.nodes() if node["Alive"]]
    return Resources(
        nodes=len(alive),
        node_cpus=tuple(node["Resources"].get("CPU", 0.0) for node in alive),
        cpus=total.get("CPU", 0.0),
        gpus=total.get("GPU", 0.0),
        memory_bytes=total.get("memory", 0.0),
        object_store_bytes=total.get("object_store_memory", 0.0),
    )


@contextmanager
def stop_on_signal(said: str) -> Iterator[threading.Event]:
    """Within, the first SIGINT sets the event and the second one raises KeyboardInterrupt; only in the main thread.

    `said`: to the user, at the first.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def asked(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        say(said)

    before = signal.signal(signal.SIGINT, asked)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def require_seen_everywhere(paths: dict[str, str]) -> None:
    """Check that every live node sees what lies on this machine's file systems; other URIs are not looked at.

    Args:
        paths: key of the job that names it -> URI of a file or folder that is there.

    Raises:
        JobError: naming the key, the path and the nodes that do not see it.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    local = {key: storage.absolute(uri) for key, uri in paths.items() if storage.is_local(uri)}
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2 or not local:
        return
    look = ray.remote(num_cpus=0, max_retries=0)(_seen)
    at = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    found = ray.get([look.options(scheduling_strategy=where).remote(list(local.values())) for where in at], timeout=60)
    for position, (key, path) in enumerate(local.items()):
        blind = [node["NodeManagerAddress"] for node, seen in zip(nodes, found, strict=True) if not seen[position]]
        if blind:
            problem = f"lies on this machine; {', '.join(blind)} would not see it"
            raise JobError(key, path, problem, "use s3://, or a folder that all nodes mount")


def _seen(paths: list[str]) -> list[bool]:
    return [storage.exists(path) for path in paths]
