"""A model folder becomes a version of a registered model: signature, input example, card, lineage tags, alias."""

from __future__ import annotations

import importlib.metadata
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from cosmic_ray.errors import JobError
from cosmic_ray.progress import say
from cosmic_ray.registry import server
from cosmic_ray.registry.kinds import KINDS
from cosmic_ray.registry.lineage import lineage_tags
from cosmic_ray.registry.model import StoredModel
from cosmic_ray.registry.package import CARD, copy_model, read_model
from cosmic_ray.registry.scrub import scrub

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

DIGEST, COMPLETE = "cosmic_ray.model_digest", "cosmic_ray.complete"
FOLDER = "model"
_DESCRIPTION_CHARS = 5000


def register_model(
    folder: str,
    name: str = "morphology-fm",
    *,
    alias: str = "candidate",
    tracking: str | None = None,
    run_id: str | None = None,
) -> str:
    """Register a model folder as a version of `name` and let `alias` point at it.

    The same model of the same run is registered once: a second call gives the version that is there, and leaves the
    alias where it meanwhile is.

    Args:
        folder: what `package.write_model` wrote, a folder or `s3://` prefix.
        name: of the registered model; made where there is none.
        alias: `latest` is not one: MLflow reserves it.
        tracking: tracking URI; as `server.tracking_uri` by default.
        run_id: the run that made the model, where there is one.

    Returns:
        The version.

    Raises:
        JobError: for the alias `latest`.
        DataError: where the folder is no model, or no server answers.
    """
    check_alias(alias)
    uri = server.tracking_uri(tracking)
    model = read_model(folder)
    server.require(uri)
    client = server.connect(uri)
    version = _existing(client, name, model.config.digest, run_id) or _create(client, uri, model, name, run_id)
    if version.tags.get(COMPLETE) != "true":
        client.set_registered_model_alias(name, alias, version.version)
        client.set_model_version_tag(name, version.version, COMPLETE, "true")
        say(f"registered models:/{name}@{alias} (version {version.version})")
    return str(version.version)


def check_alias(alias: str, key: str = "alias") -> None:
    """Refuse `latest`, before anything starts.

    Raises:
        JobError: naming `key`.
    """
    if alias.lower() == "latest":
        raise JobError(key, alias, "MLflow reserves this alias", "choose another, such as candidate or production")


def model_tags(model: StoredModel) -> dict[str, str]:
    """Tags of a version: kind, digest, `simulated`, and what it was made from."""
    config = model.config
    facts = {"kind": config.kind, "model_digest": config.digest, "simulated": str(config.simulated).lower()}
    facts |= lineage_tags(scrub(config.lineage))
    return {f"cosmic_ray.{key}": value for key, value in facts.items()}


def _existing(client: MlflowClient, name: str, digest: str, run_id: str | None) -> ModelVersion | None:
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.tags.get(DIGEST) == digest and (version.run_id or None) == run_id:
            return version
    return None


def _create(client: MlflowClient, uri: str, model: StoredModel, name: str, run_id: str | None) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    logged_id = _log(client, uri, model, name, run_id)
    try:
        client.create_registered_model(name, description=KINDS[model.config.kind].about)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    with server.globally(uri):
        return client.create_model_version(
            name,
            f"models:/{logged_id}",
            run_id,
            model_tags(model),
            description=_description(model.card),
            model_id=logged_id,
        )


def _log(client: MlflowClient, uri: str, model: StoredModel, name: str, run_id: str | None) -> str:
    """Store the folder as an MLflow model, without a line of pickle; returns its id."""
    import mlflow.pyfunc
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    experiment = client.get_run(run_id).info.experiment_id if run_id else server.experiment_id(client, uri)
    logged = client.create_logged_model(experiment, name, run_id, model_tags(model), model_type=model.config.kind)
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch, FOLDER)
        copy_model(model, str(here))
        package = Path(scratch, "package")
        mlflow.pyfunc.save_model(
            path=str(package),
            loader_module="cosmic_ray.registry.flavor",
            data_path=str(here),
            mlflow_model=Model(logged.artifact_location, run_id, model_uuid=logged.model_id, model_id=logged.model_id),
            signature=signature(model),
            input_example=model.config.served().example,
            pip_requirements=[f"{need}=={importlib.metadata.version(need)}" for need in model.config.needs],
        )
        client.log_model_artifacts(logged.model_id, str(package))
    client.finalize_logged_model(logged.model_id, "READY")
    if run_id:
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return logged.model_id


def signature(model: StoredModel) -> ModelSignature:
    """What the model's kind says that it takes and gives, one tensor each, and its parameters with their defaults."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    served = model.config.served()
    takes, gives = (Schema([TensorSpec(np.dtype(dtype), shape)]) for dtype, shape in (served.takes, served.gives))
    types = {bool: DataType.boolean, int: DataType.long, float: DataType.double, str: DataType.string}
    params = [ParamSpec(name, types[type(default)], default) for name, default in served.params.items()]
    return ModelSignature(takes, gives, ParamSchema(params) if params else None)


def _description(card: str) -> str:
    rest = f"\n\n(The whole card is the model's `{CARD}`.)"
    return card if len(card) <= _DESCRIPTION_CHARS else card[: _DESCRIPTION_CHARS - len(rest)] + rest
