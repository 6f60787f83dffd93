"""A trial as Ray Tune has it: a process that trains, and what its metrics file tells.

The process is a driver of its own on the same cluster (see `child`). So it is stopped as a Ctrl-C stops a training job,
and all that it started, actors and placement groups, ends with it: Ray ends what belongs to a driver that is gone.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray import tune

from cosmic_ray import storage
from cosmic_ray.errors import CosmicError
from cosmic_ray.training.record import METRICS, read_metrics
from cosmic_ray.tuning.child import ENDING, JOB

LOG = "log.txt"
_LOG_BYTES = 2**20
_STOPS_S = 300.0
"""Saving a checkpoint takes less; then the process is killed."""
_LOOK_S = {True: 0.5, False: 5.0}
"""Between two looks at metrics on a local file system, or on S3."""


@ray.remote(num_cpus=0)
class Bell:
    """Rung when a trial, or all of them, are to end. Trials look at it: a call to one would wait for its next value."""

    def __init__(self) -> None:
        self._rung: set[int | None] = set()

    def ring(self, number: int | None = None) -> None:
        """For a trial, which then has `stopped`; without one for all, which then are `interrupted`."""
        self._rung.add(number)

    def rung(self, number: int) -> str | None:
        """What the trial is to end as; None while it is to go on."""
        return "interrupted" if None in self._rung else "stopped" if number in self._rung else None


class TrialRun(tune.Trainable):
    """One trial. Every step of Tune's is one evaluation: `step` (of the training) and `value`; the last result is
    `done`, with its `ending` and, where there is one, its `error`: finished, stopped, interrupted, failed; or unusable,
    where no trial of this search can have a value."""

    def setup(self, config: dict[str, Any], bell: Any, metric: str, environment: Mapping[str, str]) -> None:
        """Start training `config["job"]`, JSON. `environment`: further variables of the process."""
        self._bell, self._number, self._metric = bell, config["number"], metric
        job = json.loads(config["job"])
        self._out, self._told = job["out"], {}
        self._look_s = _LOOK_S[storage.is_local(self._out)]
        self._process = Process(job, environment)

    def step(self) -> dict[str, Any]:
        """Wait for the next evaluation, or the end."""
        while True:
            if wanted := ray.get(self._bell.rung.remote(self._number)):
                return self._last(wanted)
            ending = self._process.ending()  # asked first: what was told before it has been written by now
            line = next((each for each in read_metrics(storage.join(self._out, METRICS)) if self._is_new(each)), None)
            if line is not None:
                return self._result(line)
            if ending is not None:
                # Stopped, and not by us: the whole search was, by a signal to all of its processes.
                return self._last({"stopped": "interrupted"}.get(ending["ending"], ending["ending"]), ending["error"])
            time.sleep(self._look_s)

    def cleanup(self) -> None:
        """Stop training, if it still goes on, and keep what the process said."""
        self._process.stop()
        with suppress(CosmicError):  # a log that cannot be kept ends no search
            storage.write_bytes(storage.join(self._out, LOG), self._process.said())
        self._process.close()

    def _is_new(self, line: Mapping[str, Any]) -> bool:
        evaluated = any(name.startswith("val/") for name in line)
        return evaluated and line["step"] > self._told.get("step", -1)

    def _result(self, line: dict[str, Any]) -> dict[str, Any]:
        if self._metric not in line:
            told = ", ".join(sorted(name for name in line if name.startswith("val/")))
            return self._last("unusable", f"the job reports {told}")
        if line[self._metric] is None:
            return self._last("failed", f"{self._metric} was not finite after step {line['step']}")
        self._told = {"step": line["step"], "value": line[self._metric]}
        return dict(self._told)

    def _last(self, ending: str, error: str | None = None) -> dict[str, Any]:
        self._process.stop()
        if ending == "finished" and not self._told:
            ending, error = "failed", "it was never evaluated"
        return {**self._told, "done": True, "ending": ending, "error": error}


class Process:
    """A training job in a process of its own, on the cluster of this one."""

    def __init__(self, job: Mapping[str, Any], environment: Mapping[str, str]):
        self._folder = Path(tempfile.mkdtemp(prefix="cosmic-ray-trial-"))
        (self._folder / JOB).write_text(json.dumps(job))
        with open(self._folder / LOG, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cosmic_ray.tuning.child", str(self._folder)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, **_connection(), **environment},
                start_new_session=True,  # a Ctrl-C at the terminal is the search's to handle
            )

    def ending(self) -> dict[str, Any] | None:
        """How it ended, as `child` says; None while it runs."""
        if (code := self._process.poll()) is None:
            return None
        try:
            return json.loads((self._folder / ENDING).read_text())
        except FileNotFoundError:
            last = self.said().decode(errors="replace").strip().splitlines()[-5:]
            return {"ending": "failed", "error": "\n".join([f"its process ended with code {code}", *last])}

    def stop(self) -> None:
        """Let it save and stop; kill it where that takes too long."""
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_STOPS_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def said(self) -> bytes:
        """The end of what it printed."""
        return (self._folder / LOG).read_bytes()[-_LOG_BYTES:]

    def close(self) -> None:
        """Forget it."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _connection() -> dict[str, str]:
    """The variables by which a process joins this cluster as a driver, with the runtime environment of this one."""
    context = ray.get_runtime_context()
    environment = dict(context.runtime_env or {})
    return {
        "RAY_ADDRESS": context.gcs_address,
        "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": environment}),
    }
