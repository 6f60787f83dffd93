"""`build-crops` killed in each of its steps, or stopped, and run again, ends with the content of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from drawn_fields import make_job, plate

from cosmic_ray import storage
from cosmic_ray.stores.verify import verify_store

STEPS: dict[str, Callable[[str], bool]] = {
    "catalogue": lambda out: storage.exists(f"{out}/catalogue.parquet"),
    "candidates": lambda out: len(storage.listing(f"{out}/candidates", "*.json")) >= 5,
    "selection": lambda out: storage.exists(f"{out}/selection.json"),
    "shards": lambda out: len(storage.listing(f"{out}/shards", "*.json")) >= 5,
}


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    """A job of 24 tasks and then of about 75 shards."""
    plate(str(tmp_path / "plate"), 24)
    keys = {"rows_per_group": 4, "groups_per_shard": 1, "chunk_fields": 1}
    job = make_job(str(tmp_path / "plate"), str(tmp_path / "out"), **keys)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job.resolved()))
    return tmp_path / "job.yaml"


def start(job_file: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "cosmic_ray.cli", "run", str(job_file), "--json", *overrides]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["STARTED_BY"] = str(job_file)
    with open(job_file.parent / "log", "ab") as log:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment)


def interrupt(job_file: Path, reached: Callable[[str], bool], signal_: int, *overrides: str) -> int:
    """Start the job, send `signal_` once `reached`, and give its exit code; the store must not be there yet."""
    given = [text.removeprefix("out=") for text in overrides if text.startswith("out=")]
    out = given[0] if given else str(job_file.parent / "out")
    process, deadline = start(job_file, *overrides), time.monotonic() + 120
    while not reached(out):
        assert process.poll() is None, (job_file.parent / "log").read_text()
        assert time.monotonic() < deadline, (job_file.parent / "log").read_text()
        time.sleep(0.001)
    process.send_signal(signal_)
    process.communicate()
    assert not storage.exists(f"{out}/manifest.json"), "the job was over before it was stopped"
    return process.returncode


def finish(job_file: Path, *overrides: str) -> dict:
    process = start(job_file, *overrides)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, (job_file.parent / "log").read_text()
    return json.loads(said)


def undisturbed(job_file: Path) -> str:
    home = job_file.parent
    keys = {"rows_per_group": 4, "groups_per_shard": 1}
    return make_job(str(home / "plate"), str(home / "undisturbed"), **keys).run()["content_hash"]


@pytest.mark.parametrize("where", ["local", pytest.param("s3", marks=pytest.mark.exhaustive)])
def test_killed_in_every_step_it_ends_with_the_same_content(job_file, where, request):
    out = f"{request.getfixturevalue('s3') if where == 's3' else job_file.parent}/out"
    for reached in STEPS.values():
        assert interrupt(job_file, reached, signal.SIGKILL, f"out={out}") == -signal.SIGKILL
    results = finish(job_file, f"out={out}")
    assert results["content_hash"] == undisturbed(job_file)
    assert verify_store(out) == []
    assert not storage.exists(f"{out}/candidates")


def test_ctrl_c_stops_it_and_the_same_command_goes_on(job_file):
    assert interrupt(job_file, STEPS["candidates"], signal.SIGINT) == 130
    assert "run the same command again" in (job_file.parent / "log").read_text()
    assert finish(job_file)["content_hash"] == undisturbed(job_file)


@pytest.mark.exhaustive
@pytest.mark.parametrize("step", ["candidates", "shards"])
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_stopped_on_ray_it_leaves_no_process_and_goes_on(job_file, step, stop):
    on_ray = ("workers=2", "memory_gib=0.1")
    interrupt(job_file, STEPS[step], stop, *on_ray)
    deadline = time.monotonic() + 60
    while left := started_by(job_file):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)
    assert finish(job_file, *on_ray)["content_hash"] == undisturbed(job_file)


def started_by(job_file: Path) -> list[str]:
    """Names of the live processes that inherited the environment of `start`: Ray's own, and its workers."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("STARTED_BY") == str(job_file) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.name())
    return found
