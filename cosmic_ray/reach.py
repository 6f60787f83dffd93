"""A job that goes to another machine: what in it would mean another thing there."""

from __future__ import annotations

import os
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from cosmic_ray import storage
from cosmic_ray.config import Config, Job, UriMark
from cosmic_ray.errors import JobError, JobErrors

TRACKING = "MLFLOW_TRACKING_URI"
_SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray Jobs sets it for the commands that it runs, KubeRay's among them."""


def uris(config: Config, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every key of type `Uri` that has a value, and the value; those of the jobs inside too."""
    for name, field in type(config).model_fields.items():
        yield from _uris(field.rebuild_annotation(), getattr(config, name), f"{prefix}{name}")
    if isinstance(config, Job):
        for key, job in config.nested().items():
            yield from uris(job, f"{key}.")


def require_reachable(job: Job) -> None:
    """Refuse relative local paths: on another machine they are relative to a folder that nobody chose.

    Raises:
        JobError: for each of them, with the path that it is here.
    """
    found = [error for key, uri in uris(job) if (error := relative(key, uri))]
    if found:
        raise found[0] if len(found) == 1 else JobErrors(found)


def untold_tracking(job: Job) -> str | None:
    """The first key, here or in a job inside, that leaves to the environment where MLflow is; None without one."""
    keys = [(f"{key}.", part.untold_tracking()) for key, part in job.nested().items()]
    return next((prefix + key for prefix, key in [("", job.untold_tracking()), *keys] if key), None)


def require_lasting_tracking(job: Job) -> None:
    """In a process that Ray Jobs started, refuse the default tracking database: it would lie in the working directory,
    which is Ray's own there, and be lost with runs and models.

    Raises:
        JobError: naming the key that would say where MLflow is.
    """
    if _SUBMITTED not in os.environ or (key := untold_tracking(job)) is None:
        return
    given = os.environ.get(TRACKING)
    if given is None or relative(TRACKING, given):
        problem = "MLflow's database would lie in a folder of Ray's on the head node, and be lost with its models"
        remedy = f"give the URI of a server or of a shared file, here or as {TRACKING} where you submit or in the nodes"
        raise JobError(key, given, problem, remedy)


def relative(key: str, uri: str) -> JobError | None:
    """What is to be said where `uri` is a relative path, in storage or of a SQLite database; None where it is not."""
    scheme, separator, rest = uri.partition("://")
    if uri.startswith("models:") or (separator and scheme not in ("file", "sqlite")):
        return None
    path = uri if not separator else rest[1:] if scheme == "sqlite" else rest
    if path.startswith("/"):
        return None
    here, other = str(storage.local_path(path)), "an s3:// URI"
    if scheme == "sqlite":
        here, other = f"sqlite:///{here}", "the URI of a server"
    problem = "a relative path means another place on another machine"
    return JobError(key, uri, problem, f"give {here} if all nodes see that, or {other}")


def _uris(annotation: Any, value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Config):
        yield from uris(value, f"{key}.")
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _uris(annotation, inner, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from _uris(annotation, inner, f"{key}.{place}")
    elif isinstance(value, str) and _is_uri(annotation):
        yield key, value


def _is_uri(annotation: Any) -> bool:
    """Whether `Uri` stands anywhere in a type."""
    marks = getattr(annotation, "__metadata__", ())
    return any(isinstance(mark, UriMark) for mark in marks) or any(map(_is_uri, typing.get_args(annotation)))
