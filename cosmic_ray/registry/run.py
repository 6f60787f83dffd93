"""One MLflow run for one job, found again by whoever continues the job; events are applied to it idempotently."""

from __future__ import annotations

import os
import re
import socket
import tempfile
import time
import uuid
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from cosmic_ray import storage
from cosmic_ray.errors import NotFoundError
from cosmic_ray.lease import is_alive, this_machine
from cosmic_ray.output import encode
from cosmic_ray.progress import say
from cosmic_ray.registry import server
from cosmic_ray.registry.lineage import flat
from cosmic_ray.registry.scrub import scrub_text
from cosmic_ray.registry.spool import Event

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RECORD = "tracking.json"
TOKEN, PROCESS = "cosmic_ray.token", "cosmic_ray.process"
_METRICS_A_BATCH, _PARAMS_A_BATCH, _PARAM_CHARS, _TAG_CHARS = 1000, 100, 6000, 8000
_REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"}
"""MLflow's answers that would be the same tomorrow: the event is dropped, with a line that says so."""


class MlflowRun:
    """The run of the job whose output folder is `out`.

    `tracking.json` there remembers it. A token is written first and stands as a tag on the run, so that a process
    killed between the making of the run and the writing of its id does not leave a second run to the next.

    A metric is logged once for each (key, step): steps at or before the last one that the run has are left out, since a
    run resumed from a checkpoint repeats the steps after it.
    """

    def __init__(self, out: str, uri: str):
        self.uri = uri
        self._out = out
        self._record = _read_record(out)
        self._client: MlflowClient | None = None
        self._run: Run | None = None
        self._last_step: dict[str, int] = {}
        self._apply: dict[str, Callable[[Any], None]] = {
            "start": self._start,
            "metrics": self._metrics,
            "tags": self._tags,
            "artifact": self._artifact,
            "json": self._json,
            "register": self._register,
            "end": self._end,
            "published": self._published,
        }

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until it was opened."""
        return self._record.get("run_id")

    @property
    def status(self) -> str | None:
        """As the server was last told: RUNNING, FINISHED, FAILED, KILLED; None before that."""
        return self._record.get("status")

    @property
    def registered(self) -> dict[str, str]:
        """Registered model name -> version, of those that this run registered."""
        return dict(self._record.get("registered", {}))

    def send(self, events: list[Event]) -> None:
        """Apply events in order.

        Raises:
            Exception: where the server is away; events may have been applied, and may be sent again.
        """
        server.require(self.uri)
        if self._run is None:
            self._open()
        for op, same in groupby(events, key=lambda event: event["op"]):
            for unit in [list(same)] if op == "metrics" else [[event] for event in same]:
                try:
                    self._apply[op](*([unit] if op == "metrics" else unit))
                except Exception as error:
                    if _may_pass(error):
                        raise
                    say(f"tracking: not logged ({op}): {scrub_text(str(error))}")

    def _open(self) -> None:
        client = server.connect(self.uri)
        if not self._record.get("token"):
            self._remember(token=uuid.uuid4().hex)
        run = self._find(client)
        if run is None:
            experiment = server.experiment_id(client, self.uri)
            run = client.create_run(experiment, tags={TOKEN: self._record["token"]})
        self._client, self._run = client, run
        self._last_step = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        self._remember(uri=scrub_text(self.uri), experiment=server.EXPERIMENT, run_id=run.info.run_id)

    def _find(self, client: MlflowClient) -> Run | None:
        experiment = client.get_experiment_by_name(server.EXPERIMENT)
        if experiment is None:
            return None
        found = client.search_runs([experiment.experiment_id], f"tags.`{TOKEN}` = '{self._record['token']}'")
        return found[0] if found else None

    def _remember(self, **facts: Any) -> None:
        if any(self._record.get(key) != value for key, value in facts.items()):
            self._record |= facts
            storage.write_bytes(storage.join(self._out, RECORD), encode(self._record))

    @property
    def _id(self) -> str:
        return self._run.info.run_id

    def _start(self, event: Event) -> None:
        """Params stay as the first start logged them: MLflow's are immutable, and only incidental keys may differ."""
        from mlflow.entities import Param, RunTag

        self._end_orphans()
        self._client.update_run(self._id, status="RUNNING", name=event["name"])
        self._remember(status="RUNNING")
        tags = {**event["tags"], PROCESS: event["process"]}
        self._client.log_batch(self._id, tags=[RunTag(key, _cut(value, _TAG_CHARS)) for key, value in tags.items()])
        params = [
            Param(_key(key), _cut(value, _PARAM_CHARS))
            for key, value in flat(event["params"])
            if _key(key) not in self._run.data.params
        ]
        for start in range(0, len(params), _PARAMS_A_BATCH):
            self._client.log_batch(self._id, params=params[start : start + _PARAMS_A_BATCH])
        self._client.log_dict(self._id, event["params"], "job.yaml")

    def _metrics(self, events: list[Event]) -> None:
        from mlflow.entities import Metric

        new = [
            Metric(_key(key), value, event["time"], event["step"])
            for event in events
            for key, value in event["values"].items()
            if event["step"] > self._last_step.get(_key(key), -1)
        ]
        for start in range(0, len(new), _METRICS_A_BATCH):
            batch = new[start : start + _METRICS_A_BATCH]
            self._client.log_batch(self._id, metrics=batch)
            for metric in batch:
                self._last_step[metric.key] = max(metric.step, self._last_step.get(metric.key, -1))

    def _tags(self, event: Event) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(
            self._id, tags=[RunTag(key, _cut(text, _TAG_CHARS)) for key, text in event["tags"].items()]
        )

    def _artifact(self, event: Event) -> None:
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder, storage.name(event["uri"]))
            local.write_bytes(storage.read_bytes(event["uri"]))
            self._client.log_artifact(self._id, str(local), event["folder"])

    def _json(self, event: Event) -> None:
        self._client.log_dict(self._id, event["content"], event["path"])

    def _register(self, event: Event) -> None:
        from cosmic_ray.registry.register import register_model

        version = register_model(
            event["folder"], event["name"], alias=event["alias"], tracking=self.uri, run_id=self._id
        )
        self._remember(registered={**self.registered, event["name"]: version})

    def _end(self, event: Event) -> None:
        self._client.set_terminated(self._id, event["status"], event["time"])
        self._remember(status=event["status"])

    def _published(self, event: Event) -> None:
        """The job's output is there, so a run that nobody ended (its process was killed just then) has finished."""
        if self.status == "RUNNING":
            self._end({"status": "FINISHED", "time": event["time"]})

    def _end_orphans(self) -> None:
        """End the runs that a process of this machine left RUNNING when it was killed, this one's aside."""
        experiment = self._run.info.experiment_id
        for run in self._client.search_runs([experiment], "attributes.status = 'RUNNING'"):
            if run.info.run_id != self._id and _surely_dead(run.data.tags.get(PROCESS, "")):
                self._client.set_terminated(run.info.run_id, "KILLED")


def _may_pass(error: Exception) -> bool:
    """Whether the same call may succeed later: the server is away or overloaded, rather than refusing."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code not in _REFUSALS
    return isinstance(error, OSError)


def this_process() -> str:
    """Host, machine, process id and the time that it began: `host machine pid born`."""
    return f"{socket.gethostname()} {this_machine()} {os.getpid()} {psutil.Process().create_time():.2f}"


def now_ms() -> int:
    """MLflow's time: milliseconds since 1970."""
    return int(time.time() * 1000)


def _surely_dead(process: str) -> bool:
    """Whether what `this_process` once said was said by a process of this machine that is gone."""
    try:
        _, machine, pid, born = process.split(" ")
        return machine == this_machine() and not is_alive(int(pid), float(born))
    except ValueError:
        return False


def _read_record(out: str) -> dict[str, Any]:
    try:
        return storage.read_json(storage.join(out, RECORD))
    except NotFoundError:
        return {}


def _key(name: str) -> str:
    """MLflow takes letters, digits and `_-. /:` in names."""
    return re.sub(r"[^\w\-. /:]", "_", name, flags=re.ASCII)[:250]


def _cut(text: str, chars: int) -> str:
    return text if len(text) <= chars else f"{text[: chars - 3]}..."
