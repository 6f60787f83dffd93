"""`pipeline`: jobs that share a run folder, one after another; a finished one is not done again."""

from __future__ import annotations

import time
from typing import Any, ClassVar

from pydantic import PrivateAttr, model_validator

from cosmic_ray import storage
from cosmic_ray.config import Job
from cosmic_ray.errors import JobError
from cosmic_ray.output import MANIFEST
from cosmic_ray.progress import say

_OUT = "${out}"


class Pipeline(Job):
    """Jobs in order. In their keys `${out}` stands for the pipeline's own `out`."""

    kind: ClassVar[str] = "pipeline"

    steps: dict[str, dict[str, Any]]
    """name -> a whole job (`kind:` and its keys), done in this order. Override one as `steps.NAME.KEY=VALUE`."""

    _jobs: dict[str, Job] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _steps_are_jobs(self) -> Pipeline:
        from cosmic_ray.jobs import make

        if not self.steps:
            raise JobError("steps", {}, "a pipeline needs at least one step")
        out = storage.absolute(self.out)
        for name, tree in self.steps.items():
            tree = {"out": f"{_OUT}/{name}", **tree} if isinstance(tree, dict) else tree
            if isinstance(tree, dict) and tree.get("kind") == self.kind:
                raise JobError(f"steps.{name}.kind", self.kind, "a pipeline cannot hold a pipeline")
            self._jobs[name] = make(_placed(tree, out), f"steps.{name}")
        return self

    def check(self) -> None:
        """Check the first step whose output is missing; the later ones' inputs are not there yet."""
        missing = (job for job in self._jobs.values() if not _published(job))
        if (first := next(missing, None)) is not None:
            first.check()

    def run(self) -> dict[str, Any]:
        """Run each step, checked when its turn comes.

        Returns:
            step name -> its results, with `seconds`.
        """
        results: dict[str, Any] = {}
        for number, (name, job) in enumerate(self._jobs.items(), 1):
            say(f"[{number}/{len(self._jobs)}] {name} ({job.kind}) -> {job.out}")
            started = time.monotonic()
            check(job)
            results[name] = {**job.run(), "seconds": round(time.monotonic() - started, 2)}
        return results

    def nested(self) -> dict[str, Job]:
        """`steps.NAME` -> its job."""
        return {f"steps.{name}": job for name, job in self._jobs.items()}

    def resolved(self) -> dict[str, Any]:
        """The pipeline with every step resolved."""
        return {"kind": self.kind, "out": self.out, "steps": {name: job.resolved() for name, job in self._jobs.items()}}


def check(job: Job) -> None:
    """Check `job`, unless its output is published: a finished job is only looked at, and its inputs may be gone."""
    if not _published(job):
        job.check()


def _published(job: Job) -> bool:
    return storage.exists(storage.join(job.out, MANIFEST))


def _placed(value: Any, out: str) -> Any:
    """`value` with `${out}` replaced in every string inside."""
    if isinstance(value, str):
        return value.replace(_OUT, out)
    if isinstance(value, dict):
        return {key: _placed(inner, out) for key, inner in value.items()}
    if isinstance(value, list):
        return [_placed(inner, out) for inner in value]
    return value
