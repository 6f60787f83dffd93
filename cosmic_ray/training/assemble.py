"""From a stage to the loop of one rank, the same in a worker and in a plain process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from cosmic_ray import storage
from cosmic_ray.training import checkpoint

if TYPE_CHECKING:
    import torch

    from cosmic_ray.training.data import Stream
    from cosmic_ray.training.loop import Callback, Loop
    from cosmic_ray.training.stage import Stage


def make_loop(
    stage: Stage,
    callbacks: Sequence[Callback] = (),
    *,
    device: torch.device | str = "cpu",
    stopping: Callable[[], bool] = lambda: False,
    beat: Callable[[], None] = lambda: None,
    rank: int = 0,
    world: int = 1,
    stream: Stream | None = None,
) -> Loop:
    """The loop of one rank. `stream`: `ingest.stream.batches` by default, which needs Ray; or `plain_batches`.

    Raises:
        JobError, DataError: where what the run begins with cannot be read, or is another network's.
    """
    import torch

    from cosmic_ray.ingest.stream import batches
    from cosmic_ray.training.loop import Loop, LoopSettings

    job = stage.job
    beat()
    device = torch.device(device)
    objective = stage.objective(begins=checkpoint.newest(checkpoint.within(job.out)) is None)
    beat()
    # The reader's CPUs are part of the worker's bundle: asked for apart, they might be left on other nodes only.
    data = stage.data(stream or partial(batches, read_cpus=0), rank, world)
    settings = LoopSettings(
        steps=stage.steps,
        global_batch=job.global_batch,
        seed=job.seed,
        checkpoints=checkpoint.within(storage.absolute(job.out)),
        optim=dict.fromkeys(objective.phases, job.optim),
        schedule=job.schedule,
        ema=job.ema,
        micro_batch=job.micro_batch,
        precision=_precision(job.precision, device),
        compile=job.compile,
        strategy=job.scaling.strategy,
        log_every=job.log_every,
        eval_every=job.eval.every,
        checkpoint_every=job.checkpoint.every,
        keep=job.checkpoint.keep,
    )
    return Loop(objective, settings, data, callbacks, device, stopping, beat)


def _precision(wanted: str, device: torch.device) -> str:
    import torch

    if wanted != "auto":
        return wanted
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
