"""The exported model folder: what a training run leaves, what the registry holds, and what `load_model` reads.

    encoder.safetensors   the weights, under the names of a plain `timm.create_model(**kwargs)`
    card.md               what it is, what it was made from, and what it is not good for
    config.json           network, input, preprocessing, lineage, digests; written last: without it there is no model

Nothing in it is pickled and nothing in it runs code. MLflow is not needed to write or to read it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from cosmic_ray import storage
from cosmic_ray.config import Config, validate
from cosmic_ray.errors import CosmicError, DataError, NotFoundError
from cosmic_ray.output import canonical, encode
from cosmic_ray.registry.scrub import scrub
from cosmic_ray.stores.manifest import CropSpec

if TYPE_CHECKING:
    import torch

WEIGHTS, CONFIG, CARD = "encoder.safetensors", "config.json", "card.md"
FORMAT, VERSION = "cosmic-ray/model", 1


class InputSpec(CropSpec):
    """The crops that a model takes: a crop store's spec. Those of another shape are refused, never resized silently."""

    @model_validator(mode="after")
    def _square(self) -> InputSpec:
        if self.height != self.width:
            raise ValueError(f"crops must be square, not {self.height}x{self.width}")
        return self


class Preprocessing(Config):
    """How a crop becomes the network's input: `cosmic_ray.ingest.augment.prepare(crops, size, recipe)`."""

    recipe: Literal["paper", "better"]
    """`paper` repeats one grey channel to three; `better` keeps the channels."""

    size: int = Field(ge=1)
    """Side of the network's input in pixels."""


class ModelConfig(Config):
    """`config.json`."""

    format: Literal["cosmic-ray/model"] = FORMAT
    """Names this format."""

    version: Literal[1] = VERSION
    """Version of this format."""

    kind: Literal["encoder"] = "encoder"
    """What it does: `encoder` maps crops to embeddings."""

    network: dict[str, Any]
    """Arguments of `timm.create_model`, `model_name` among them; its forward gives the embedding."""

    input: InputSpec
    """The crops that it takes."""

    preprocessing: Preprocessing
    """What happens to them first."""

    embedding_width: int
    """D of the (N, D) float32 embeddings."""

    weights_sha256: str
    """Of the bytes of `encoder.safetensors`."""

    digest: str
    """Of all that decides the embeddings: kind, network, input, preprocessing, weights; not lineage and card."""

    lineage: dict[str, Any]
    """What it was made from: `store` and `split` as {uri, content_hash}, `job` as its fingerprint, `step`..."""

    simulated: bool
    """Whether any of its training data was simulated."""

    @field_validator("network")
    @classmethod
    def _harmless(cls, network: dict[str, Any]) -> dict[str, Any]:
        """These would have timm download or unpickle something."""
        name = network.get("model_name")
        if not isinstance(name, str) or ":" in name or "/" in name:
            raise ValueError(f"model_name {name!r} is not the plain name of a timm model")
        fetching = {"pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
        if found := sorted(fetching & set(network)):
            raise ValueError(f"{', '.join(found)} would load other weights than those in the folder")
        return network


@dataclass(frozen=True)
class StoredModel:
    """A model folder whose digests were verified."""

    uri: str
    config: ModelConfig
    card: str
    weights: bytes

    def network(self) -> torch.nn.Module:
        """The network with its weights, on the CPU, in evaluation mode: float32 (N, C', size, size) -> (N, D)."""
        from safetensors.torch import load

        return build_network(self.config.network, load(self.weights))


def write_model(
    folder_uri: str,
    kwargs: Mapping[str, Any],
    state_dict: Mapping[str, torch.Tensor],
    input_spec: CropSpec | Mapping[str, Any],
    preprocessing: Preprocessing | Mapping[str, Any],
    lineage: Mapping[str, Any],
    card: str,
    *,
    simulated: bool,
) -> ModelConfig:
    """Write a model folder, `config.json` last; the same arguments give the same bytes.

    Args:
        folder_uri: a folder or `s3://bucket/prefix`; an older model there is replaced.
        kwargs: arguments of `timm.create_model`, `model_name` among them, such that the network's forward is the
            embedding: float32 (N, C', size, size) -> (N, D).
        state_dict: all weights of that network.
        input_spec: the crops that it takes: the spec of the crop store that it was trained on.
        preprocessing: recipe and size of `ingest.augment.prepare`.
        lineage: what it was made from: `store` and `split` as {"uri", "content_hash"}, `job` as the job's fingerprint.
        card: Markdown, see `registry.card`.
        simulated: whether any of its training data was simulated.

    Raises:
        ValueError: where the weights do not fit the network, or the network does not fit the preprocessing.
        JobError: for an ill-formed spec, naming the key.
    """
    from safetensors.torch import save

    spec = validate(InputSpec, _plain(input_spec), "input_spec")
    steps = validate(Preprocessing, _plain(preprocessing), "preprocessing")
    weights = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(state_dict.items())})
    sha256 = hashlib.sha256(weights).hexdigest()
    facts = {"kind": "encoder", "network": dict(kwargs), "input": _plain(spec), "preprocessing": _plain(steps)}
    config = validate(
        ModelConfig,
        facts
        | {
            "embedding_width": _embedding_width(kwargs, state_dict, spec, steps),
            "weights_sha256": sha256,
            "digest": _digest(facts, sha256),
            "lineage": scrub(dict(lineage)),
            "simulated": simulated,
        },
        "model",
    )
    copy_model(StoredModel(folder_uri, config, card, weights), folder_uri)
    return config


def copy_model(stored: StoredModel, folder_uri: str) -> None:
    """Write a model that was read to another folder, `config.json` last."""
    storage.delete(storage.join(folder_uri, CONFIG))
    storage.write_bytes(storage.join(folder_uri, WEIGHTS), stored.weights)
    storage.write_bytes(storage.join(folder_uri, CARD), stored.card.encode())
    storage.write_bytes(storage.join(folder_uri, CONFIG), encode(_plain(stored.config)))


def read_config(uri: str) -> ModelConfig:
    """`config.json` of a model folder.

    Raises:
        NotFoundError: where `uri` holds no model.
        DataError: for another format or an unknown version.
    """
    where = storage.join(uri, CONFIG)
    try:
        tree = storage.read_json(where)
    except NotFoundError:
        inner = storage.join(uri, "model")
        there = storage.exists(storage.join(inner, CONFIG))
        remedy = f"did you mean {inner}?" if there else "name the folder that a training run left"
        raise NotFoundError(uri, f"no model is here: no {CONFIG}", remedy) from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise DataError(where, f"not a {FORMAT} file")
    if tree.get("version") != VERSION:
        raise DataError(
            where, f"format version {tree.get('version')!r}; this code reads {VERSION}", "update cosmic-ray"
        )
    try:
        return validate(ModelConfig, tree)
    except CosmicError as error:
        raise DataError(where, str(error)) from None


def read_model(uri: str) -> StoredModel:
    """Read a model folder and verify its digests.

    Raises:
        NotFoundError: where `uri` holds no model.
        DataError: for another format, an unknown version, or weights that are not the ones that were written.
    """
    config = read_config(uri)
    weights = storage.read_bytes(storage.join(uri, WEIGHTS))
    sha256 = hashlib.sha256(weights).hexdigest()
    if sha256 != config.weights_sha256:
        raise DataError(
            storage.join(uri, WEIGHTS), f"its sha256 is {sha256}, not {config.weights_sha256}", "copy the folder again"
        )
    facts = {key: _plain(config)[key] for key in ("kind", "network", "input", "preprocessing")}
    if _digest(facts, sha256) != config.digest:
        raise DataError(storage.join(uri, CONFIG), "its digest does not match its content", "copy the folder again")
    return StoredModel(uri, config, storage.read_bytes(storage.join(uri, CARD)).decode(), weights)


def build_network(kwargs: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """`timm.create_model(**kwargs)` holding `state_dict`, in evaluation mode.

    Raises:
        ValueError: where the weights do not fit.
    """
    import timm
    import torch

    with torch.device("meta"):
        network = timm.create_model(**kwargs)
    if len(network.state_dict()) < sum(1 for _ in network.buffers()) + sum(1 for _ in network.parameters()):
        network = timm.create_model(**kwargs)  # some buffers are computed, not stored: the meta device has no values
    try:
        network.load_state_dict(dict(state_dict), assign=True)
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    return network.eval().requires_grad_(False)


def _embedding_width(
    kwargs: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor], spec: InputSpec, steps: Preprocessing
) -> int:
    """D, from the embedding of an empty crop."""
    import torch

    channels = 3 if steps.recipe == "paper" else len(spec.channels)
    image = torch.zeros(1, channels, steps.size, steps.size)
    network = build_network(kwargs, {name: tensor.detach().cpu() for name, tensor in state_dict.items()})
    try:
        embedding = network(image)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the network does not take {tuple(image.shape)}: {error}") from None
    if embedding.ndim != 2:
        raise ValueError(f"the network gives {tuple(embedding.shape)}, not one vector a crop")
    if not embedding.isfinite().all():
        raise ValueError("the network's embedding of an empty crop is not finite")
    return int(embedding.shape[1])


def _digest(facts: Mapping[str, Any], weights_sha256: str) -> str:
    return hashlib.sha256(canonical({**facts, "weights_sha256": weights_sha256})).hexdigest()


def _plain(value: Any) -> dict[str, Any]:
    return value.model_dump(mode="json") if isinstance(value, Config) else dict(value)
