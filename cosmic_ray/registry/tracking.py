"""The callbacks through which a training run reaches MLflow: one run a job, ended in every case, never waited for.

    with Tracker(job.out, job.resolved(), name="pretrain-mae", lineage=..., simulated=...) as tracker:
        loop(..., callbacks=[tracker])
        tracker.register(f"{job.out}/model", "morphology-fm")

Where nothing answers, the events of the run go to `<out>/tracking-spool/` and are delivered when the server is back,
when the same job is run again, or by `deliver(out)`. A tracker is a plain object for one process: the one that owns the
run's life (a Ray driver, say), which gets rank 0's metrics in whatever way it likes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal

from cosmic_ray import storage
from cosmic_ray.progress import say
from cosmic_ray.registry.lineage import lineage_tags
from cosmic_ray.registry.run import MlflowRun, now_ms, this_process
from cosmic_ray.registry.scrub import scrub, scrub_text
from cosmic_ray.registry.sender import Sender
from cosmic_ray.registry.server import tracking_uri
from cosmic_ray.registry.spool import Spool

SPOOL = "tracking-spool"
SAVING_PATIENCE_S, END_PATIENCE_S, REGISTER_PATIENCE_S = 1.0, 60.0, 900.0
Status = Literal["finished", "failed", "stopped"]
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


class Tracker:
    """Callbacks of the step loop (`on_start`, `on_step`, `on_eval`, `on_saving`, `on_checkpoint`), and `on_end`.

    They return at once. Only `on_saving` may wait, for a second: what came before a checkpoint must outlive a kill
    after it, since a resumed run does not repeat it.

    Args:
        out: the job's output folder or `s3://` prefix, which remembers the run.
        job: the resolved job; becomes params and `job.yaml`, secrets cut out.
        name: the run's name.
        lineage: input name -> {"uri", "content_hash"}, or plain values; becomes `lineage.json` and tags.
        simulated: whether any input is simulated.
        uri: tracking URI; MLFLOW_TRACKING_URI by default, else `sqlite:///runs/mlflow.db`.
        tags: further tags.
    """

    def __init__(
        self,
        out: str,
        job: Mapping[str, Any],
        *,
        name: str,
        lineage: Mapping[str, Any],
        simulated: bool,
        uri: str | None = None,
        tags: Mapping[str, str] | None = None,
    ):
        self._run, self._sender = _open(out, uri)
        self._patience_s = END_PATIENCE_S
        self._ended = self._closed = False
        found = {
            "cosmic_ray.kind": str(job.get("kind", name)),
            "cosmic_ray.out": storage.absolute(out),
            "cosmic_ray.simulated": str(simulated).lower(),
            **{f"cosmic_ray.{key}": text for key, text in lineage_tags(lineage).items()},
            **(tags or {}),
        }
        start = {"name": name, "process": this_process(), "params": dict(job), "tags": found}
        self._sender.put({"op": "start", **scrub(start)})
        self._sender.put({"op": "json", "path": "lineage.json", "content": scrub(dict(lineage))})

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.on_end("finished")
        else:
            stopped = isinstance(error, KeyboardInterrupt | SystemExit)
            self.on_end("stopped" if stopped else "failed", f"{type(error).__name__}: {error}")
        self.close()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until a server has been reached."""
        return self._run.run_id

    @property
    def registered(self) -> dict[str, str]:
        """Registered model name -> version, of those that the server has taken so far."""
        return self._run.registered

    def on_start(self, info: Mapping[str, Any]) -> None:
        """Facts known once training is set up (parameters, steps, plan digest...) become `start.json`."""
        self._sender.put({"op": "json", "path": "start.json", "content": scrub(dict(info))})

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Training metrics of optimiser step `step`; a name without `/` goes under `train/`."""
        self._metrics("train", step, metrics)

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """Validation metrics after optimiser step `step`; a name without `/` goes under `val/`."""
        self._metrics("val", step, metrics)

    def on_saving(self, step: int) -> None:
        """A checkpoint is about to be published: what was logged up to here is made to outlive this process."""
        self._sender.settle(SAVING_PATIENCE_S)

    def on_checkpoint(self, step: int, uri: str) -> None:
        """A checkpoint is published."""
        tags = {"cosmic_ray.checkpoint": scrub_text(uri), "cosmic_ray.checkpoint_step": str(step)}
        self._sender.put({"op": "tags", "tags": tags})

    def on_end(self, status: Status, error: object = None) -> None:
        """The run has ended; a second call says nothing new. `failed` and `stopped` become FAILED and KILLED."""
        if self._ended:
            return
        self._ended = True
        if error is not None:
            self._sender.put({"op": "tags", "tags": {"cosmic_ray.error": scrub_text(str(error))}})
        self._sender.put({"op": "end", "status": _STATUS[status], "time": now_ms()})

    def picture(self, uri: str, folder: str = "pictures") -> None:
        """Log a stored file (`<out>/reconstructions.png`) as an artefact; it is read when it is delivered."""
        self._sender.put({"op": "artifact", "uri": uri, "folder": folder})

    def register(self, folder: str, name: str, alias: str = "candidate") -> None:
        """Register a model folder as a version of `name`, once however often it is asked for; see `registered`.

        It outlives this process from here on, since a job whose output is published is not done again.
        """
        self._patience_s = REGISTER_PATIENCE_S
        self._sender.put({"op": "register", "folder": storage.absolute(folder), "name": name, "alias": alias})
        self._sender.settle(SAVING_PATIENCE_S)

    def close(self) -> None:
        """Deliver the rest, or spool it where the server does not take it in time."""
        if not self._closed:
            self._closed = True
            _close(self._sender, self._patience_s)

    def _metrics(self, group: str, step: int, metrics: Mapping[str, float]) -> None:
        values = {key if "/" in key else f"{group}/{key}": value for key, value in plain_numbers(metrics).items()}
        self._sender.put({"op": "metrics", "step": int(step), "time": now_ms(), "values": values})


def deliver(out: str, uri: str | None = None) -> bool:
    """Deliver what the run of a finished job left undelivered in `out`, and see that the run is ended.

    Returns:
        Whether nothing is left.
    """
    run, sender = _open(out, uri)
    if not sender.pending and run.status in (None, "FINISHED"):
        return sender.close(0.0)
    sender.put({"op": "published", "time": now_ms()})
    return _close(sender, REGISTER_PATIENCE_S)


def plain_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among `metrics`, as floats; infinities and NaN stay, text and the like is left out."""
    found = {}
    for key, value in metrics.items():
        try:
            found[key] = float(value)
        except (TypeError, ValueError):
            continue
    return found


def _open(out: str, uri: str | None) -> tuple[MlflowRun, Sender]:
    out, where = storage.absolute(out), tracking_uri(uri)
    run = MlflowRun(out, where)
    return run, Sender(run.send, Spool(storage.join(out, SPOOL)), scrub_text(where))


def _close(sender: Sender, patience_s: float) -> bool:
    delivered = sender.close(patience_s)
    if not delivered:
        say("tracking: not all was delivered; run the same job again, and it will be")
    return delivered
