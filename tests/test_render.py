"""The RayJob holds the job file and the pods that were asked for."""

from __future__ import annotations

import yaml

from cosmic_ray.jobs import make
from cosmic_ray.render import Pods, render


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
