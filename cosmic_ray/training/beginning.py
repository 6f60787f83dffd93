"""What a run starts from (`init_from`): read once, by the driver, and kept beside the run.

An alias moves and a folder may go; a run that is started again has to begin with the same weights, on every worker.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cosmic_ray import storage
from cosmic_ray.errors import JobError, NotFoundError
from cosmic_ray.training import checkpoint

if TYPE_CHECKING:
    import torch

    from cosmic_ray.output import Output
    from cosmic_ray.training.mae import MAEObjective

INIT = "init.safetensors"


@dataclass(frozen=True)
class Beginning:
    """Weights to start from."""

    uri: str
    """Where they were found; a registered model's with its version, whatever alias it was asked for by."""
    encoder_only: bool
    """A model folder holds the encoder alone; a checkpoint holds the whole network."""
    tensors: dict[str, torch.Tensor]

    def load(self, objective: MAEObjective) -> None:
        """Put the weights into a new objective.

        Raises:
            JobError: where they are another network's.
        """
        (objective.load_encoder if self.encoder_only else objective.load_checkpoint)(self.tensors, self.uri)


def check(uri: str) -> None:
    """What can be known before anything starts.

    Raises:
        JobError: for an ill-formed `models:/` URI, or where nothing lies at another one.
    """
    from cosmic_ray.registry.load import check_model_uri

    check_model_uri(uri, "init_from")
    if not uri.startswith("models:") and not storage.exists(uri):
        raise JobError("init_from", uri, "nothing is there", "name a registered model, a model folder or a run's out")


def find(uri: str, tracking: str | None = None) -> Beginning:
    """Read what `init_from` names: a registered model, a model folder, a run's `out` or one of its checkpoints.

    Raises:
        JobError: where nothing is there.
        DataError: where it is damaged, or no server answers.
    """
    from cosmic_ray.registry.load import fetch_model

    if not uri.startswith("models:"):
        run = checkpoint.newest(checkpoint.within(uri)) or uri
        if storage.exists(storage.join(run, checkpoint.WEIGHTS)):
            return Beginning(run, False, exported_weights(run))
    try:
        model = fetch_model(uri, tracking=tracking)
    except NotFoundError as error:
        raise JobError("init_from", uri, error.problem, error.remedy) from None
    return Beginning(model.uri, True, dict(model.network().state_dict()))


def keep(uri: str, output: Output, tracking: str | None = None) -> dict[str, str]:
    """Read `init_from` into the run's folder, unless it is there; what the lineage tells of it.

    Raises:
        JobError, DataError: as `find`.
    """
    from safetensors.torch import save

    if not storage.exists(output.at(INIT)):
        found = find(uri, tracking)
        facts = {"uri": found.uri, "encoder_only": "yes" if found.encoder_only else ""}
        output.write(INIT, save({key: value.contiguous() for key, value in found.tensors.items()}, metadata=facts))
    data = storage.read_bytes(output.at(INIT))
    return {"uri": _facts(data)["uri"], "weights": hashlib.sha256(data).hexdigest()}


def kept(out: str) -> Beginning | None:
    """What `keep` left in the run's folder."""
    from safetensors.torch import load

    try:
        data = storage.read_bytes(storage.join(out, INIT))
    except NotFoundError:
        return None
    facts = _facts(data)
    return Beginning(facts["uri"], bool(facts["encoder_only"]), load(data))


def _facts(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file: in its header, whose length its first eight bytes give."""
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def exported_weights(uri: str) -> dict[str, torch.Tensor]:
    """The weights of the checkpoint at `uri` as they are exported: their averages, where there are any."""
    weights = checkpoint.read_tensors(uri, checkpoint.WEIGHTS)
    if checkpoint.EMA in checkpoint.names(uri):
        weights |= checkpoint.read_tensors(uri, checkpoint.EMA)
    return weights
