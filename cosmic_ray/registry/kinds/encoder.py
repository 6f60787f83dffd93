"""`encoder`: nucleus crops to embeddings. A timm network: the encoder of a masked autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from cosmic_ray.config import Config
from cosmic_ray.registry.kinds.crops import InputSpec, checked_crops, drawn_crops, served_shape
from cosmic_ray.registry.model import Model, ModelConfig, Precision, Served, filled

if TYPE_CHECKING:
    import numpy as np
    import torch


class Preprocessing(Config):
    """How a crop becomes the network's input: `cosmic_ray.ingest.augment.prepare(crops, size, recipe)`."""

    recipe: Literal["paper", "better"]
    """`paper` repeats one grey channel to three; `better` keeps the channels."""

    size: int = Field(ge=1)
    """Side of the network's input in pixels."""


class EncoderConfig(ModelConfig):
    """`config.json` of a crop encoder."""

    kind: Literal["encoder"] = "encoder"
    """Maps crops to embeddings."""

    network: dict[str, Any]
    """Arguments of `timm.create_model`, `model_name` among them, such that its forward gives the embedding: float32
    (N, C', size, size) -> (N, D)."""

    input: InputSpec
    """The crops that it takes: those of the crop store that it was trained on."""

    preprocessing: Preprocessing
    """What happens to them first."""

    embedding_width: int
    """D of the (N, D) float32 embeddings."""

    decides: ClassVar[tuple[str, ...]] = ("network", "input", "preprocessing")
    needs: ClassVar[tuple[str, ...]] = ("numpy", "safetensors", "timm", "torch")

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

    def build(self, tensors: Mapping[str, torch.Tensor]) -> torch.nn.Module:
        """`timm.create_model(**network)`: float32 (N, C', size, size) -> (N, D)."""
        import timm

        return filled(lambda: timm.create_model(**self.network), tensors)

    def try_out(self, network: torch.nn.Module) -> None:
        """Embed an empty crop."""
        import torch

        channels = 3 if self.preprocessing.recipe == "paper" else len(self.input.channels)
        image = torch.zeros(1, channels, self.preprocessing.size, self.preprocessing.size)
        try:
            embedding = network(image)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"the network does not take {tuple(image.shape)}: {error}") from None
        if embedding.shape != (1, self.embedding_width):
            raise ValueError(
                f"the network gives {tuple(embedding.shape)}, not one vector a crop of width {self.embedding_width}"
            )
        if not embedding.isfinite().all():
            raise ValueError("the network's embedding of an empty crop is not finite")

    def served(self) -> Served:
        """uint8 (-1, H, W), or (-1, C, H, W) for several channels -> float32 (-1, D)."""
        shape = served_shape(self.input)
        return Served(("uint8", shape), ("float32", (-1, self.embedding_width)), drawn_crops(shape))


class Encoder(Model[EncoderConfig]):
    """An encoder of nucleus crops."""

    config_type = EncoderConfig
    about = "Encoders of nucleus crops: uint8 crops to embeddings."

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

        crops = checked_crops(crops, self.config.input)
        found = np.empty((len(crops), self.config.embedding_width), np.float32)
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for start in range(0, len(crops), batch_size):
                batch = torch.from_numpy(np.array(crops[start : start + batch_size])).to(self.device)
                found[start : start + batch_size] = self._forward(batch, precision).float().cpu().numpy()
        if not np.isfinite(found).all():
            raise self._broken(f"the embedding of crop {int(np.argmin(np.isfinite(found).all(axis=1)))}")
        return found

    def predict(self, given: np.ndarray, **params: Any) -> np.ndarray:
        """`embed`."""
        return self.embed(given)

    def _forward(self, crops: torch.Tensor, precision: Precision) -> torch.Tensor:
        import torch

        from cosmic_ray.ingest.augment import prepare

        steps = self.config.preprocessing
        with torch.autocast(self.device.partition(":")[0], torch.bfloat16, enabled=precision == "bfloat16"):
            return self._network(prepare(crops, steps.size, steps.recipe))
