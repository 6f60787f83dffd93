"""A job file goes to a real multi-node Ray through Ray Jobs; its log and its exit code come back."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from training_jobs import Crops

from cosmic_ray import storage
from cosmic_ray.training import checkpoint

ROOT = Path(__file__).parents[2]
PLATES = """\
kind: simulate-plates
out: {out}
plates: 1
wells: 1
sites: 1
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    command = [sys.executable, str(ROOT / "cluster" / "local.py"), "--nodes", "2", "--cpus", "1", "--store-mb", "100"]
    port = free_port()
    cluster = subprocess.Popen([*command, "--dashboard-port", str(port)], stdout=subprocess.PIPE, text=True)
    try:
        lines = [cluster.stdout.readline(), cluster.stdout.readline()]
        assert "ready" in lines[1], lines
        yield f"http://127.0.0.1:{port}"
    finally:
        cluster.send_signal(signal.SIGINT)
        cluster.wait(timeout=60)


def cosmic_ray(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cosmic_ray.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def until(true: Callable[[], object], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_submitted_job_runs_and_its_log_and_exit_code_come_back(address, tmp_path):
    file = tmp_path / "plates.yaml"
    file.write_text(PLATES.format(out=tmp_path / "plates"))
    ended = cosmic_ray("submit", str(file), "--address", address)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (tmp_path / "plates" / "manifest.json").exists()

    (tmp_path / "plates" / "job.json").write_text(json.dumps({"fingerprint": "another", "job": {}}))
    refused = cosmic_ray("submit", str(file), "--address", address)
    assert refused.returncode == 2
    assert "holds another job" in refused.stdout

    known = json.loads(cosmic_ray("status", "--address", address, "--json").stdout)["submissions"]
    assert [about["status"] for about in known] == ["FAILED", "SUCCEEDED"]
    assert known[0]["metadata"]["kind"] == "simulate-plates"


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_a_training_job_that_is_stopped_saves_first_and_goes_on_from_there(address, tmp_path):
    crops = Crops.make(str(tmp_path))
    scaling = {"workers": 1, "cpus_per_worker": 0.5, "cpus_per_reader": 0.25}
    keys = crops.keys(steps=10**6, checkpoint={"every": 10**6}, eval={"every": 10**6, "crops": 20}, scaling=scaling)
    job, metrics = tmp_path / "job.yaml", Path(keys["out"], "metrics.jsonl")
    job.write_text(yaml.safe_dump({"kind": "pretrain-mae", **keys}))
    saved = []
    for _ in range(2):
        begun = metrics.stat().st_size if metrics.exists() else 0
        submission = cosmic_ray("submit", str(job), "--address", address, "--detach").stdout.strip()
        until(lambda begun=begun: metrics.exists() and metrics.stat().st_size > begun)
        assert cosmic_ray("status", submission, "--address", address, "--stop").returncode == 0
        ended = cosmic_ray("status", submission, "--address", address, "--follow")
        assert ended.returncode == 130, ended.stdout + ended.stderr
        saved.append(int(re.search(r"saved after step (\d+)", ended.stdout)[1]))
        newest = storage.name(checkpoint.newest(checkpoint.within(keys["out"])))
        assert int(newest.removeprefix("step-")) == saved[-1]
    assert 0 < saved[0] < saved[1]


def test_no_cluster_at_the_address_exits_2(tmp_path):
    file = tmp_path / "plates.yaml"
    file.write_text(PLATES.format(out=tmp_path / "plates"))
    ended = cosmic_ray("submit", str(file), "--address", f"http://127.0.0.1:{free_port()}")
    assert ended.returncode == 2 and "no Ray cluster answers" in ended.stderr
