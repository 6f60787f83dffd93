"""`tune`: the settings of a training job that do best on `val`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from cosmic_ray import storage
from cosmic_ray.config import Config, Job, parse_yaml
from cosmic_ray.errors import ABSENT, JobError, JobErrors
from cosmic_ray.reach import uris
from cosmic_ray.training.base import TrainingJob
from cosmic_ray.tuning.space import Range, flat, lay

_PREFIX = "job"
_FIXED = {
    "kind": "trials of other kinds cannot be compared",
    "out": "every trial has its own below the search's",
    "where": "trials on other samples cannot be compared",
    "seed": "the best seed is luck",
    "recipe": "recipes differ in what their loss means: search each on its own",
}


class Asha(Config):
    """Asynchronous successive halving (Li et al. 2020, algorithm 2): a trial that is worse than others were after as
    many steps is stopped."""

    grace: int = Field(1000, ge=1)
    """Steps that every trial gets. It is looked at again after `reduction` times as many, and so on."""

    reduction: float = Field(3.0, gt=1)
    """At each look the best 1 / `reduction` of those that came so far go on."""


class Tune(Job):
    """Search the settings of a training job, measured on `val`.

    Below `out`: `best.yaml` (the job file with the best settings; it runs as it is), `trials.json` and
    `trials.parquet` (every trial's settings, steps, value and state), `trials/ID/` (each trial's own output). Trials
    register no model and never see `test`. A stopped search goes on where it was; finished trials are not run again.
    """

    kind: ClassVar[str] = "tune"
    incidental: ClassVar[frozenset[str]] = frozenset({"concurrent"})

    job: dict[str, Any] | str
    """A whole training job (`kind:` and its keys), or the path of its file; {file: PATH, KEY: VALUE, ...} lays keys
    over a file's. Its `out` is not used."""

    space: dict[str, Range] = Field(min_length=1)
    """Dotted key of the job -> its values. What decides on which data, or how the metric is measured, cannot vary; nor
    should what changes the meaning of the metric, as weights in the loss do."""

    metric: str = Field("val/loss", pattern="^val/.")
    """What to compare: a metric on `val`, as in the job's metrics.jsonl. A trial's is that of its last evaluation."""

    mode: Literal["min", "max"] = "min"
    """Whether less of it is better, or more."""

    trials: int = Field(16, ge=1)
    """Trials in all. The first six are drawn at random, the others by Optuna's tree-structured Parzen estimator from
    what the earlier ones gave (Bergstra et al. 2011)."""

    concurrent: int = Field(1, ge=1)
    """Trials at a time. With one, the same seed gives the same trials, however often the search is interrupted."""

    asha: Asha | None = Asha()
    """When to stop a bad trial early; null runs all to their end."""

    seed: int = 0
    """Decides which settings are tried."""

    _base: TrainingJob = PrivateAttr()
    _tree: dict[str, Any] = PrivateAttr()

    @field_validator("space", mode="before")
    @classmethod
    def _dotted(cls, space: Any) -> Any:
        return flat(space)

    @model_validator(mode="after")
    def _every_end_is_a_job(self) -> Tune:
        from cosmic_ray.jobs import job_class, make

        tree = {**_tree(self.job), "out": storage.join(storage.absolute(self.out), "best")}
        if "kind" in tree and not issubclass(job_class(tree["kind"], f"{_PREFIX}.kind"), TrainingJob):
            problem = "trains no network, so there is nothing to search"
            raise JobError(f"{_PREFIX}.kind", tree["kind"], problem, "give a training job")
        self._base = base = make(tree, _PREFIX)
        own = {key: uri for key, uri in uris(base) if not uri.startswith("models:") and not key.startswith("tracking.")}
        self._tree = lay(tree, {key: storage.absolute(uri) for key, uri in own.items()})
        errors = [error for key, values in self.space.items() if (error := self._problem(key, values))]
        if errors:
            raise errors[0] if len(errors) == 1 else JobErrors(errors)
        self._require_looks()
        return self

    @property
    def base(self) -> TrainingJob:
        """The job as it is without the search; its `out` is where `best.yaml` will write."""
        return self._base

    def with_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The job file with `settings` laid over it, local paths made absolute; it registers what the job does."""
        return lay(self._tree, settings)

    def trial(self, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The job file of one trial."""
        tree = {**self.with_settings(settings), "out": storage.join(storage.absolute(self.out), "trials", name)}
        if self._base.tracking is None:
            return tree
        from cosmic_ray.registry.server import tracking_uri

        given = self._base.tracking.uri
        there = {"tracking.uri": tracking_uri(given)} if given else {}
        return lay(tree, {"tracking.register_as": None, **there})

    def check(self) -> None:
        """Check the job's inputs, network and plan."""
        self._base.check()

    def run(self) -> dict[str, Any]:
        """Search, going on after what is done.

        Returns:
            `best` (URI of the job file), `trial`, `settings`, `value`, `steps`, and how many trials `finished`, were
            `stopped` early or `failed`.
        """
        from cosmic_ray.tuning import search

        return search.run(self)

    def nested(self) -> dict[str, Job]:
        """`job` -> the job that is searched."""
        return {_PREFIX: self._base}

    def resolved(self) -> dict[str, Any]:
        """The search with its job resolved."""
        return {**super().resolved(), _PREFIX: self._base.resolved()}

    def fingerprint(self) -> str:
        """What is searched; the job may change in its own incidental keys, but for those that measure."""
        kept = {key: value for key, value in self.resolved().items() if key not in ("out", *self.incidental)}
        kept[_PREFIX] = [self._base.fingerprint(), self._base.eval.model_dump()]
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]

    def _problem(self, key: str, values: Range) -> JobError | None:
        """Why `key` cannot have these values."""
        from cosmic_ray.jobs import make

        first, where = key.partition(".")[0], f"space.{key}"
        if first in _FIXED:
            return JobError(where, ABSENT, f"must not vary: {_FIXED[first]}")
        if first in self._base.incidental:
            return JobError(
                where, ABSENT, "must not vary: it changes how a job runs or is measured, not what it trains"
            )
        reads = set(uris(make(self._tree, _PREFIX)))
        for value in values.ends:
            try:
                if set(uris(make(lay(self._tree, {key: value}), _PREFIX))) != reads:
                    return JobError(where, value, "must not vary: trials on other data cannot be compared")
            except JobErrors as error:
                return JobError(where, value, error.errors[0].problem, error.errors[0].remedy)
            except JobError as error:
                return JobError(where, value, error.problem, error.remedy)
        return None

    def _require_looks(self) -> None:
        """See that ASHA has something to look at, and something left to stop."""
        if self.asha is None:
            return
        every, steps = self._base.eval.every, self._base.steps
        if every > self.asha.grace:
            problem = f"the job is evaluated every {every} steps, so there would be nothing to look at by then"
            raise JobError("asha.grace", self.asha.grace, problem, f"job.eval.every={self.asha.grace}")
        if steps is not None and steps <= self.asha.grace:
            problem = f"the job has {steps} steps, so no trial would be stopped early"
            raise JobError("asha.grace", self.asha.grace, problem, "choose fewer, or asha=null")


def _tree(given: dict[str, Any] | str) -> dict[str, Any]:
    """The keys of the job: as they stand, or laid over those of a file."""
    if isinstance(given, str):
        given = {"file": given}
    if "file" not in given:
        return given
    path = given["file"]
    try:
        tree = parse_yaml(Path(path).read_text(), path)
    except (OSError, UnicodeDecodeError, TypeError) as error:
        raise JobError(f"{_PREFIX}.file", path, f"cannot be read as a job file: {error}") from None
    if not isinstance(tree, dict):
        raise JobError(f"{_PREFIX}.file", path, "not a job file: expected a mapping with kind: and that kind's keys")
    return _over(tree, {key: value for key, value in given.items() if key != "file"})


def _over(base: Any, tree: Any) -> Any:
    """`tree` laid over `base`, mapping by mapping."""
    if isinstance(base, dict) and isinstance(tree, dict):
        return {**base, **{key: _over(base.get(key), value) for key, value in tree.items()}}
    return tree
