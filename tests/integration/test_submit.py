"""A job file goes to a real multi-node Ray through Ray Jobs; its log and its exit code come back."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

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


def test_no_cluster_at_the_address_exits_2(tmp_path):
    file = tmp_path / "plates.yaml"
    file.write_text(PLATES.format(out=tmp_path / "plates"))
    ended = cosmic_ray("submit", str(file), "--address", f"http://127.0.0.1:{free_port()}")
    assert ended.returncode == 2 and "no Ray cluster answers" in ended.stderr
