"""Load a model for use: from the registry, or from the folder that a training run left."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from cosmic_ray import storage
from cosmic_ray.errors import DataError, JobError, NotFoundError
from cosmic_ray.registry import server
from cosmic_ray.registry.package import StoredModel, read_config, read_model
from cosmic_ray.registry.scrub import scrub_text

if TYPE_CHECKING:
    import numpy as np
    import torch
    from mlflow import MlflowClient

Precision = Literal["float32", "bfloat16"]
_REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>[^/@]+))$")
_UNKNOWN = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}
"""MLflow's answers to the name, the version and the alias (the second) that it does not know."""


class Encoder:
    """An encoder of nucleus crops, ready for use; made by `load_model`.

    Attributes:
        config: network, input, preprocessing, lineage, digest.
        card: the model card, Markdown.
        uri: where it came from; a registered model's with its version, whatever alias it was asked for by.
    """

    def __init__(self, stored: StoredModel, device: str | None = None):
        self.config, self.card, self.uri = stored.config, stored.card, stored.uri
        self.device = device or default_device()
        self._network = stored.network().to(self.device)

    def embed(self, crops: np.ndarray, *, batch_size: int = 256, precision: Precision = "float32") -> np.ndarray:
        """Embed crops: the same crops in the same batches on the same device give the same numbers.

        Args:
            crops: uint8 (N, H, W), or (N, C, H, W), of the size and channels of `config.input`; background 0.
            batch_size: crops on the device at once; embeddings depend on it only by rounding.
            precision: `bfloat16` is for accelerators: several times faster, to about three digits.

        Returns:
            float32 (N, D).

        Raises:
            TypeError: for another dtype than uint8.
            ValueError: for another shape than the model takes, or embeddings that are not finite.
        """
        import numpy as np
        import torch

        crops = self._checked(crops)
        found = np.empty((len(crops), self.config.embedding_width), np.float32)
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for start in range(0, len(crops), batch_size):
                batch = torch.from_numpy(np.array(crops[start : start + batch_size])).to(self.device)
                found[start : start + batch_size] = self._forward(batch, precision).float().cpu().numpy()
        if not np.isfinite(found).all():
            row = int(np.argmin(np.isfinite(found).all(axis=1)))
            raise ValueError(f"the embedding of crop {row} is not finite: the model {self.uri} is damaged or diverged")
        return found

    def _forward(self, crops: torch.Tensor, precision: Precision) -> torch.Tensor:
        import torch

        from cosmic_ray.ingest.augment import prepare

        steps = self.config.preprocessing
        with torch.autocast(self.device.partition(":")[0], torch.bfloat16, enabled=precision == "bfloat16"):
            return self._network(prepare(crops, steps.size, steps.recipe))

    def _checked(self, crops: np.ndarray) -> np.ndarray:
        import numpy as np

        crops = np.asarray(crops)
        if crops.dtype != np.uint8:
            raise TypeError(f"crops must be uint8 with background 0, as in a crop store; these are {crops.dtype}")
        channels, height, width = self.config.input.shape
        if crops.ndim == 3 and channels == 1:
            crops = crops[:, None]
        if crops.ndim != 4 or crops.shape[1:] != (channels, height, width):
            wanted = f"(N, {channels}, {height}, {width})" + (f" or (N, {height}, {width})" if channels == 1 else "")
            names = ", ".join(self.config.input.channels)
            raise ValueError(f"crops are {crops.shape}; this model takes {wanted}, with channels {names}")
        return crops


LOADERS: dict[str, Callable[[StoredModel, str | None], Any]] = {"encoder": Encoder}
"""Kind of a model -> what `load_model` makes of it."""


def load_model(uri: str, *, device: str | None = None, tracking: str | None = None) -> Any:
    """A model, ready for use.

    Args:
        uri: `models:/morphology-fm@candidate`, `models:/morphology-fm/3`, or a model folder (path, `file://`, `s3://`).
        device: `cpu`, `cuda`, `cuda:1`...; an accelerator by default, where there is one.
        tracking: where the registry is; MLFLOW_TRACKING_URI by default, else `runs/mlflow.db` in the working directory.

    Returns:
        By the model's kind; for an encoder an `Encoder`.

    Raises:
        JobError: for an ill-formed `models:/` URI.
        DataError: where there is no such model, its digests do not match, or no server answers.
    """
    stored = fetch_model(uri, tracking=tracking)
    return LOADERS[stored.config.kind](stored, device)


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


def require_model(uri: str, key: str = "model", tracking: str | None = None) -> None:
    """Refuse a model that is not there, before anything starts; none of its weights are read.

    Args:
        uri: as `load_model` takes it.
        key: where in the job it stands.
        tracking: where the registry is, as in `load_model`.

    Raises:
        JobError: naming `key`: for an ill-formed URI, no such model, or a registry that does not answer.
    """
    check_model_uri(uri, key)
    try:
        if uri.startswith("models:"):
            _resolved(uri, server.tracking_uri(tracking))
        else:
            read_config(uri)
    except DataError as error:
        raise JobError(key, uri, error.problem, error.remedy) from None


def default_device() -> str:
    """`cuda` or `mps` where there is one, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def _fetch_registered(uri: str, where: str) -> StoredModel:
    check_model_uri(uri)
    client, name, version = _resolved(uri, where)
    from mlflow.exceptions import MlflowException

    try:
        return _download(client, f"models:/{name}/{version}", where)
    except MlflowException as error:
        raise DataError(uri, f"{scrub_text(str(error))}", f"the registry is {scrub_text(where)}") from None


def _resolved(uri: str, where: str) -> tuple[MlflowClient, str, str]:
    """A client of the registry at `where`, and the name and version that a well-formed `models:/` URI means there.

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
            return client, name, client.get_model_version_by_alias(name, match["alias"]).version
        return client, name, client.get_model_version(name, match["version"]).version
    except MlflowException as error:
        problem, registry = scrub_text(str(error)), f"the registry is {scrub_text(where)}"
        if error.error_code in _UNKNOWN:
            remedy = f"{registry}: let a pretrain-mae job register it, or give the URI of a model folder"
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
