"""A search in MLflow: a run of its own, with the trials' runs nested in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cosmic_ray import storage
from cosmic_ray.errors import NotFoundError
from cosmic_ray.output import Output, read_manifest
from cosmic_ray.progress import say
from cosmic_ray.reach import TRACKING, uris
from cosmic_ray.tuning.report import BEST
from cosmic_ray.tuning.trials import FOLDER, Trial

if TYPE_CHECKING:
    from cosmic_ray.registry.tracking import Tracker
    from cosmic_ray.tuning.job import Tune

_PARENT = "mlflow.parentRunId"
"""The tag by which MLflow nests runs."""


class Tracked:
    """Tells MLflow of the trials, where the job that is searched is tracked."""

    def __init__(self, job: Tune, output: Output, tracker: Tracker | None, uri: str | None):
        self._job, self._output, self._tracker, self._uri = job, output, tracker, uri
        self._nested: set[tuple[int, str]] = set()

    @property
    def environment(self) -> dict[str, str]:
        """What the trials' processes need to find the same server. (In their job files a password would be kept.)"""
        return {TRACKING: self._uri} if self._uri and self._job.base.tracking.uri is None else {}

    def tell(self, trial: Trial, ended: int) -> None:
        """A trial has a new value or has ended, as the `ended`th."""
        if self._tracker is None:
            return
        if trial.state != "running" and trial.value is not None:
            self._tracker.on_eval(ended, {f"trials/{self._job.metric}": trial.value})
        if (trial.number, trial.state) not in self._nested and self._nest(trial):
            self._nested.add((trial.number, trial.state))

    def finish(self, winner: Trial) -> None:
        """Keep the best trial's job file."""
        if self._tracker is not None:
            self._tracker.picture(self._output.at(BEST), "search")

    def _nest(self, trial: Trial) -> bool:
        """Mark the trial's run as one of this search; whether that is done."""
        from cosmic_ray.registry import server
        from cosmic_ray.registry.run import RECORD

        try:
            record = storage.read_json(self._output.at(FOLDER, trial.name, RECORD))
        except NotFoundError:
            return False
        if not (parent := self._tracker.run_id) or "run_id" not in record:
            return False
        tags = {_PARENT: parent, "cosmic_ray.trial": trial.name, "cosmic_ray.trial_state": trial.state}
        try:
            server.require(self._uri)
            client = server.connect(self._uri)
            for key, text in tags.items():
                client.set_tag(record["run_id"], key, text)
        except Exception as error:  # tracking never ends a search
            say(f"tracking: trial {trial.name} was not nested ({type(error).__name__})")
            return False
        return True


@contextmanager
def tracked(job: Tune, output: Output) -> Iterator[Tracked]:
    """The search's run, for a block; without one where the job that is searched is not tracked."""
    if job.base.tracking is None:
        yield Tracked(job, output, None, None)
        return
    from cosmic_ray.registry.server import tracking_uri
    from cosmic_ray.registry.tracking import Tracker

    uri, inputs = tracking_uri(job.base.tracking.uri), _inputs(job)
    lineage = {key: {"uri": at, "content_hash": manifest.get("content_hash")} for key, (at, manifest) in inputs.items()}
    simulated = any(manifest.get("simulated") for _, manifest in inputs.values())
    with Tracker(
        output.uri, job.resolved(), name=job.kind, lineage=lineage, simulated=simulated, uri=job.base.tracking.uri
    ) as tracker:
        yield Tracked(job, output, tracker, uri)


def _inputs(job: Tune) -> dict[str, tuple[str, dict[str, Any]]]:
    """What the searched job reads: key -> URI and manifest, of what has one."""
    found = {}
    for key, uri in uris(job.base):
        if "." not in key and key != "out" and not uri.startswith("models:"):
            try:
                found[key] = (storage.absolute(uri), read_manifest(uri))
            except NotFoundError:
                continue
    return found
