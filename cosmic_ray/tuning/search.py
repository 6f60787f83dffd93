"""The run of a `tune` job: Ray Tune, with ASHA and Optuna, around training jobs; then the best of them as a job file.

Ray Tune runs trials and stops the bad ones. What it would restore is not used: the trials' own files say what is done,
ASHA is told it again, the sampler gets it with every proposal, and an interrupted trial goes on from its checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from cosmic_ray import cluster, storage
from cosmic_ray.errors import CosmicError, JobError
from cosmic_ray.output import Output, claim
from cosmic_ray.progress import Progress, progress, say
from cosmic_ray.training import checkpoint, room
from cosmic_ray.tuning import report
from cosmic_ray.tuning.propose import propose
from cosmic_ray.tuning.tracked import Tracked, tracked
from cosmic_ray.tuning.trial import Bell, TrialRun
from cosmic_ray.tuning.trials import FOLDER, Trial, Trials, best

if TYPE_CHECKING:
    from cosmic_ray.tuning.job import Tune

FORMAT, VERSION = "cosmic-ray/tune", 1
DRIVER_CPUS = 0.05
"""Set aside for a trial's driver, which mostly waits; Ray Tune's trials cannot have nothing."""
_STOPPING = "the running trials save and stop; once more to stop at once"
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a failed trial's last result has no value
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
_NODE_LOSSES = 3
# What they miss are files of Ray Tune's that nobody reads.
_NOISY = ("ray.tune.analysis.experiment_analysis",)
_FAR = 10**12
"""Steps that no training has: its own last one is where a trial ends."""


def run(job: Tune) -> dict[str, Any]:
    """See `Tune.run`."""
    with claim(job) as output:
        if not output.done:
            with tracked(job, output) as tracking:
                _search(job, output, tracking)
                results = _finish(job, output, Trials(output).all(), tracking)
                output.publish({"format": FORMAT, "version": VERSION, "job": job.resolved(), "results": results})
        report.show(Trials(output).all(), job)
        return output.manifest()["results"]


def _search(job: Tune, output: Output, tracking: Tracked) -> None:
    """Run all trials that have not ended.

    Raises:
        KeyboardInterrupt: after SIGINT, when the trials have saved and stopped.
    """
    trials = Trials(output)
    if len(trials.ended()) == job.trials:
        return
    _require_room(job, cluster.connect())
    cluster.require_seen_everywhere({"out": output.at("job.json")})
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    folder = tempfile.mkdtemp(prefix="cosmic-ray-tune-")
    with _environment(), cluster.stop_on_signal(_STOPPING) as stop, progress("tune", job.trials, "trials") as shown:
        bell = Bell.remote()
        follower = _Follower(job, output, trials, tracking, shown, stop, bell)
        with_job = tune.with_parameters(TrialRun, bell=bell, metric=job.metric, environment=tracking.environment)
        try:
            tune.run(  # a Tuner would keep everything as pickles, the claim on `out` included
                with_job,
                name="tune",
                resources_per_trial={"CPU": DRIVER_CPUS},
                num_samples=-1,
                search_alg=_Proposer(job, trials, stop),
                scheduler=_scheduler(job, trials, bell),
                storage_path=folder,
                verbose=0,
                callbacks=[follower],
                max_failures=_NODE_LOSSES,
                raise_on_failed_trial=False,
                trial_dirname_creator=lambda trial: f"{trial.config['number']:04}",
            )
        finally:
            ray.kill(bell)
            shutil.rmtree(folder, ignore_errors=True)
    if follower.refused:
        raise follower.refused
    if stop.is_set():
        raise KeyboardInterrupt


class _Proposer(Searcher):
    """Hands Ray Tune the trials: those that were interrupted, in order, then new ones."""

    def __init__(self, job: Tune, trials: Trials, stop: threading.Event):
        super().__init__(metric="value", mode=job.mode)
        self._job, self._trials, self._stop = job, trials, stop
        self._interrupted = [trial.number for trial in trials.all() if trial.state == "running"]
        self._live: set[str] = set()

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        """Ray Tune has nothing to add: the space is the job's."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial's config; None while as many as allowed run."""
        if self._stop.is_set() or not (self._interrupted or len(self._trials.all()) < self._job.trials):
            return Searcher.FINISHED
        if len(self._live) == self._job.concurrent:
            return None
        self._live.add(trial_id)
        number = self._interrupted.pop(0) if self._interrupted else self._new()
        trial = self._trials[number]
        return {"number": number, "job": json.dumps(self._job.trial(trial.name, trial.settings))}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Make room for another."""
        self._live.discard(trial_id)

    def save_to_dir(self, *_: Any, **__: Any) -> None:
        """Nothing: the trials' own files are what is restored."""

    def _new(self) -> int:
        known = self._trials.all()
        number = len(known)
        settings = propose(self._job.space, self._job.seed, number, known, self._job.mode)
        self._trials.put(Trial(number, settings))
        return number


class _Asha(AsyncHyperBandScheduler):
    """ASHA that asks a bad trial to end. Ray Tune would end it in the midst, and start the next one beside what is left
    of it; in the search's last seconds it would kill it."""

    def __init__(self, job: Tune, bell: Any):
        super().__init__(
            time_attr="step",
            metric="value",
            mode=job.mode,
            max_t=_FAR,
            grace_period=job.asha.grace,
            reduction_factor=job.asha.reduction,
            stop_last_trials=False,
        )
        self._bell = bell

    def tell(self, trial: Trial) -> None:
        """What a trial that has ended gave."""
        past = SimpleNamespace(trial_id=trial.name)
        self.on_trial_add(None, past)
        for step, value in trial.values:
            super().on_trial_result(None, past, {"step": step, "value": value})
        self.on_trial_remove(None, past)

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Go on; a bad trial hears at its next step that it is to end."""
        if super().on_trial_result(controller, trial, result) == TrialScheduler.STOP:
            ray.get(self._bell.ring.remote(trial.config["number"]))
        return TrialScheduler.CONTINUE


def _scheduler(job: Tune, trials: Trials, bell: Any) -> TrialScheduler:
    """ASHA, told what the trials that ended gave."""
    if job.asha is None:
        return FIFOScheduler()
    asha = _Asha(job, bell)
    for trial in trials.ended():
        asha.tell(trial)
    return asha


class _Follower(tune.Callback):
    """Keeps what the trials tell, shows it, and hands on the wish to stop."""

    def __init__(
        self,
        job: Tune,
        output: Output,
        trials: Trials,
        tracking: Tracked,
        shown: Progress,
        stop: threading.Event,
        bell: Any,
    ):
        self._job, self._output, self._trials, self._tracking = job, output, trials, tracking
        self._shown, self._stop, self._bell, self._rung = shown, stop, bell, False
        self.refused: JobError | None = None
        """Why no trial of this search can have a value."""
        self._show()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Raises FencedError where another run has taken the search over."""
        self._output.require()
        if not self._rung and (self._stop.is_set() or self.refused):
            self._rung = True
            ray.get(self._bell.ring.remote())

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """A value, or the end, told with the last value."""
        known = self._trials[trial.config["number"]]
        if "step" in result:
            known = known.with_value(result["step"], result["value"])
        if result.get("done"):
            known = self._ended(known, result["ending"], result["error"])
        self._keep(known)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its process's node was lost too often."""
        error = str(trial.get_error() or "lost").strip().splitlines()[-1]
        self._keep(replace(self._trials[trial.config["number"]], state="failed", error=error))

    def get_state(self) -> None:
        """None: nothing here is restored."""

    def _ended(self, known: Trial, ending: str, error: str | None) -> Trial:
        if ending == "unusable":
            self.refused = JobError("metric", self._job.metric, f"not reported: {error}", "choose one of these")
            self._stop.set()
        if ending in ("unusable", "interrupted"):
            return known
        return replace(known, state=ending, error=error)

    def _keep(self, trial: Trial) -> None:
        self._trials.put(trial)
        self._tracking.tell(trial, len(self._trials.ended()))
        if trial.state != "running":
            told = trial.error.splitlines()[0] if trial.error else f"{self._job.metric} {report.number(trial.value)}"
            say(f"trial {trial.name} {trial.state} after step {trial.steps}: {told}")
        self._show(trial)

    def _show(self, trial: Trial | None = None) -> None:
        found = best(self._trials.all(), self._job.mode)
        notes = [f"best {report.number(found.value)} of trial {found.name}"] if found else []
        if trial and trial.state == "running" and trial.values:
            notes.append(f"trial {trial.name} at step {trial.steps}: {report.number(trial.value)}")
        self._shown.update(len(self._trials.ended()), "; ".join(notes))


def _finish(job: Tune, output: Output, trials: list[Trial], tracking: Tracked) -> dict[str, Any]:
    """Write the best trial's job file and the tables.

    Raises:
        CosmicError: where no trial came to a value.
    """
    winner = best(trials, job.mode)
    if winner is None:
        first = f"trial {trials[0].name}: {trials[0].error}"
        raise CosmicError(f"all {len(trials)} trials failed; {first} (mend it, and search in another out)")
    for trial in trials:
        if trial.state == "stopped":
            storage.delete(checkpoint.within(output.at(FOLDER, trial.name)))
    report.write(job, output, trials, winner)
    tracking.finish(winner)
    counts = Counter(trial.state for trial in trials)
    return {
        "best": output.at(report.BEST),
        "trial": winner.name,
        "settings": winner.settings,
        "value": winner.value,
        "steps": winner.steps,
        **{state: counts[state] for state in ("finished", "stopped", "failed")},
    }


def _require_room(job: Tune, found: cluster.Resources) -> None:
    """See that as many trials as asked for fit beside each other; each one's own needs are checked as it starts."""
    scaling = job.base.scaling
    gpus = scaling.gpus_per_worker if scaling.gpus_per_worker is not None else float(found.gpus > 0)
    each = room.bundle(scaling, 0)

    def fit(trials: int) -> bool:
        first, *others = sorted(found.node_cpus, reverse=True)
        nodes = [first - DRIVER_CPUS * trials, *others]
        enough_gpus = gpus * scaling.fewest * trials <= found.gpus
        return enough_gpus and room.fits(({"CPU": cpus} for cpus in nodes), each) >= scaling.fewest * trials

    at_once = next(trials for trials in range(job.concurrent, -1, -1) if fit(trials))
    if at_once < job.concurrent:
        shown = " and ".join(f"{amount:g} {name}s" for name, amount in room.bundle(scaling, gpus).items())
        problem = (
            f"a trial has {scaling.fewest} workers of {shown}, beside {DRIVER_CPUS:g} CPUs to drive it; "
            f"there is room for {at_once}"
        )
        remedy = f"concurrent={at_once}" if at_once else "a smaller job.scaling.cpus_per_worker"
        raise JobError("concurrent", job.concurrent, problem, remedy)


@contextmanager
def _environment() -> Iterator[None]:
    """Ray Tune's settings that it takes from the environment alone, for a block."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ |= _ENVIRONMENT
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
