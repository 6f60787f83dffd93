"""One MLflow run a job, whatever happens to the job and to the server; in a real store, and behind a real server."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import psutil
import pytest
import yaml
from tiny_encoder import export

import cosmic_ray
from cosmic_ray import storage
from cosmic_ray.errors import DataError
from cosmic_ray.lease import this_machine
from cosmic_ray.registry import run as run_module
from cosmic_ray.registry import sender, server
from cosmic_ray.registry import tracking as tracking_module
from cosmic_ray.registry.tracking import Tracker, deliver

JOB = {"kind": "pretrain-mae", "out": "runs/a", "crops": "s3://KEY:SECRET@bucket/crops", "optim": {"lr": 1e-4}}
LINEAGE = {"store": {"uri": "s3://bucket/crops", "content_hash": "5" * 64}, "job": "0123456789abcdef"}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "BATCH_S", 0.1)
    monkeypatch.setattr(sender, "FIRST_RETRY_S", 0.2)
    monkeypatch.setattr(sender, "LAST_RETRY_S", 0.4)


def track(out: str, uri: str | None = None) -> Tracker:
    return Tracker(out, JOB, name="pretrain-mae", lineage=LINEAGE, simulated=True, uri=uri)


def run_of(client: mlflow.MlflowClient, out: str) -> mlflow.entities.Run:
    """The one run that tracks `out`."""
    experiment = client.get_experiment_by_name(server.EXPERIMENT).experiment_id
    runs = client.search_runs([experiment], f"tags.`cosmic_ray.out` = '{storage.absolute(out)}'")
    assert len(runs) == 1
    return runs[0]


def curve(client: mlflow.MlflowClient, run: mlflow.entities.Run, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)]


def until(true: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def client(tracking: str) -> mlflow.MlflowClient:
    return server.connect(tracking)


def test_a_run_holds_the_job_its_lineage_curves_and_pictures(client, home):
    picture = f"{home}/a/reconstructions.png"
    storage.write_bytes(picture, b"\x89PNG...")
    with track(f"{home}/a") as tracker:
        tracker.on_start({"step": 0, "parameters": 1234})
        for step in range(1, 6):
            tracker.on_step(step, {"loss": 1 / step, "train/lr": 1e-4, "note": "text"})
        tracker.on_step(6, {"loss": float("nan")})
        tracker.on_eval(6, {"loss": 0.5})
        tracker.on_checkpoint(6, f"{home}/a/checkpoints/6")
        tracker.picture(picture)
    run = run_of(client, f"{home}/a")
    assert run.info.status == "FINISHED"
    assert run.info.run_id == tracker.run_id
    assert run.data.params["optim.lr"] == "0.0001"
    assert run.data.params["crops"] == "s3://***@bucket/crops"
    assert run.data.tags["cosmic_ray.store_hash"] == "5" * 64
    assert run.data.tags["cosmic_ray.simulated"] == "true"
    assert run.data.tags["cosmic_ray.checkpoint_step"] == "6"
    assert [step for step, _ in curve(client, run, "train/loss")] == [1, 2, 3, 4, 5, 6]
    assert curve(client, run, "val/loss") == [(6, 0.5)]
    with server.globally(server.tracking_uri()):
        folder = Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id))
    assert (folder / "pictures" / "reconstructions.png").read_bytes() == b"\x89PNG..."
    assert json.loads((folder / "lineage.json").read_text()) == LINEAGE
    assert json.loads((folder / "start.json").read_text())["parameters"] == 1234
    job = yaml.safe_load((folder / "job.yaml").read_text())
    assert job == JOB | {"crops": "s3://***@bucket/crops"}
    assert not storage.listing(f"{home}/a/tracking-spool")


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("lost s3://K:S@b"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (None, "FINISHED")],
)
def test_a_run_is_ended_in_every_case(client, tmp_path, error, status):
    try:
        with track(str(tmp_path)) as tracker:
            tracker.on_step(1, {"loss": 1.0})
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    run = run_of(client, str(tmp_path))
    assert run.info.status == status
    if status == "FAILED":
        assert run.data.tags["cosmic_ray.error"] == "ValueError: lost s3://***@b"


def test_a_job_run_again_continues_its_run_with_clean_curves(client, tmp_path):
    out = str(tmp_path / "run")
    with pytest.raises(RuntimeError), track(out) as tracker:
        for step in range(1, 9):
            tracker.on_step(step, {"loss": float(step)})
        raise RuntimeError("worker lost")
    assert run_of(client, out).info.status == "FAILED"
    with track(out) as tracker:
        for step in range(5, 12):
            tracker.on_step(step, {"loss": step + 0.5})
        tracker.on_eval(5, {"loss": 0.0})
    run = run_of(client, out)
    assert run.info.status == "FINISHED"
    assert [step for step, _ in curve(client, run, "train/loss")] == list(range(1, 12))
    assert curve(client, run, "val/loss") == [(5, 0.0)]


KILLED = """
import os, signal, sys
from cosmic_ray.registry import sender
from cosmic_ray.registry.tracking import Tracker
sender.BATCH_S = 0.1
tracker = Tracker(sys.argv[1], {"kind": "pretrain-mae"}, name="pretrain-mae", lineage={}, simulated=True)
for step in range(1, 5):
    tracker.on_step(step, {"loss": float(step)})
tracker.on_saving(4)
tracker._sender._idle.wait(100) if "delivered" in sys.argv else None
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(out: str, *how: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, out, *how], capture_output=True)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_job_killed_outright_keeps_its_run_and_every_step(client, tmp_path):
    out = str(tmp_path / "run")
    killed(out)
    assert storage.listing(f"{out}/tracking-spool"), "killed before MLflow was even imported"
    with track(out) as tracker:
        for step in range(5, 8):
            tracker.on_step(step, {"loss": float(step)})
    run = run_of(client, out)
    assert run.info.status == "FINISHED"
    assert curve(client, run, "train/loss") == [(step, float(step)) for step in range(1, 8)]


def test_a_job_killed_after_it_was_published_still_registers_and_ends_its_run(client, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking_module, "SAVING_PATIENCE_S", 0.0)
    out = str(tmp_path / "run")
    export(f"{out}/model")
    dead = track(out)
    dead.register(f"{out}/model", "published")
    dead._sender.close(60)
    assert run_of(client, out).info.status == "RUNNING"
    assert deliver(out)
    run = run_of(client, out)
    assert run.info.status == "FINISHED"
    assert client.get_model_version_by_alias("published", "candidate").run_id == run.info.run_id
    assert len(client.search_model_versions("name = 'published'")) == 1
    assert deliver(out)


@pytest.mark.exhaustive
def test_a_run_whose_process_is_gone_is_ended_by_the_next_job(client, tmp_path):
    out = str(tmp_path / "gone")
    killed(out, "delivered")
    assert run_of(client, out).info.status == "RUNNING"
    with track(str(tmp_path / "next")) as tracker:
        until(lambda: run_of(client, out).info.status == "KILLED")
        assert client.get_run(tracker.run_id).info.status == "RUNNING"


@pytest.mark.parametrize(
    ("machine", "born", "status"),
    [("another-boot-pid:[1]", 1.0, "RUNNING"), (None, 1.0, "KILLED"), (None, None, "RUNNING")],
    ids=["a container of this host name", "a number that another process got", "this process"],
)
def test_only_a_run_of_a_process_that_is_surely_gone_is_ended(client, tmp_path, machine, born, status):
    """Containers share host names and process numbers: this very process has the number of each of these owners."""
    owner = psutil.Process()
    process = f"{socket.gethostname()} {machine or this_machine()} {owner.pid} {born or owner.create_time()}"
    with track(str(tmp_path / "any")):
        pass
    experiment = client.get_experiment_by_name(server.EXPERIMENT).experiment_id
    other = client.create_run(experiment, tags={run_module.PROCESS: process})
    with track(str(tmp_path / "next")) as tracker:
        tracker.on_step(1, {"loss": 1.0})
    assert client.get_run(other.info.run_id).info.status == status
    client.delete_run(other.info.run_id)


def test_a_run_made_and_not_written_down_is_found_again(client, tmp_path, monkeypatch):
    out = str(tmp_path / "run")
    with track(out):
        pass
    record = json.loads(Path(out, "tracking.json").read_text())
    Path(out, "tracking.json").write_text(json.dumps({"token": record["token"]}))
    with track(out) as tracker:
        pass
    assert tracker.run_id == record["run_id"]


def test_a_deleted_run_is_made_anew(client, tmp_path):
    out = str(tmp_path / "run")
    with track(out) as tracker:
        pass
    client.delete_run(tracker.run_id)
    with track(out) as again:
        again.on_step(1, {"loss": 1.0})
    assert again.run_id != tracker.run_id
    assert run_of(client, out).info.status == "FINISHED"


def test_what_mlflow_refuses_is_said_and_stops_nothing(client, tmp_path, capsys):
    with track(str(tmp_path)) as tracker:
        tracker.picture(str(tmp_path / "not-there.png"))
        tracker.register(str(tmp_path / "no-model"), "morphology-fm")
        tracker.on_step(1, {"loss": 1.0})
    said = capsys.readouterr().err
    assert "not logged (artifact)" in said
    assert "not logged (register)" in said
    run = run_of(client, str(tmp_path))
    assert run.info.status == "FINISHED"
    assert curve(client, run, "train/loss") == [(1, 1.0)]


def test_the_embedded_store_is_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert server.tracking_uri() == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert server.tracking_uri("sqlite:///other.db") == f"sqlite:///{tmp_path}/other.db"
    assert server.tracking_uri("http://host:5000") == "http://host:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://other:5000")
    assert server.tracking_uri() == "http://other:5000"


@contextmanager
def mlflow_server(port: int, database: str, folder: Path) -> Iterator[subprocess.Popen]:
    """A real tracking server on a socket; killed outright at the end of the block."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", database, "--artifacts-destination", str(folder / "artifacts")]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(uri: str) -> bool:
    try:
        server.require(uri)
    except DataError:
        return False
    return True


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


class Steps:
    """Logs steps, and measures how long the step loop was held up."""

    def __init__(self, tracker: Tracker):
        self._tracker, self.step, self.longest_s = tracker, 0, 0.0

    def go(self, count: int) -> None:
        for _ in range(count):
            self.step += 1
            started = time.monotonic()
            self._tracker.on_step(self.step, {"loss": 1 / self.step})
            self.longest_s = max(self.longest_s, time.monotonic() - started)
            time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_server_that_is_away_costs_no_training_and_gets_everything_later(
    tracking, tmp_path, port, capsys, monkeypatch
):
    """Refused, brought up, stopped so that it hangs, let go on, killed before the end, brought up again."""
    monkeypatch.setattr(server, "_PROBE_S", 1.0)
    out, uri = str(tmp_path / "run"), f"http://127.0.0.1:{port}"
    export(f"{out}/model")
    tracker = track(out, uri)
    steps = Steps(tracker)
    steps.go(20)
    tracker.on_saving(20)
    assert storage.listing(f"{out}/tracking-spool")
    with mlflow_server(port, tracking, tmp_path) as process:
        until(lambda: answers(uri))
        until(lambda: not tracker._sender.away and tracker._sender._idle.is_set())
        assert not storage.listing(f"{out}/tracking-spool")
        os.killpg(process.pid, signal.SIGSTOP)
        steps.go(50)
        until(lambda: tracker._sender.away)
        started = time.monotonic()
        tracker.on_saving(70)
        assert time.monotonic() - started < 2
        os.killpg(process.pid, signal.SIGCONT)
        until(lambda: not tracker._sender.away)
        steps.go(10)
    tracker.on_eval(80, {"loss": float("nan"), "at (val)": 1.0})
    tracker.register(f"{out}/model", f"away-{port}")
    tracker.on_end("finished")
    started = time.monotonic()
    tracker.close()
    assert time.monotonic() - started < 10
    assert steps.longest_s < 0.1
    said = capsys.readouterr().err
    assert "The run goes on" in said
    assert "run the same job again" in said
    assert not deliver(out, uri)
    with mlflow_server(port, tracking, tmp_path):
        until(lambda: answers(uri))
        assert deliver(out, uri)
        client = server.connect(uri)
        run = run_of(client, out)
        assert run.info.status == "FINISHED"
        assert curve(client, run, "train/loss") == [(step, 1 / step) for step in range(1, 81)]
        assert math.isnan(curve(client, run, "val/loss")[0][1])
        assert curve(client, run, "val/at _val_") == [(80, 1.0)]
        assert client.get_model_version_by_alias(f"away-{port}", "candidate").run_id == run.info.run_id
        model = cosmic_ray.load_model(f"models:/away-{port}@candidate", tracking=uri)
        assert model.config.digest == cosmic_ray.load_model(f"{out}/model").config.digest
    assert deliver(out, uri), "nothing is left"
