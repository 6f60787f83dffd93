"""The driver around Ray Train, with real workers of a small local Ray."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from ray.cloudpickle import register_pickle_by_value
from training_jobs import Crops, stop_after, undisturbed

import cosmic_ray
from cosmic_ray.errors import JobError
from cosmic_ray.ingest.stream import plain_batches
from cosmic_ray.output import read_manifest
from cosmic_ray.training import checkpoint
from cosmic_ray.training.driver import TrainingFailed
from cosmic_ray.training.mae_job import PretrainMAE

TWO = {"workers": 2, "cpus_per_worker": 0.5, "hang_timeout_s": 100.0}


@pytest.mark.slow
def test_two_ray_workers_train_export_and_publish(crops, ray_local):
    job = crops.job("ray", scaling=TWO)
    job.check()
    results = job.run()
    assert json.loads(json.dumps(results)) == results
    reference = undisturbed(crops.job("ray-undisturbed"), 2)
    assert results["weights"] == reference[12] == checkpoint.digest(checkpoint.newest(f"{job.out}/checkpoints"))
    manifest = read_manifest(job.out)
    assert manifest["simulated"] and manifest["content_hash"] == results["content_hash"]
    assert manifest["lineage"]["split"]["content_hash"] == crops.opened_split().content_hash
    assert cosmic_ray.load_model(results["model"]).embed(crops.store.crops(np.arange(3))).shape == (3, 16)
    assert job.run() == results, "a finished job is only looked at"


@pytest.mark.slow
def test_too_few_cpus_for_workers_and_readers(crops, ray_local):
    """The small Ray has four CPUs: three workers fit, their readers do not."""
    job = crops.job("crowded", scaling={"workers": 3, "cpus_per_worker": 1.2})
    with pytest.raises(JobError, match=r"scaling.workers = 3: 3 workers of 1.2 CPUs.*room for 2") as error:
        job.run()
    assert error.value.exit_code == 2
    assert checkpoint.newest(f"{job.out}/checkpoints") is None


class Mistaken(PretrainMAE):
    kind = "mistaken"

    def loop(self, callbacks: object = (), **place: object) -> None:
        {}["no such loop"]


@pytest.mark.slow
def test_a_mistake_in_the_code_ends_with_where_it_is(crops, ray_local):
    register_pickle_by_value(sys.modules[__name__])
    job = Mistaken(**crops.keys("broken", scaling={**TWO, "max_failures": 0}))
    with pytest.raises(TrainingFailed, match=r"1 attempts in a row got no further: .*no such loop") as error:
        job.run()
    assert error.value.exit_code == 1
    assert "in loop" in str(error.value), "the traceback"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_fsdp2_workers_end_with_what_ddp_ends_with(crops, ray_local):
    """Float64: sums over ranks are made in another order."""
    ends = {}
    for strategy in ("ddp", "fsdp2"):
        job = crops.job(f"ray-{strategy}", precision="fp64", scaling={**TWO, "strategy": strategy})
        job.run()
        ends[strategy] = checkpoint.read_tensors(checkpoint.newest(f"{job.out}/checkpoints"), checkpoint.WEIGHTS)
    for key, value in ends["ddp"].items():
        assert np.allclose(ends["fsdp2"][key], value, rtol=0, atol=1e-9), key


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_goes_on_with_another_number_of_workers(crops, ray_local):
    """Two workers for eight steps, one for the rest; float64, since the order of sums changes."""
    undisturbed_job = crops.job("whole", precision="fp64")
    undisturbed_job.loop(stream=plain_batches).run()
    job = crops.job("resized", precision="fp64", scaling={**TWO, "workers": 1})
    stop_after(job, 2, 8)
    assert job.run()["steps"] == 12
    one, other = (
        checkpoint.read_tensors(checkpoint.newest(f"{each.out}/checkpoints"), checkpoint.WEIGHTS)
        for each in (undisturbed_job, job)
    )
    for key, value in one.items():
        assert np.allclose(other[key], value, rtol=0, atol=1e-9), key


@pytest.mark.slow
@pytest.mark.exhaustive
def test_from_and_to_s3(crops, ray_local, s3):
    """Store, split and output in a bucket."""
    there = Crops.make(s3, 240)
    job = there.job("run", scaling=TWO)
    results = job.run()
    assert results["model"].startswith("s3://")
    assert results["weights"] == undisturbed(crops.job("s3-undisturbed"), 2)[12]
    assert cosmic_ray.load_model(results["model"]).embed(there.store.crops(np.arange(3))).shape == (3, 16)
