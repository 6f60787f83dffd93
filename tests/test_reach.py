"""What of a job means another thing on another machine: relative paths, and where MLflow is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from cosmic_ray import jobs
from cosmic_ray.describe import keys
from cosmic_ray.errors import JobError
from cosmic_ray.jobs import make
from cosmic_ray.reach import TRACKING, require_lasting_tracking, require_reachable, uris
from cosmic_ray.submit import _environment, _with_job, require_no_secrets

PRETRAIN = {"kind": "pretrain-mae", "out": "s3://b/fm", "crops": "s3://b/crops", "split": "s3://b/split"}
EMBED = {"kind": "embed", "out": "/e", "store": "/c"}


@pytest.mark.parametrize("kind", jobs.KINDS)
def test_every_key_that_names_a_place_is_known_to(kind):
    named = {key.path: key.type for key in keys(jobs.job_class(kind)) if "URI of" in key.meaning or key.path == "out"}
    assert named and {path for path, type_ in named.items() if "URI" not in type_} == set()


def test_uris_are_found_in_sections_mappings_and_steps():
    crops = {
        "kind": "build-crops",
        "sources": {"a": {"uri": "data/a", "root": "data"}, "b": {"uri": "s3://b/fields"}},
    }
    job = make({"kind": "pipeline", "out": "/o", "steps": {"crops": crops, "fm": {**PRETRAIN, "init_from": "old"}}})
    assert dict(uris(job)) == {
        "out": "/o",
        "steps.crops.out": "/o/crops",
        "steps.crops.sources.a.uri": "data/a",
        "steps.crops.sources.a.root": "data",
        "steps.crops.sources.b.uri": "s3://b/fields",
        "steps.fm.out": "s3://b/fm",
        "steps.fm.crops": "s3://b/crops",
        "steps.fm.split": "s3://b/split",
        "steps.fm.init_from": "old",
    }


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, None),
        ({"crops": "/shared/crops", "split": "file:///shared/split"}, None),
        ({"init_from": "models:/morphology-fm@candidate", "tracking": {"uri": "http://mlflow:5000"}}, None),
        ({"tracking": {"uri": "sqlite:////shared/mlflow.db"}}, None),
        ({"crops": "runs/crops"}, r"^crops = 'runs/crops': .*give /\S*/runs/crops if all nodes see that"),
        ({"split": "file://runs/split"}, r"^split = .*give /\S*/runs/split if"),
        ({"out": "~/fm"}, r"^out = '~/fm': .*give /"),
        ({"tracking": {"uri": "sqlite:///mlflow.db"}}, r"^tracking\.uri = .*give sqlite:////\S*/mlflow.db if"),
        ({"crops": "a", "split": "b"}, r"split = 'b'.*\n?.*crops = 'a'"),
    ],
)
def test_relative_paths_are_refused(changes, refused):
    job = make({**PRETRAIN, **changes})
    if refused is None:
        require_reachable(job)
        return
    with pytest.raises(JobError, match=refused):
        require_reachable(job)


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        (PRETRAIN, "tracking.uri"),
        ({**PRETRAIN, "tracking": {"uri": "http://mlflow:5000"}}, None),
        ({**PRETRAIN, "tracking": None}, None),
        (EMBED, "tracking_uri"),
        ({**EMBED, "model": "s3://b/fm/model"}, None),
        (
            {"kind": "pipeline", "out": "/o", "steps": {"fm": {**PRETRAIN, "tracking": None}, "e": EMBED}},
            "steps.e.tracking_uri",
        ),
    ],
)
def test_on_a_cluster_the_database_of_the_working_directory_is_refused(tree, key, monkeypatch):
    monkeypatch.delenv(TRACKING, raising=False)
    job = make(tree)
    require_lasting_tracking(job)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    if key is None:
        require_lasting_tracking(job)
        return
    for given in (None, "sqlite:///runs/mlflow.db"):
        if given:
            monkeypatch.setenv(TRACKING, given)
        with pytest.raises(JobError, match="would lie in a folder of Ray's") as refused:
            require_lasting_tracking(job)
        assert refused.value.key == key
    monkeypatch.setenv(TRACKING, "http://mlflow:5000")
    require_lasting_tracking(job)


def test_the_tracking_uri_goes_along_unless_it_holds_a_password(monkeypatch, capsys):
    monkeypatch.delenv(TRACKING, raising=False)
    assert TRACKING not in _environment()
    monkeypatch.setenv(TRACKING, "http://mlflow:5000")
    assert _environment()[TRACKING] == "http://mlflow:5000"
    monkeypatch.setenv(TRACKING, "http://me:hunter22@mlflow:5000")
    assert TRACKING not in _environment()
    said = capsys.readouterr().err
    assert "holds a password" in said and "hunter22" not in said
    monkeypatch.setenv(TRACKING, "sqlite:///runs/mlflow.db")
    with pytest.raises(JobError, match=r"MLFLOW_TRACKING_URI = .*another place"):
        _environment()


def test_the_command_carries_the_job_whatever_its_text_holds(tmp_path):
    job = make({**EMBED, "out": "/o'$(exit 9)`exit 9`\\n\"é", "store": "/c END\nEND\n"})
    command = _with_job(job).replace("cosmic-ray run -", f"{sys.executable} -m cosmic_ray.cli run - --dry-run --json")
    ended = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert json.loads(ended.stdout) == job.resolved(), ended.stderr


def test_a_job_with_a_password_is_not_shown_to_a_cluster():
    require_no_secrets(make({**PRETRAIN, "crops": "s3://anonymous@b/crops"}))
    with pytest.raises(JobError, match=r"^tracking\.uri = 'http://\*\*\*@mlflow:5000': holds a secret") as refused:
        require_no_secrets(make({**PRETRAIN, "tracking": {"uri": "http://me:hunter22@mlflow:5000"}}))
    assert "hunter22" not in str(refused.value)
