"""The exported model folder: what a training run leaves, what the registry holds, and what `load_model` reads.

    <kind>.safetensors    the weights: encoder.safetensors, seq2img.safetensors...
    card.md               what it is, what it was made from, and what it is not good for
    config.json           network, inputs, lineage, digests (`registry.kinds`); written last: without it, no model

Nothing in it is pickled and nothing in it runs code: a config names one of the networks of this house, or a timm model,
and typed settings. MLflow is not needed to write or to read it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cosmic_ray import storage
from cosmic_ray.config import Config, validate
from cosmic_ray.errors import CosmicError, DataError, NotFoundError
from cosmic_ray.output import encode
from cosmic_ray.registry.kinds import KINDS
from cosmic_ray.registry.model import FORMAT, VERSION, ModelConfig, StoredModel
from cosmic_ray.registry.scrub import scrub

if TYPE_CHECKING:
    import torch

CONFIG, CARD = "config.json", "card.md"


def weights_name(kind: str) -> str:
    """The file of the weights in a folder of that kind."""
    return f"{kind}.safetensors"


def write_model(
    folder_uri: str,
    kind: str,
    facts: Mapping[str, Any],
    state_dict: Mapping[str, torch.Tensor],
    *,
    lineage: Mapping[str, Any],
    card: str,
    simulated: bool,
) -> ModelConfig:
    """Write a model folder, `config.json` last; the same arguments give the same bytes.

    Args:
        folder_uri: a folder or `s3://bucket/prefix`; an older model there is replaced.
        kind: a key of `registry.kinds.KINDS`.
        facts: the kind's own keys of its `ModelConfig`, plain data or configs: for `encoder` network, input,
            preprocessing, embedding_width; see the kind's file for the others.
        state_dict: all weights of that network.
        lineage: what it was made from: `store`, `split`, `encoder` as {"uri", "content_hash"}, `job` as the job's
            fingerprint.
        card: Markdown, see `registry.card`.
        simulated: whether any of its training data was simulated.

    Raises:
        ValueError: where the weights do not fit the network, or the network does not do what the facts say.
        JobError: for ill-formed facts, naming the key.
    """
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(state_dict.items())}
    weights = save(tensors)
    told = {
        **{key: _plain(value) for key, value in facts.items()},
        "kind": kind,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "digest": "",
        "lineage": scrub(dict(lineage)),
        "simulated": simulated,
    }
    config = validate(KINDS[kind].config_type, told, "model")
    config = config.model_copy(update={"digest": config.computed_digest()})
    config.try_out(config.build(tensors))
    copy_model(StoredModel(folder_uri, config, card, weights), folder_uri)
    return config


def copy_model(stored: StoredModel, folder_uri: str) -> None:
    """Write a model that was read to another folder, `config.json` last."""
    storage.delete(storage.join(folder_uri, CONFIG))
    storage.write_bytes(storage.join(folder_uri, weights_name(stored.config.kind)), stored.weights)
    storage.write_bytes(storage.join(folder_uri, CARD), stored.card.encode())
    storage.write_bytes(storage.join(folder_uri, CONFIG), encode(_plain(stored.config)))


def read_config(uri: str) -> ModelConfig:
    """`config.json` of a model folder.

    Raises:
        NotFoundError: where `uri` holds no model.
        DataError: for another format, an unknown version or kind.
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
    kind = tree.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise DataError(where, f"kind {kind!r}; this code reads {', '.join(KINDS)}", "update cosmic-ray")
    try:
        return validate(KINDS[kind].config_type, tree)
    except CosmicError as error:
        raise DataError(where, str(error)) from None


def read_model(uri: str) -> StoredModel:
    """Read a model folder and verify its digests.

    Raises:
        NotFoundError: where `uri` holds no model.
        DataError: for another format, an unknown version or kind, or weights that are not the ones that were written.
    """
    config = read_config(uri)
    at = storage.join(uri, weights_name(config.kind))
    weights = storage.read_bytes(at)
    sha256 = hashlib.sha256(weights).hexdigest()
    if sha256 != config.weights_sha256:
        raise DataError(at, f"its sha256 is {sha256}, not {config.weights_sha256}", "copy the folder again")
    if config.computed_digest() != config.digest:
        raise DataError(storage.join(uri, CONFIG), "its digest does not match its content", "copy the folder again")
    return StoredModel(uri, config, storage.read_bytes(storage.join(uri, CARD)).decode(), weights)


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, Config) else value
