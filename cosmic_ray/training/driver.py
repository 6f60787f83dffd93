"""The driver around Ray Train: starts the workers, follows them, starts them again when one dies or hangs.

Ray Train gives the processes, the process group and the news that a worker died. What it would restore is not used:
checkpoints are ours (a run goes on from the newest whole one), and so are the decision to start again, since only we
know whether an attempt got any further, and the number of workers.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from cosmic_ray import storage
from cosmic_ray.cluster import stop_on_signal
from cosmic_ray.errors import CosmicError
from cosmic_ray.progress import Progress, progress, say
from cosmic_ray.training import checkpoint, room
from cosmic_ray.training.crew import Crew
from cosmic_ray.training.loop import Callback
from cosmic_ray.training.settings import Scaling

if TYPE_CHECKING:
    from cosmic_ray.training.base import TrainingJob

_PUMP_S = 0.2
_HEALTH_CHECK_S = 0.5


class TrainingFailed(CosmicError):
    """A run that no restart would mend, or that got no further in several attempts."""

    def __init__(self, text: str, exit_code: int = 1):
        super().__init__(text)
        self.exit_code = exit_code


def train(
    job: TrainingJob,
    steps: int,
    gpus_per_worker: float,
    callbacks: Sequence[Callback],
    require: Callable[[], None],
    mend: Callable[[Mapping[str, Any]], bool] = lambda failure: False,
) -> int:
    """Train until the last step; Ray must be up.

    Args:
        job: whose checkpoints lie in `<out>/checkpoints`.
        steps: in all, for the progress.
        gpus_per_worker: 0 trains on CPUs.
        callbacks: told in this process, in order.
        require: raises where this process may no longer write to the job's `out`; asked all the time.
        mend: whether the run can go on after a failure that starting again alone would not mend; what it was, in
            `type`, `text`, and of a DataError `uri` and `problem`.

    Returns:
        The steps done.

    Raises:
        KeyboardInterrupt: after SIGINT, when the workers have saved and stopped.
        TrainingFailed: where the workers met an error that is the user's to mend, or died too often.
    """
    from cosmic_ray.training.wire import free_places, make_wire

    wire, failures = make_wire(), 0
    with (
        stop_on_signal("saving and stopping at the end of this step; once more to stop at once") as stop,
        closing(Crew(job.scaling, gpus_per_worker, stop)) as crew,
        progress("train", steps, "steps") as shown,
    ):
        follow = _Follower(wire, callbacks, shown, stop, require)
        while True:
            before = checkpoint.newest(checkpoint.within(job.out))
            try:
                ending = follow.until_done(_Attempt(job, wire, crew.gather(), gpus_per_worker), crew)
            finally:
                free_places(wire)
            if ending is None:
                after = checkpoint.newest(checkpoint.within(job.out))
                failures = 1 if after != before else failures + 1
                if failures > job.scaling.max_failures:
                    text = f"{failures} attempts in a row got no further: {follow.reason}"
                    raise TrainingFailed(f"{text}\n{follow.trace}".rstrip())
                say(f"{follow.reason}; starting the workers again from {storage.name(after) if after else 'the start'}")
            elif ending["ending"] == "failed":
                if not mend(ending):
                    raise TrainingFailed(ending["text"], ending["exit_code"])
                failures = 0
            elif ending["ending"] == "finished":
                return ending["step"]
            elif stop.is_set():
                say(f"saved after step {ending['step']}")
                raise KeyboardInterrupt
            else:
                say(f"{follow.reason}; saved after step {ending['step']}, going on with other workers")


class _Attempt:
    """One `TorchTrainer.fit`, in a thread: in the main one Ray Train would put its own handler on SIGINT."""

    def __init__(self, job: TrainingJob, wire: Any, workers: int, gpus_per_worker: float):
        self._job, self._wire, self._workers, self._gpus = job, wire, workers, gpus_per_worker
        self.result: dict[str, Any] | None = None
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="ray-train", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        folder = tempfile.mkdtemp(prefix="cosmic-ray-train-")
        try:
            self.result = self._fit(folder)
        except Exception as error:
            self.error = error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _fit(self, folder: str) -> dict[str, Any]:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig
        from ray.train.v2.api.config import LoggingConfig

        from cosmic_ray.training.worker import Trainer, work

        scaling = self._job.scaling
        os.environ |= _environment(scaling)
        trainer = Trainer(
            work,
            train_loop_config={"job": self._job, "wire": self._wire},
            scaling_config=ScalingConfig(
                num_workers=self._workers,
                use_gpu=bool(self._gpus),
                resources_per_worker=room.bundle(scaling, self._gpus),
            ),
            torch_config=TorchConfig(timeout_s=round(scaling.hang_timeout_s) + 60),
            run_config=RunConfig(
                name=storage.name(self._job.out),
                storage_path=folder,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        return trainer.fit().return_value


class _Follower:
    """Hands on what the workers tell while an attempt lasts, and the wish to stop to them."""

    def __init__(
        self,
        wire: Any,
        callbacks: Sequence[Callback],
        shown: Progress,
        stop: threading.Event,
        require: Callable[[], None],
    ):
        self._wire, self._callbacks, self._shown, self._stop = wire, callbacks, shown, stop
        self._require = require
        self._note = ""
        self.reason = ""
        """Why the last attempt failed, or was asked to stop."""
        self.trace = ""
        """Where in the code the last attempt failed, if it was there."""

    def until_done(self, attempt: _Attempt, crew: Crew) -> dict[str, Any] | None:
        """What the workers returned, or the failure that starting again would not mend; None where they died.

        Raises:
            FencedError: where another run has taken `out` over.
        """
        import ray
        from ray.train import TrainingFailedError

        ray.get(self._wire.go_on.remote())
        told_to_stop = False
        while attempt.alive:
            time.sleep(_PUMP_S)
            self._require()
            if not told_to_stop and (self._stop.is_set() or self._wants_change(crew)):
                told_to_stop = True
                ray.get(self._wire.stop.remote())
            self._hand_on(ray.get(self._wire.take.remote()))
        self._hand_on(ray.get(self._wire.take.remote()))
        if attempt.result is not None:
            return attempt.result
        if failure := ray.get(self._wire.failure.remote()):
            return {"ending": "failed", **failure}
        if self._stop.is_set():
            raise KeyboardInterrupt
        if not isinstance(attempt.error, TrainingFailedError | ray.exceptions.RayError):
            raise attempt.error
        self.reason, self.trace = _why(attempt.error)
        return None

    def _wants_change(self, crew: Crew) -> bool:
        import ray

        reason = crew.change(ray.get(self._wire.nodes.remote()))
        self.reason = reason or self.reason
        return reason is not None

    def _hand_on(self, events: list[tuple]) -> None:
        from cosmic_ray.training.wire import SAY

        for event, *facts in events:
            if event == SAY:
                say(*facts)
                continue
            for callback in self._callbacks:
                getattr(callback, event)(*facts)
            if event in ("on_step", "on_eval"):
                self._show(*facts)

    def _show(self, step: int, metrics: Mapping[str, float]) -> None:
        losses = [f"{name} {value:.4f}" for name, value in metrics.items() if name.endswith("loss")]
        self._note = ", ".join(losses) or self._note
        self._shown.update(step, self._note)


def _environment(scaling: Scaling) -> dict[str, str]:
    """Ray Train's settings that it takes from the environment alone."""
    return {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(_HEALTH_CHECK_S),
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(scaling.hang_timeout_s),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(max(60.0, scaling.hang_timeout_s)),
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
    }


_DEATHS = {"WorkerHealthCheckFailedError": "died", "WorkerHealthCheckTimeoutError": "no longer answers"}


def _why(error: Exception | None) -> tuple[str, str]:
    """What ended an attempt, in a line; and the traceback of the first worker that raised, if no worker died."""
    failures = getattr(error, "worker_failures", None)
    if not failures:
        return f"the workers could not be run ({type(error).__name__}: {_first_line(error)})", str(error)
    gone = [f"worker {rank} {_DEATHS[name]}" for rank, cause in failures.items()
            if (name := type(cause).__name__) in _DEATHS]  # fmt: skip
    if gone:
        return "; ".join(gone), ""
    trace = str(next(iter(failures.values()))).partition("\n")[2]
    return "; ".join(_first_line(cause) for cause in failures.values()), trace


def _first_line(error: Exception | None) -> str:
    return str(error).strip().partition("\n")[0][:200]
