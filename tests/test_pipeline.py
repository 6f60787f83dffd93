"""Pipelines: steps are whole jobs, checked before any starts, done once."""

from __future__ import annotations

import pytest

from cosmic_ray import jobs, storage
from cosmic_ray.errors import JobError
from cosmic_ray.jobs import make

SPLIT = {"kind": "split", "store": "${out}/crops"}


def test_out_stands_for_the_run_folder_and_is_the_default_of_each_step(tmp_path):
    job = make({"kind": "pipeline", "out": str(tmp_path), "steps": {"split": SPLIT}})
    step = job.resolved()["steps"]["split"]
    assert step["store"] == f"{tmp_path}/crops" and step["out"] == f"{tmp_path}/split"


def test_an_error_in_a_step_names_it():
    with pytest.raises(JobError, match=r"steps\.split\.sead = 3: unknown key \(did you mean 'seed'\?\)"):
        make({"kind": "pipeline", "out": "o", "steps": {"split": {**SPLIT, "sead": 3}}})


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({}, "at least one step"),
        ({"a": {"kind": "pipeline", "steps": {}}}, "cannot hold a pipeline"),
        ({"a": {"store": "s"}}, r"steps\.a\.kind: missing"),
    ],
)
def test_what_is_no_pipeline_is_refused(steps, message):
    with pytest.raises(JobError, match=message):
        make({"kind": "pipeline", "out": "o", "steps": steps})


def test_a_resolved_pipeline_is_a_job_file():
    job = make({"kind": "pipeline", "out": storage.absolute("o"), "steps": {"split": SPLIT}})
    assert jobs.make(job.resolved()).resolved() == job.resolved()


def test_a_finished_step_is_not_checked_again_since_its_inputs_may_be_gone(tmp_path):
    job = make({"kind": "pipeline", "out": str(tmp_path), "steps": {"split": SPLIT}})
    with pytest.raises(JobError, match="store"):
        job.check()
    storage.write_bytes(f"{tmp_path}/split/manifest.json", b"{}")
    job.check()
