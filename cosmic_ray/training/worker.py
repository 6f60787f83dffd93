"""What each Ray Train worker runs: the loop, with its data through Ray Data, its watch, and its end of the wire."""

from __future__ import annotations

import logging
import os
import traceback
from typing import Any

import ray.train
import torch
from ray.train.torch import TorchTrainer, get_device

from cosmic_ray import storage
from cosmic_ray.errors import CosmicError, JobError
from cosmic_ray.output import encode
from cosmic_ray.training.collective import Collective
from cosmic_ray.training.errors import NonFiniteError
from cosmic_ray.training.record import METRICS, MetricsFile
from cosmic_ray.training.watch import Watch
from cosmic_ray.training.wire import Link

NON_FINITE = "nonfinite.json"
_UNUSED = ("PlacementGroupCleanerCallback", "DatasetsCallback")


class Trainer(TorchTrainer):
    """Ray Train without two of its helpers, each a process: one serves data that we do not give it, the other asks a
    dashboard, which a local Ray does not have, twice a second whether the controller lives."""

    def _create_default_callbacks(self) -> list[Any]:
        return [each for each in super()._create_default_callbacks() if type(each).__name__ not in _UNUSED]


def work(config: dict[str, Any]) -> dict[str, Any]:
    """Train `config["job"]` as one rank; `config["wire"]` leads to the driver.

    Returns:
        `ending` (`finished` or `stopped`) and `step`, the steps done.
    """
    job, context = config["job"], ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    me = f"worker {rank} of {world}"
    link = Link(config["wire"], f"{me}: process {os.getpid()} on {ray.util.get_node_ip_address()}, {get_device()}")
    watch = Watch(job.scaling.hang_timeout_s, me)
    torch.set_num_threads(max(1, int(job.scaling.cpus_per_worker)))
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    try:
        callbacks = [MetricsFile(storage.join(job.out, METRICS)), link]
        loop = job.loop(callbacks, device=get_device(), stopping=link.stopping, beat=watch.beat, rank=rank, world=world)
        ending, step = loop.run()
        return {"ending": ending, "step": step}
    except Exception as error:
        if told := _final(error, job.out):
            link.fail(told)
        # Ray hands on the text of an error, not where it was raised.
        raise RuntimeError(f"{me}: {type(error).__name__}: {error}\n{traceback.format_exc()}") from None
    finally:
        watch.close()
        link.close()


def _final(error: Exception, out: str) -> CosmicError | None:
    """The error to end the run with, where a restart would mend nothing; None for what may pass."""
    if isinstance(error, NonFiniteError):
        if Collective().rank == 0:
            facts = {"step": error.step, "suspects": error.suspects, "batch": error.batch}
            storage.write_bytes(storage.join(out, NON_FINITE), encode(facts))
        return error
    if isinstance(error, CosmicError):
        return error
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return JobError("micro_batch", "too large", f"out of memory: {error}", "choose a smaller one")
    return None
