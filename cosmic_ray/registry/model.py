"""The frame of every kind of model: what `config.json` always says, and what `load_model` always gives.

A kind (`registry.kinds`) is a `ModelConfig`, which knows its network and what MLflow is told of it, and a `Model`,
which its user holds. Schemas import neither torch nor MLflow: a job is checked against a model without either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from cosmic_ray.config import Config
from cosmic_ray.output import canonical

if TYPE_CHECKING:
    import numpy as np
    import torch

FORMAT, VERSION = "cosmic-ray/model", 1
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Served:
    """What MLflow's pyfunc takes and gives: dtype and shape, -1 for the rows, of one tensor each."""

    takes: tuple[str, tuple[int, ...]]
    gives: tuple[str, tuple[int, ...]]
    example: np.ndarray
    """An input; synthetic, so that no user's data leave with the model."""
    params: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    """What may be said beside the input, with defaults."""


class ModelConfig(Config):
    """`config.json`: what every kind says. A kind adds `kind` and keys of its own."""

    format: Literal["cosmic-ray/model"] = FORMAT
    """Names this format."""

    version: Literal[1] = VERSION
    """Version of this format."""

    kind: str
    """What it does; a key of `registry.kinds.KINDS`."""

    weights_sha256: str
    """Of the bytes of the safetensors file."""

    digest: str
    """Of all that decides what it gives: the kind, the keys of `decides`, the weights; not lineage and card."""

    lineage: dict[str, Any]
    """What it was made from: `store`, `split`, `encoder`... as {uri, content_hash}; `job`, its fingerprint; `step`."""

    simulated: bool
    """Whether any of its training data was simulated."""

    decides: ClassVar[tuple[str, ...]]
    """The keys of the kind's own that the digest covers: all that change what the model gives."""

    needs: ClassVar[tuple[str, ...]] = ("numpy", "safetensors", "torch")
    """The packages that loading it imports, beside cosmic_ray and MLflow."""

    def computed_digest(self) -> str:
        """What `digest` must be."""
        said = self.model_dump(mode="json")
        facts = {key: said[key] for key in ("kind", *self.decides, "weights_sha256")}
        return hashlib.sha256(canonical(facts)).hexdigest()

    def build(self, tensors: Mapping[str, torch.Tensor]) -> torch.nn.Module:
        """The network holding `tensors`, on the CPU, in evaluation mode. Raises ValueError where they do not fit."""
        raise NotImplementedError

    def try_out(self, network: torch.nn.Module) -> None:
        """Run the network once before it is written. Raises ValueError where it does not do what the config says."""
        raise NotImplementedError

    def served(self) -> Served:
        """What MLflow is told that it takes and gives."""
        raise NotImplementedError


AnyConfig = TypeVar("AnyConfig", bound=ModelConfig)


@dataclass(frozen=True)
class StoredModel(Generic[AnyConfig]):
    """A model folder whose digests were verified."""

    uri: str
    config: AnyConfig
    card: str
    weights: bytes

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights by name, on the CPU."""
        from safetensors.torch import load

        return load(self.weights)

    def network(self) -> torch.nn.Module:
        """The network with its weights, on the CPU, in evaluation mode, without gradients."""
        return self.config.build(self.tensors())


class Model(Generic[AnyConfig]):
    """A model ready for use; made by `load_model`.

    Attributes:
        config: what `config.json` says: network, inputs, lineage, digest...
        card: the model card, Markdown.
        uri: where it came from; a registered model's with its version, whatever alias it was asked for by.
        device: where it computes.
    """

    config_type: ClassVar[type[ModelConfig]]
    about: ClassVar[str]
    """The description of a registered model of this kind, one sentence."""

    def __init__(self, stored: StoredModel[AnyConfig], device: str | None = None):
        self.config, self.card, self.uri = stored.config, stored.card, stored.uri
        self.device = device or default_device()
        self._network = stored.network().to(self.device)

    def predict(self, given: np.ndarray, **params: Any) -> np.ndarray:
        """What `config.served()` says, for MLflow's pyfunc."""
        raise NotImplementedError

    def _broken(self, what: str) -> ValueError:
        return ValueError(f"{what} is not finite: the model {self.uri} is damaged or diverged")


def default_device() -> str:
    """`cuda` or `mps` where there is one, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def filled(make: Callable[[], torch.nn.Module], tensors: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """The network that `make` makes, holding `tensors`, in evaluation mode, without gradients.

    It is made without memory first, so that a config which asks for more than its weights fill is refused before
    anything is allocated.

    Raises:
        ValueError: where the weights do not fit.
    """
    import torch

    with torch.device("meta"):
        network = make()
    stored = network.state_dict()
    try:
        network.load_state_dict(dict(tensors), assign=True)
        if len(stored) < sum(1 for _ in network.buffers()) + sum(1 for _ in network.parameters()):
            network = make()  # some buffers are computed, not stored: the meta device has no values
            network.load_state_dict(dict(tensors), assign=True)
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    return network.eval().requires_grad_(False)
