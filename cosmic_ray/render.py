"""A job file -> a KubeRay RayJob: the same job as a manifest for `kubectl apply -f -`."""

from __future__ import annotations

import re
from typing import Any

import yaml

from cosmic_ray.config import Config, Job
from cosmic_ray.submit import entrypoint

_MOUNT, JOB_FILE = "/etc/cosmic-ray", "job.yaml"


class Pods(Config):
    """The pods of the Ray cluster that KubeRay makes for one job."""

    image: str
    """Container image that holds `cosmic_ray` (see `cluster/Dockerfile`)."""
    ray_version: str
    """Ray's version inside the image."""
    workers: int = 1
    """Worker pods."""
    cpus: int = 8
    """CPUs of each pod."""
    memory_gib: int = 32
    """Memory of each pod, GiB."""
    gpus: int = 0
    """GPUs of each worker pod."""
    secret: str | None = None
    """Name of a Kubernetes secret whose keys become environment variables (AWS_ACCESS_KEY_ID, ...)."""


class _Readable(yaml.SafeDumper):
    """The job file as the lines that it has, and nothing by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Readable.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def render(job: Job, name: str, pods: Pods) -> str:
    """The ConfigMap with the job file and the RayJob that runs it, as YAML.

    Args:
        job: a checked job.
        name: Kubernetes name; anything but lower-case letters, digits and dashes becomes a dash.
        pods: the cluster to make.
    """
    name = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-job"},
        "data": {JOB_FILE: yaml.safe_dump(job.resolved(), sort_keys=False)},
    }
    ray_job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name},
        "spec": {
            "entrypoint": entrypoint(f"{_MOUNT}/{JOB_FILE}"),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "backoffLimit": 3,
            "rayClusterSpec": _cluster(name, pods),
        },
    }
    return yaml.dump_all([config_map, ray_job], Dumper=_Readable, sort_keys=False)


def _cluster(name: str, pods: Pods) -> dict[str, Any]:
    return {
        "rayVersion": pods.ray_version,
        "headGroupSpec": {"rayStartParams": {"dashboard-host": "0.0.0.0"}, "template": _pod("head", name, pods, 0)},
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": pods.workers,
                "minReplicas": 0,
                "maxReplicas": pods.workers,
                "rayStartParams": {},
                "template": _pod("worker", name, pods, pods.gpus),
            }
        ],
    }


def _pod(role: str, name: str, pods: Pods, gpus: int) -> dict[str, Any]:
    limits = {"cpu": str(pods.cpus), "memory": f"{pods.memory_gib}Gi"}
    if gpus:
        limits["nvidia.com/gpu"] = str(gpus)
    container: dict[str, Any] = {
        "name": f"ray-{role}",
        "image": pods.image,
        "resources": {"limits": limits, "requests": limits},
        "volumeMounts": [{"name": "job", "mountPath": _MOUNT}, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    if pods.secret:
        container["envFrom"] = [{"secretRef": {"name": pods.secret}}]
    volumes = [
        {"name": "job", "configMap": {"name": f"{name}-job"}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{max(1, pods.memory_gib // 3)}Gi"}},
    ]
    return {"spec": {"containers": [container], "volumes": volumes}}
