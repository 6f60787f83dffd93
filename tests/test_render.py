"""The RayJob holds the job file and the pods that were asked for."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cosmic_ray.cli import app
from cosmic_ray.jobs import make
from cosmic_ray.render import Pods, render

ROOT = Path(__file__).parents[1]
MANIFESTS = sorted((ROOT / "cluster").glob("*.rayjob.yaml"))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_committed_manifest_is_what_its_first_line_prints(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    comment, manifest = path.read_text().split("\n", 1)
    program, *arguments = shlex.split(comment.removeprefix("# "))
    printed = CliRunner().invoke(app, arguments)
    assert (program, printed.exit_code) == ("cosmic-ray", 0), printed.output
    assert manifest == printed.stdout, f"{path.name} is stale: run `make manifests`"


def test_the_image_and_the_manifests_are_of_the_pinned_ray():
    pinned = re.search(r"(?m)^ray(?:\[.*\])?==(\S+)$", (ROOT / "constraints.txt").read_text())[1]
    assert f"rayproject/ray:{pinned}-py311" in (ROOT / "cluster" / "Dockerfile").read_text()
    for path in MANIFESTS:
        _, ray_job = yaml.safe_load_all(path.read_text())
        assert ray_job["spec"]["rayClusterSpec"]["rayVersion"] == pinned


def test_the_rayjob_carries_the_resolved_job_and_the_pods():
    job = make({"kind": "split", "out": "s3://bucket/split", "store": "s3://bucket/crops"})
    pods = Pods(image="repo/cosmic-ray:1", ray_version="2.60.0", workers=4, cpus=16, memory_gib=64, gpus=1, secret="s3")
    config_map, ray_job = yaml.safe_load_all(render(job, "My_Split", pods))

    assert make(yaml.safe_load(config_map["data"]["job.yaml"])) == job
    assert ray_job["metadata"]["name"] == "my-split"
    cluster = ray_job["spec"]["rayClusterSpec"]
    head, worker = cluster["headGroupSpec"], cluster["workerGroupSpecs"][0]
    assert worker["replicas"] == worker["maxReplicas"] == 4
    (container,) = worker["template"]["spec"]["containers"]
    assert container["image"] == "repo/cosmic-ray:1"
    assert container["resources"]["limits"] == {"cpu": "16", "memory": "64Gi", "nvidia.com/gpu": "1"}
    assert container["envFrom"] == [{"secretRef": {"name": "s3"}}]
    assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]
    mounts = {volume["name"]: volume for volume in worker["template"]["spec"]["volumes"]}
    assert mounts["job"]["configMap"]["name"] == config_map["metadata"]["name"]
