"""`build-crops` on several nodes: the same content, a node lost on the way included; a path that one cannot see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from drawn_fields import make_job, plate

SCRIPT = Path(__file__).with_name("two_nodes.py")
pytestmark = pytest.mark.exhaustive


def run(job_file: Path, *words: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, str(SCRIPT), str(job_file), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)


def write(tmp_path: Path, **keys) -> Path:
    job = make_job(str(tmp_path / "plate"), str(tmp_path / "out"), workers=None, chunk_fields=1, memory_gib=0.1, **keys)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job.resolved()))
    return tmp_path / "job.yaml"


@pytest.mark.parametrize(("words", "nodes"), [((), 2), (("lose",), 1)])
def test_two_nodes_and_a_lost_one_give_the_same_content(tmp_path, words, nodes):
    plate(str(tmp_path / "plate"), 24)
    ended = run(write(tmp_path), *words)
    assert ended.returncode == 0, ended.stderr
    undisturbed = make_job(str(tmp_path / "plate"), str(tmp_path / "undisturbed")).run()
    assert json.loads(ended.stdout.splitlines()[-1]) == {"nodes": nodes, "content_hash": undisturbed["content_hash"]}


def test_a_source_that_another_node_does_not_see_is_refused(tmp_path):
    """`/proc/self` is another folder in each process: what hangs on a free descriptor there is this driver's alone."""
    plate(str(tmp_path / "plate"), 3)
    source = {"uri": "/proc/self/fd/700"}
    ended = run(write(tmp_path, source=source), "hold", str(tmp_path / "plate"))
    assert ended.returncode != 0
    assert "source.uri = '/proc/self/fd/700': lies on this machine" in ended.stderr
