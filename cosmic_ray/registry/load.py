"""Load a model for use: from the registry, or from the folder that a training run left."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from cosmic_ray import storage
from cosmic_ray.errors import DataError, JobError, NotFoundError
from cosmic_ray.registry import server
from cosmic_ray.registry.kinds import KINDS
from cosmic_ray.registry.model import StoredModel
from cosmic_ray.registry.package import read_config, read_model
from cosmic_ray.registry.scrub import scrub_text

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>[^/@]+))$")
KIND = "cosmic_ray.kind"
"""The tag of a version that says its kind."""
_UNKNOWN = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}
"""MLflow's answers to the name, the version and the alias (the second) that it does not know."""


def load_model(uri: str, *, device: str | None = None, tracking: str | None = None) -> Any:
    """A model, ready for use.

    Args:
        uri: `models:/morphology-fm@candidate`, `models:/morphology-fm/3`, or a model folder (path, `file://`, `s3://`).
        device: `cpu`, `cuda`, `cuda:1`...; an accelerator by default, where there is one.
        tracking: where the registry is; MLFLOW_TRACKING_URI by default, else `runs/mlflow.db` in the working directory.

    Returns:
        By the model's kind an `Encoder`, `TranscriptomeEncoder`, `Seq2Img` or `Img2Seq`: see `registry.kinds`.

    Raises:
        JobError: for an ill-formed `models:/` URI.
        DataError: where there is no such model, its digests do not match, or no server answers.
    """
    stored = fetch_model(uri, tracking=tracking)
    return KINDS[stored.config.kind](stored, device)


def fetch_model(uri: str, *, tracking: str | None = None) -> StoredModel:
    """Read a model as `load_model` would, verified, without building its network. Raises as `load_model`."""
    if uri.startswith("models:"):
        return _fetch_registered(uri, server.tracking_uri(tracking))
    return read_model(storage.absolute(uri))


def check_model_uri(uri: str, key: str = "model") -> None:
    """Refuse an ill-formed `models:/` URI, before anything starts.

    Raises:
        JobError: naming `key`.
    """
    if not uri.startswith("models:"):
        return
    match = _REGISTERED.match(uri)
    if not match:
        raise JobError(key, uri, "not a registered model's URI", "write models:/NAME@ALIAS or models:/NAME/VERSION")
    if "latest" in ((match["alias"] or "").lower(), (match["version"] or "").lower()):
        remedy = f"name an alias or a version: models:/{match['name']}@candidate"
        raise JobError(key, uri, "`latest` is whatever was registered last, so nothing to build on", remedy)
    if match["version"] and not match["version"].isdecimal():
        raise JobError(key, uri, f"{match['version']!r} is no version", "versions are numbers; aliases follow an @")


def require_model(
    uri: str, key: str = "model", tracking: str | None = None, kinds: Collection[str] = ("encoder",)
) -> None:
    """Refuse a model that is not there or is of another kind, before anything starts; none of its weights are read.

    Args:
        uri: as `load_model` takes it.
        key: where in the job it stands.
        tracking: where the registry is, as in `load_model`.
        kinds: those that will do.

    Raises:
        JobError: naming `key`: for an ill-formed URI, no such model, one of another kind, or a registry that does not
            answer.
    """
    check_model_uri(uri, key)
    try:
        if uri.startswith("models:"):
            kind = _resolved(uri, server.tracking_uri(tracking))[1].tags.get(KIND, "encoder")
        else:
            kind = read_config(uri).kind
    except DataError as error:
        raise JobError(key, uri, error.problem, error.remedy) from None
    if kind not in kinds:
        raise JobError(key, uri, f"a model of kind {kind}", f"wanted here: {' or '.join(kinds)}")


def _fetch_registered(uri: str, where: str) -> StoredModel:
    check_model_uri(uri)
    client, version = _resolved(uri, where)
    from mlflow.exceptions import MlflowException

    try:
        return _download(client, f"models:/{version.name}/{version.version}", where)
    except MlflowException as error:
        raise DataError(uri, f"{scrub_text(str(error))}", f"the registry is {scrub_text(where)}") from None


def _resolved(uri: str, where: str) -> tuple[MlflowClient, ModelVersion]:
    """A client of the registry at `where`, and the version that a well-formed `models:/` URI means there.

    Raises:
        NotFoundError: where there is no such model.
        DataError: where no server answers.
    """
    match = _REGISTERED.match(uri)
    path = server.database(where)
    if path is not None and not path.is_file():
        remedy = "run from the folder that holds runs/, or set MLFLOW_TRACKING_URI"
        raise NotFoundError(uri, f"there is no tracking database at {path}", remedy)
    server.require(where)
    client = server.connect(where)
    from mlflow.exceptions import MlflowException

    name = match["name"]
    try:
        if match["alias"]:
            return client, client.get_model_version_by_alias(name, match["alias"])
        return client, client.get_model_version(name, match["version"])
    except MlflowException as error:
        problem, registry = scrub_text(str(error)), f"the registry is {scrub_text(where)}"
        if error.error_code in _UNKNOWN:
            remedy = f"{registry}: let a training job register it, or give the URI of a model folder"
            raise NotFoundError(uri, problem, remedy) from None
        raise DataError(uri, problem, registry) from None


def _download(client: Any, uri: str, where: str) -> StoredModel:
    import mlflow

    from cosmic_ray.registry.register import FOLDER

    with server.globally(where), tempfile.TemporaryDirectory() as scratch:
        found = mlflow.artifacts.download_artifacts(
            f"{uri}/data/{FOLDER}", dst_path=scratch, tracking_uri=where, registry_uri=where
        )
        stored = read_model(found)
    return dataclasses.replace(stored, uri=uri)
