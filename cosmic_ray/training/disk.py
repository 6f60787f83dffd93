"""Whether a run's disk can hold its checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosmic_ray import storage
from cosmic_ray.errors import JobError
from cosmic_ray.training import checkpoint

if TYPE_CHECKING:
    from cosmic_ray.training.base import TrainingJob


def require_disk(job: TrainingJob, count: int) -> None:
    """Raise JobError where the disk has no room for the checkpoints that are kept and one more."""
    if not storage.is_local(job.out):
        return
    path = storage.local_path(storage.absolute(job.out))
    while not path.exists():
        path = path.parent
    one = 4 * count * (4 if job.ema else 3)
    there = len(storage.listing(checkpoint.within(job.out), f"*/{checkpoint.STATE}"))
    needed, free = one * max(1, job.checkpoint.keep + 1 - there), checkpoint.room(path)
    if free < needed:
        problem = (
            f"{free / 1e9:.1f} GB are free there; the checkpoints of {one / 1e9:.1f} GB each that are still to come,"
        )
        problem += f" at most {job.checkpoint.keep + 1} at a time, take {needed / 1e9:.1f} GB more"
        raise JobError("out", job.out, problem, "free disk space, lower checkpoint.keep, or choose another out")
