"""The door: exit codes, what goes to which stream, and how cheap it is to open."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cosmic_ray import jobs
from cosmic_ray.describe import keys

JOBS = sorted((Path(__file__).parents[1] / "jobs").rglob("*.yaml"))


def cosmic_ray(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cosmic_ray.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd)


def import_from(folder: Path) -> dict[str, str]:
    """The environment of a process, Ray's workers included, that finds the modules in `folder`."""
    return {**os.environ, "PYTHONPATH": str(folder)}


def test_help_names_every_verb_without_torch_ray_or_mlflow():
    script = (
        "import sys\nfrom cosmic_ray import cli\n"
        "try: cli.main()\n"
        "finally: print(sorted({'torch','ray','mlflow','scvi','skimage','pyarrow'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", script, "--help"], capture_output=True, text=True, timeout=60)
    for verb in ("run", "submit", "status", "render", "describe", "show", "plan", "verify", "bench"):
        assert f" {verb} " in ended.stdout
    assert ended.stdout.strip().endswith("[]")


@pytest.mark.parametrize("kind", jobs.KINDS)
def test_a_job_file_is_checked_without_torch_or_ray(kind):
    script = (
        f"import sys\nfrom cosmic_ray import jobs\njobs.job_class({kind!r})\n"
        "print(sorted({'torch','ray','mlflow','skimage','matplotlib'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", jobs.KINDS)
def test_every_key_of_every_kind_says_what_it_means(kind):
    job = jobs.job_class(kind)
    assert job.kind == kind
    assert [key.path for key in keys(job) if not key.meaning] == []


@pytest.mark.parametrize("path", JOBS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_job_file_is_valid(path):
    assert jobs.load(str(path)).resolved()["kind"] in jobs.KINDS


def test_dry_run_prints_a_job_file_that_resolves_to_itself(tmp_path):
    first = cosmic_ray("run", str(JOBS[0]), "--dry-run")
    assert first.returncode == 0, first.stderr
    (tmp_path / "again.yaml").write_text(first.stdout)
    assert cosmic_ray("run", "again.yaml", "--dry-run", cwd=tmp_path).stdout == first.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: build-crop\nout: o", "did you mean 'build-crops'?"),
        ("out: o", "kind: missing"),
        ("- a\n- b", "expected a mapping"),
        ("kind: [", "not valid YAML"),
        ("kind: split\nout: o\nstore: s\nfractoins: {}", "did you mean 'fractions'?"),
    ],
)
def test_a_bad_file_exits_2_and_says_why_on_standard_error(tmp_path, text, message):
    (tmp_path / "job.yaml").write_text(text)
    ended = cosmic_ray("run", "job.yaml", cwd=tmp_path)
    assert ended.returncode == 2
    assert message in ended.stderr and ended.stdout == "" and "Traceback" not in ended.stderr


def test_a_job_is_read_from_standard_input_too(tmp_path):
    text = "kind: split\nout: o\nstore: s\nseed: 1"
    command = [sys.executable, "-m", "cosmic_ray.cli", "run", "-", "seed=2", "--dry-run", "--json"]
    ended = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(ended.stdout)["seed"] == 2


def test_a_missing_file_exits_2(tmp_path):
    ended = cosmic_ray("run", "nowhere.yaml", cwd=tmp_path)
    assert ended.returncode == 2 and "nowhere.yaml" in ended.stderr


def test_describe_gives_keys_and_a_json_schema():
    table = cosmic_ray("describe", "split")
    assert "fractions" in table.stdout and "required" in table.stdout
    schema = json.loads(cosmic_ray("describe", "split", "--json").stdout)
    assert schema["properties"]["kind"] == {"const": "split"} and "store" in schema["required"]


@pytest.mark.parametrize("verb", ["submit", "render"])
def test_paths_that_mean_another_place_elsewhere_are_refused_with_what_they_are_here(tmp_path, verb):
    (tmp_path / "job.yaml").write_text("kind: split\nout: s3://bucket/split\nstore: here/s")
    ended = cosmic_ray(verb, "job.yaml", cwd=tmp_path)
    assert ended.returncode == 2 and "store = 'here/s': a relative path means another place" in ended.stderr
    assert f"give {tmp_path}/here/s if all nodes see that" in ended.stderr and ended.stdout == ""


CHATTY = """
import sys, time
from cosmic_ray import cli, jobs
jobs.KINDS["chatty"] = "chatty:Chatty"
sys.argv = ["cosmic-ray", "run", "job.yaml", "--json"]
try:
    cli.main()
finally:
    time.sleep(1)  # a worker that could still be heard would be
"""
CHATTY_JOB = """
import threading, time
from cosmic_ray import cluster
from cosmic_ray.config import Job

class Talker:
    def __init__(self):
        threading.Thread(target=self.talk, daemon=True).start()

    def talk(self):
        while True:
            print("a worker's line", flush=True)
            time.sleep(0.01)

    def ready(self):
        pass

class Chatty(Job):
    kind = "chatty"

    def run(self):
        import ray
        cluster.connect(1)
        self.__dict__["talker"] = ray.remote(Talker).remote()
        ray.get(self.talker.ready.remote())
        time.sleep(0.5)
        return {"answer": 42}
"""


@pytest.mark.slow
def test_standard_output_ends_with_one_json_object_whatever_the_workers_print(tmp_path):
    (tmp_path / "chatty.py").write_text(CHATTY_JOB)
    (tmp_path / "job.yaml").write_text("kind: chatty\nout: o")
    ended = subprocess.run(
        [sys.executable, "-c", CHATTY],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env=import_from(tmp_path),
    )
    assert ended.returncode == 0, ended.stderr
    *before, last = ended.stdout.splitlines()
    assert any("a worker's line" in line for line in before)
    assert json.loads(last) == {"answer": 42}
