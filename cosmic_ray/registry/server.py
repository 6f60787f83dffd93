"""Where MLflow is: an embedded SQLite database by default, any server by URI."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cosmic_ray.errors import DataError
from cosmic_ray.registry.scrub import scrub_text

if TYPE_CHECKING:
    from mlflow import MlflowClient

EMBEDDED = "sqlite:///runs/mlflow.db"
EXPERIMENT = "cosmic-ray"
_PROBE_S = 5.0


def tracking_uri(given: str | None = None) -> str:
    """The tracking URI that counts: `given`, else MLFLOW_TRACKING_URI, else `runs/mlflow.db` in the working directory.

    A relative SQLite path is made absolute, so that it means the same wherever it is read.
    """
    uri = given or os.environ.get("MLFLOW_TRACKING_URI") or EMBEDDED
    path = database(uri)
    return uri if path is None else f"sqlite:///{path.absolute()}"


def database(uri: str) -> Path | None:
    """The file of a SQLite URI; None for a server."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def connect(uri: str) -> MlflowClient:
    """A client of the tracking server and model registry at `uri`; an embedded database is made where there is none.

    Unless the environment says otherwise, MLflow's own usage reports are off and a lost server is given up on sooner
    than after MLflow's four minutes.
    """
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }.items():
        os.environ.setdefault(name, value)
    import mlflow

    for name in ("alembic", "mlflow.store.db", "mlflow.pyfunc"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if (path := database(uri)) is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


def require(uri: str) -> None:
    """See that something answers at `uri`, within seconds: MLflow itself would retry for minutes.

    Raises:
        DataError: where nothing does.
    """
    if not uri.startswith(("http://", "https://")):
        return
    import requests

    try:
        status = requests.get(f"{uri.rstrip('/')}/health", timeout=_PROBE_S).status_code
    except requests.RequestException as error:
        raise DataError(scrub_text(uri), f"no tracking server answers: {type(error).__name__}") from None
    if status >= 500:
        raise DataError(scrub_text(uri), f"the tracking server answers with status {status}")


def experiment_id(client: MlflowClient, uri: str) -> str:
    """The id of `EXPERIMENT`, made where there is none; an embedded one keeps its artefacts beside the database."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        path = database(uri)
        location = None if path is None else str(path.with_name("mlflow-artifacts"))
        try:
            return client.create_experiment(EXPERIMENT, artifact_location=location)
        except MlflowException:
            found = client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                raise
    return found.experiment_id


@contextmanager
def globally(uri: str) -> Iterator[None]:
    """Make `uri` MLflow's process-wide tracking URI for a block: parts of its registry look there, client or not."""
    import mlflow

    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)
