"""A fit as one task of a Ray cluster: it tells how far it is while it works, and ends when its driver does."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from cosmic_ray import cluster
from cosmic_ray.errors import CosmicError, JobError, packed, unpacked
from cosmic_ray.transcriptome.fitted import Fitted, Report, fit
from cosmic_ray.transcriptome.job import FitTranscriptome


def fit_remotely(job: FitTranscriptome, report: Report) -> Fitted:
    """`fit` on one worker of the cluster; `report` is called here, as it goes.

    Raises:
        JobError: where the cluster is too small, and as `fit`.
        CosmicError: as `fit`.
        KeyboardInterrupt: on Ctrl-C; the worker is ended.
    """
    import ray

    gpus = _require_room(job)
    task = ray.remote(_fit).options(num_cpus=job.cpus, num_gpus=gpus, max_retries=0, num_returns="streaming")
    said = task.remote(job.model_copy(update={"gpus": gpus}))
    try:
        for reference in said:
            one = ray.get(reference)
            if isinstance(one, Fitted):
                return one
            if "error" in one:
                raise unpacked(one["error"])
            report(one)
    except BaseException:
        ray.cancel(said, force=True)
        raise
    raise CosmicError("the worker ended without a word")


def _require_room(job: FitTranscriptome) -> float:
    """Connect to Ray; the accelerators that the worker gets."""
    have = cluster.connect()
    wanted = min(1.0, have.gpus) if job.method == "scvi" else 0.0
    gpus = wanted if job.gpus is None else job.gpus
    if job.cpus > max(have.node_cpus, default=0):
        raise JobError("cpus", job.cpus, f"no node has so many; the largest has {max(have.node_cpus, default=0):g}")
    if gpus > have.gpus:
        raise JobError("gpus", job.gpus, f"the cluster has {have.gpus:g}")
    manifests = {key: f"{getattr(job, key)}/manifest.json" for key in ("cells", "split")}
    cluster.require_seen_everywhere(manifests)
    return gpus


def _fit(job: FitTranscriptome) -> Iterator[Mapping[str, Any] | Fitted]:
    """What `fit` reports, then what it returns; a user's error as text, since Ray would wrap it up."""
    said: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def work() -> None:
        try:
            said.put(fit(job, said.put))
        except CosmicError as error:
            said.put({"error": packed(error)})
        except BaseException as error:
            said.put(error)

    threading.Thread(target=work, daemon=True).start()
    while True:
        one = said.get()
        if isinstance(one, BaseException):
            raise one
        yield one
        if isinstance(one, Fitted) or "error" in one:
            return
