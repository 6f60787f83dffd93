"""Training under real faults, through the door: a rank killed, everything killed, Ctrl-C; stopped ranks, NaN.

The judge is a run of the same job without Ray and without faults: weights must agree bit for bit.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from training_jobs import Crops, undisturbed

from cosmic_ray.training import checkpoint
from cosmic_ray.training.record import read_metrics

PATIENCE_S = 240
LONG = {
    "steps": 100_000,
    "schedule": {"kind": "constant", "warmup": 0.0},
    "ema": None,
    "eval": {"every": 1000, "crops": 8},
    "log_every": 1,
    "scaling": {"workers": 2, "cpus_per_worker": 0.5, "hang_timeout_s": 12.0},
}


class Run:
    """`cosmic-ray run` of a job file in a process group of its own, with its own local Ray."""

    def __init__(self, keys: dict[str, Any], tracking: str):
        self.out = keys["out"]
        path = Path(f"{self.out}.yaml")
        path.write_text(yaml.safe_dump({"kind": "pretrain-mae", **keys}))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": tracking}
        environment.pop("RAY_ADDRESS", None)
        self.log = Path(f"{self.out}.log")
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                [str(Path(sys.executable).with_name("cosmic-ray")), "run", str(path), "--json"],
                stdout=log, stderr=log, env=environment, start_new_session=True, cwd=Path(self.out).parent,
            )  # fmt: skip

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def step(self) -> int:
        """Steps of the newest checkpoint."""
        newest = checkpoint.newest(f"{self.out}/checkpoints")
        return int(newest.rsplit("-", 1)[1]) if newest else 0

    def wait_for(self, step: int) -> None:
        """Wait until a checkpoint of at least `step` is there."""
        self.wait(lambda: self.step() >= step, f"step {step}")

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not ready():
            assert self._process.poll() is None, f"ended while waiting for {what}:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"no {what} in {PATIENCE_S} s:\n{self.log.read_text()}"
            time.sleep(0.1)

    def rank(self, rank: int, workers: int = 2) -> psutil.Process:
        """The process that trains as `rank`, as the driver last said."""
        said = f"worker {rank} of {workers}: process "
        self.wait(lambda: said in self.log.read_text(), said)
        return psutil.Process(int(self.log.read_text().rsplit(said, 1)[1].split(maxsplit=1)[0]))

    def signal(self, number: int) -> None:
        """To the whole process group, as a terminal does."""
        os.killpg(self._process.pid, number)

    def terminate(self) -> None:
        """SIGTERM to the command alone, as a cluster stops a job: its Ray is not told."""
        self._process.terminate()

    def end(self) -> int:
        """Wait for the end; the exit code."""
        return self._process.wait(PATIENCE_S)

    def kill(self) -> None:
        """SIGKILL to everything, Ray's daemons included."""
        for each in self.family():
            try:
                each.kill()
            except psutil.NoSuchProcess:
                continue
        self._process.wait(30)

    def family(self) -> list[psutil.Process]:
        """The driver and all below it: Ray's daemons, the workers."""
        try:
            me = psutil.Process(self._process.pid)
            return [me, *me.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> Crops:
    return Crops.make(str(tmp_path_factory.mktemp("killed")))


def assert_undisturbed(crops: Crops, run: Run, workers: int = 2) -> None:
    """The newest checkpoint is that of a run without faults; every step was told once."""
    step = run.step()
    job = crops.job(f"{Path(run.out).name}-undisturbed", **LONG | {"steps": step, "checkpoint": {"every": step}})
    assert undisturbed(job, workers)[step] == checkpoint.digest(checkpoint.newest(f"{run.out}/checkpoints"))
    told = [line["step"] for line in read_metrics(f"{run.out}/metrics.jsonl") if "train/loss" in line]
    assert told == list(range(1, step + 1))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rank_killed_everything_killed_then_ctrl_c(crops, mlflow_store):
    keys = crops.keys("chain", **LONG | {"tracking": {"register_as": None}})
    with Run(keys, mlflow_store) as run:
        run.wait_for(8)
        before = run.step()
        run.rank(0).kill()
        run.wait_for(before + 16)
        assert "starting the workers again from step-" in run.log.read_text()
        run.kill()
    killed_at = run.step()
    with Run(keys, mlflow_store) as run:
        run.wait_for(killed_at + 8)
        run.signal(signal.SIGINT)
        assert run.end() == 130
    assert f"saved after step {run.step()}" in run.log.read_text()
    assert_undisturbed(crops, run)
    assert_one_tracked_run(run.out, mlflow_store)


def assert_one_tracked_run(out: str, tracking: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=tracking)
    experiments = [each.experiment_id for each in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.`cosmic_ray.out` = '{out}'")
    assert [run.info.status for run in runs] == ["KILLED"]
    told = sorted(metric.step for metric in client.get_metric_history(runs[0].info.run_id, "train/loss"))
    assert told == [line["step"] for line in read_metrics(f"{out}/metrics.jsonl") if "train/loss" in line]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("workers", "which"), [(1, 0), (2, 0), (2, 1)])
def test_a_stopped_rank_is_noticed_and_replaced(crops, mlflow_store, workers, which):
    changes = LONG | {"scaling": {**LONG["scaling"], "workers": workers}}
    with Run(crops.keys(f"stopped-{workers}-{which}", **changes), mlflow_store) as run:
        run.wait_for(8)
        stopped = run.rank(which, workers)
        stopped.send_signal(signal.SIGSTOP)
        at = time.monotonic()
        run.wait(lambda: "starting the workers again" in run.log.read_text(), "restart")
        noticed_s = time.monotonic() - at
        run.wait_for(run.step() + 8)
        run.signal(signal.SIGINT)
        assert run.end() == 130
    assert noticed_s < 12 + 60
    assert not stopped.is_running() or stopped.status() == psutil.STATUS_ZOMBIE, "the stopped process was left behind"
    assert_undisturbed(crops, run, workers)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_killed_at_any_moment_five_times(crops, mlflow_store):
    """Publications among the moments: a checkpoint after every step."""
    keys = crops.keys("often", **LONG | {"checkpoint": {"every": 1}})
    for attempt in range(5):
        with Run(keys, mlflow_store) as run:
            run.wait_for(run.step() + 2)
            time.sleep(0.037 * attempt)
    with Run(keys, mlflow_store) as run:
        run.wait_for(run.step() + 2)
        run.terminate()
        assert run.end() == 130
    assert_undisturbed(crops, run)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_divergence_ends_the_run_with_step_and_crops(crops, mlflow_store):
    keys = crops.keys("diverged", **LONG | {"optim": {"lr": 1e25, "clip": None}})
    with Run(keys, mlflow_store) as run:
        assert run.end() == 1
    text = run.log.read_text()
    step, named = re.search(r"error: step (\d+): .* is (?:nan|inf).* Samples: (crop-\S+),", text).groups()
    facts = json.loads(Path(run.out, "nonfinite.json").read_text())
    assert facts["step"] == int(step) and named == facts["suspects"][0]
    assert len(facts["batch"]) == 16
    assert "starting the workers again" not in text, "another attempt would end alike"
    assert not Path(run.out, "manifest.json").exists()


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_a_rank_that_dies_every_time_ends_the_run(crops, mlflow_store):
    keys = crops.keys("dying", **LONG | {"checkpoint": {"every": 10_000}})
    keys["scaling"] = {**LONG["scaling"], "max_failures": 1}
    with Run(keys, mlflow_store) as run:
        for attempt in range(2):
            run.wait(lambda attempt=attempt: run.log.read_text().count("train: 1/") > attempt, "first step")
            run.rank(0).kill()
        assert run.end() == 1
    assert "error: 2 attempts in a row got no further: " in run.log.read_text()


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_ctrl_c_twice_ends_at_once(crops, mlflow_store):
    """A worker that cannot save does not hold the terminal; the second Ctrl-C leaves nothing behind."""
    with Run(crops.keys("twice", **LONG), mlflow_store) as run:
        run.wait_for(8)
        family = run.family()
        run.rank(1).send_signal(signal.SIGSTOP)
        run.signal(signal.SIGINT)
        run.wait(lambda: "once more to stop at once" in run.log.read_text(), "answer")
        run.signal(signal.SIGINT)
        assert run.end() == 130
        _, left = psutil.wait_procs(family, timeout=30)
    assert not left


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_the_controller_killed(crops, mlflow_store):
    """Ray Train's own process dies: the driver starts another, and the run goes on."""
    with Run(crops.keys("controller", **LONG), mlflow_store) as run:
        run.wait_for(8)
        (controller,) = [each for each in run.family() if "TrainController" in _title(each)]
        controller.kill()
        run.wait_for(run.step() + 16)
        run.signal(signal.SIGINT)
        assert run.end() == 130
    assert "starting the workers again from step-" in run.log.read_text()
    assert_undisturbed(crops, run)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_a_run_that_was_taken_over_ends_its_workers(crops, mlflow_store):
    """As after a long silence of its machine: another run owns the folder now, and this one publishes nothing more."""
    with Run(crops.keys("fenced", **LONG), mlflow_store) as run:
        run.wait_for(8)
        workers = [run.rank(rank) for rank in range(2)]
        Path(run.out, "_lease-00099.json").write_text("{}")
        assert run.end() == 1
        psutil.wait_procs(workers, timeout=10)
        steps = run.step()
        time.sleep(1)
        assert run.step() == steps
    assert "this run's claim was taken over by another run" in run.log.read_text()
    assert not any(worker.is_running() for worker in workers)
