"""Searches with real trials on a small local Ray, and what they leave; how they go on."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from training_jobs import Crops

from cosmic_ray import jobs
from cosmic_ray.errors import CosmicError, JobError
from cosmic_ray.output import claim, encode, read_manifest
from cosmic_ray.tuning.job import Tune
from cosmic_ray.tuning.trials import Trial, Trials

# By the seed, trials 0, 1 and 2 get the first, the second and the third of these: one learns, one hardly, one diverges.
RATES, SEED = [0.02, 1e-6, 1e30], 69


def search(crops: Crops, name: str, job: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """The file of a search with three trials of 60 steps, looked at after 20, on half a CPU."""
    keys = {"steps": 60, "eval": {"every": 20, "crops": 20}, "checkpoint": {"every": 20}} | (job or {})
    scaling = {"workers": 1, "cpus_per_worker": 0.5, "hang_timeout_s": 100.0}
    base = {"kind": "pretrain-mae", **crops.keys(optim={"lr": 0.02, "clip": None}, scaling=scaling, **keys)}
    del base["out"]
    tune = {"out": f"{crops.folder}/{name}", "job": base, "space": {"optim.lr": {"choice": RATES}}, "seed": SEED}
    return {"kind": "tune", **tune, "trials": 3, "asha": {"grace": 20, "reduction": 2}} | changes


def until(true: Callable[[], object], seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def free_cpus() -> float:
    import ray

    return ray.available_resources().get("CPU", 0.0)


def places() -> set[str]:
    """The placement groups that hold or wait for resources."""
    from ray.util import placement_group_table

    return {key for key, found in placement_group_table().items() if found["state"] != "REMOVED"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_search_with_a_good_a_bad_and_a_diverging_trial(crops, ray_local, tracking):
    before = places()
    job = jobs.make(search(crops, "search", {"tracking": {"register_as": "fm"}}))
    job.check()
    results = job.run()
    assert json.loads(json.dumps(results)) == results
    told = {key: results[key] for key in ("trial", "settings", "steps", "finished", "stopped", "failed")}
    assert told == {
        "trial": "0000",
        "settings": {"optim.lr": 0.02},
        "steps": 60,
        "finished": 1,
        "stopped": 1,
        "failed": 1,
    }

    good, bad, diverged = json.loads(Path(job.out, "trials.json").read_text())["trials"]
    assert good["state"] == "finished" and [step for step, _ in good["values"]] == [20, 40, 60]
    assert bad["state"] == "stopped" and [step for step, _ in bad["values"]] == [20]
    assert diverged["state"] == "failed" and "optim.lr" in diverged["error"] and "step" in diverged["error"]
    assert not Path(job.out, "trials", "0001", "checkpoints").exists(), "a stopped trial's are of no use"
    rows = pq.read_table(io.BytesIO(Path(job.out, "trials.parquet").read_bytes())).to_pylist()
    assert [(row["trial"], row["optim.lr"], row["state"]) for row in rows] == [
        (f"{number:04}", rate, state)
        for number, (rate, state) in enumerate(zip(RATES, ["finished", "stopped", "failed"], strict=True))
    ]

    best = jobs.load(results["best"])
    trial = jobs.make(json.loads(Path(job.out, "trials", "0000", "job.json").read_text())["job"])
    assert best.fingerprint() == trial.fingerprint() and best.out == f"{job.out}/best"
    assert best.tracking.register_as == "fm" and trial.tracking.register_as is None
    assert read_manifest(trial.out)["results"]["val_loss"] == results["value"]
    best.check()

    until(lambda: places() == before and free_cpus() == 4.0)
    assert nested_runs(job, tracking) == {"0000": "finished", "0001": "stopped", "0002": "failed"}
    assert job.run() == results, "a finished search is only looked at"


def nested_runs(job: Tune, tracking: str) -> dict[str, str]:
    """By trial, the state of each run nested in the search's; every run has ended, and no model is registered."""
    import mlflow

    client = mlflow.MlflowClient(tracking)
    parent = json.loads(Path(job.out, "tracking.json").read_text())["run_id"]
    experiment = client.get_run(parent).info.experiment_id
    runs = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert all(run.info.status != "RUNNING" for run in runs)
    assert [file.path for file in client.list_artifacts(parent, "search")] == ["search/best.yaml"]
    assert not [model for model in client.search_registered_models() if model.name == "fm"]
    return {run.data.tags["cosmic_ray.trial"]: run.data.tags["cosmic_ray.trial_state"] for run in runs}


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_a_trial_that_is_stopped_saves_and_leaves_nothing_behind(crops, ray_local):
    from cosmic_ray.training import checkpoint
    from cosmic_ray.tuning.trial import Process

    before = places()
    tree = jobs.make(search(crops, "stopping", {"steps": 10**6})).trial("0000", {"optim.lr": 0.02})
    process = Process(tree, {})
    metrics = Path(tree["out"], "metrics.jsonl")
    until(lambda: metrics.exists() and b"val/loss" in metrics.read_bytes())
    assert process.ending() is None
    process.stop()
    assert process.ending() == {"ending": "stopped", "error": None}
    assert b"saved after step" in process.said()
    assert checkpoint.newest(checkpoint.within(tree["out"])) is not None
    until(lambda: places() == before and free_cpus() == 4.0)
    process.close()


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_two_trials_at_a_time(crops, ray_local):
    space = {"optim.lr": {"log": [1e-6, 1e-1]}, "model.depth": {"int": [1, 3]}}
    job = jobs.make(search(crops, "two", space=space, trials=5, concurrent=2))
    results = job.run()
    assert results["finished"] + results["stopped"] == 5 and results["failed"] == 0
    until(lambda: free_cpus() == 4.0)
    assert jobs.load(results["best"]).run()["val_loss"] == results["value"], "the job file gives what the trial gave"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_metric_that_the_job_does_not_report_ends_the_search(crops, ray_local):
    job = jobs.make(search(crops, "unreported", metric="val/los"))
    with pytest.raises(JobError, match=r"metric = 'val/los'.*val/loss, val/pixel_error") as error:
        job.run()
    assert error.value.exit_code == 2
    until(lambda: free_cpus() == 4.0)


@pytest.mark.slow
def test_more_at_a_time_than_there_is_room_for(crops, ray_local):
    with pytest.raises(JobError, match=r"concurrent = 6: .*room for 5 \(concurrent=5\)"):
        jobs.make(search(crops, "crowded", concurrent=6)).run()


def ended(job: Tune, *trials: Trial) -> None:
    """As if a search had come so far, and its process been killed."""
    with claim(job) as output:
        for trial in trials:
            Trials(output).put(trial)


def test_all_trials_failed(crops):
    job = jobs.make(search(crops, "failed"))
    ended(job, *(Trial(number, {"optim.lr": RATES[number]}, "failed", error=f"why {number}") for number in range(3)))
    with pytest.raises(CosmicError, match="all 3 trials failed; trial 0000: why 0") as error:
        job.run()
    assert error.value.exit_code == 1
    assert not Path(job.out, "manifest.json").exists()


def test_a_search_whose_trials_have_ended_needs_no_cluster(crops):
    job = jobs.make(search(crops, "ended"))
    values = [[(20, 3.0), (40, 2.0), (60, 1.0)], [(20, 4.0)], [(20, 0.5), (40, 0.1), (60, 5.0)]]
    states = ["finished", "stopped", "finished"]
    ended(job, *(Trial(n, {"optim.lr": RATES[n]}, states[n], values[n]) for n in range(3)))
    results = job.run()
    assert (results["trial"], results["value"], results["steps"]) == ("0000", 1.0, 60)


def test_interrupted_trials_go_first_and_new_ones_follow(crops):
    """What Ray Tune is handed; trials that ended are not among it."""
    import threading

    from ray.tune.search import Searcher

    from cosmic_ray.tuning.search import _Proposer

    job = jobs.make(search(crops, "resumed", trials=5))
    ended(job, Trial(0, {"optim.lr": 0.02}, "finished", [(60, 1.0)]), Trial(1, {"optim.lr": 1e-6}, values=[(20, 4.0)]),
          Trial(2, {"optim.lr": 0.02}))  # fmt: skip
    with claim(job) as output:
        stop = threading.Event()
        proposer = _Proposer(job, Trials(output), stop)
        handed = []
        for trial in "abcd":
            handed.append(proposer.suggest(trial))
            assert proposer.suggest("more") == (None if trial != "d" else Searcher.FINISHED), "one at a time"
            proposer.on_trial_complete(trial)
        assert [config["number"] for config in handed] == [1, 2, 3, 4]
        assert json.loads(handed[0]["job"])["optim"]["lr"] == 1e-6
        assert proposer.suggest("e") == Searcher.FINISHED
        stop.set()
        assert _Proposer(job, Trials(output), stop).suggest("a") == Searcher.FINISHED


@pytest.mark.slow
def test_asha_knows_the_trials_that_ended(crops, ray_local):
    from types import SimpleNamespace

    import ray

    from cosmic_ray.tuning.search import _scheduler
    from cosmic_ray.tuning.trial import Bell

    job = jobs.make(search(crops, "rungs"))
    ended(
        job, Trial(0, {"optim.lr": 0.02}, "finished", [(20, 2.0), (40, 1.5), (60, 1.0)]), Trial(1, {"optim.lr": 1e-6})
    )
    with claim(job) as output:
        asha = _scheduler(job, Trials(output), bell := Bell.remote())
    results = {2: [(20, 3.0)], 3: [(20, 1.9)], 4: [(20, 1.9), (60, 9.0)]}
    for number, values in results.items():
        trial = SimpleNamespace(trial_id=str(number), config={"number": number})
        asha.on_trial_add(None, trial)
        for step, value in values:
            asha.on_trial_result(None, trial, {"step": step, "value": value})
    assert [ray.get(bell.rung.remote(number)) for number in (1, 2, 3, 4)] == [None, "stopped", None, "stopped"]
    ray.get(bell.ring.remote())
    assert ray.get(bell.rung.remote(1)) == "interrupted"
    ray.kill(bell)


def test_another_search_in_the_same_out_is_refused(crops):
    job = jobs.make(search(crops, "mine"))
    Path(job.out).mkdir()
    Path(job.out, "job.json").write_bytes(encode({"fingerprint": "another", "job": {}}))
    with pytest.raises(JobError, match="holds another job"):
        job.run()


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_a_search_that_is_ended_goes_on_as_if_it_had_not_been(crops, tmp_path, how, code):
    """In the middle of its second trial. The first is not run again, the second goes on from its checkpoint."""
    import psutil

    space = {"optim.lr": {"log": [1e-3, 1e-1]}}
    keys = {"steps": 400, "eval": {"every": 100, "crops": 20}, "checkpoint": {"every": 20}}
    tree = search(crops, f"ended-{how.name}", keys, space=space, asha=None, trials=2)
    file, out = tmp_path / "tune.yaml", Path(tree["out"])
    file.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "cosmic_ray.cli", "run", str(file), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    until(lambda: (out / "trials/0001/checkpoints").exists() and list((out / "trials/0001/checkpoints").iterdir()))
    first = (out / "trials/0000/manifest.json").stat()
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(how)
    assert process.wait(300) == code
    until(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children))

    again = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert again.returncode == 0, again.stderr
    results = json.loads(again.stdout)
    assert results["finished"] == 2 and (out / "trials/0000/manifest.json").stat().st_mtime_ns == first.st_mtime_ns
    said = (out / "trials/0001/log.txt").read_text()
    assert "train: 10/400" not in said, "it went on from its checkpoint"
    interrupted = json.loads((out / "trials/0001.json").read_text())
    undisturbed = jobs.make({**tree, "out": f"{out}-undisturbed"}).trial("0001", interrupted["settings"])
    assert reference(jobs.make(undisturbed)) == interrupted["values"][-1][1]


def reference(job: Any) -> float:
    """The last value of an undisturbed run, without Ray."""
    import torch

    from cosmic_ray.ingest.stream import plain_batches
    from cosmic_ray.training.record import METRICS, MetricsFile, read_metrics

    torch.set_num_threads(1)  # as a worker has; two on a busy machine wait for each other
    job.loop([MetricsFile(f"{job.out}/{METRICS}")], stream=plain_batches).run()
    return [line["val/loss"] for line in read_metrics(f"{job.out}/{METRICS}") if "val/loss" in line][-1]
