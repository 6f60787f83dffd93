"""`encoder`: nucleus crops to embeddings. A timm network: the encoder of a masked autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        return self._found(crops, batch_size, lambda batch: self._forward(batch, precision).float(), "embedding")

    def tokens(self, crops: np.ndarray, *, batch_size: int = 64, precision: Precision = "float32") -> np.ndarray:
        """The tokens that enter the transformer's last block, where img2seq's `recipe: paper` begins.

        Args and errors as of `embed`; TypeError also where the network is no transformer.

        Returns:
            float16 (N, T, D), the tokens before those of the patches (a class token) first.
        """
        import torch

        blocks = getattr(self._network, "blocks", None)
        if not isinstance(blocks, torch.nn.Sequential):
            raise TypeError(f"the model {self.uri} is no transformer: it has no blocks whose tokens could be had")

        def entering(batch: torch.Tensor) -> torch.Tensor:
            seen: list[torch.Tensor] = []
            hook = blocks[-1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
            try:
                self._forward(batch, precision)
            finally:
                hook.remove()
            return seen[0].half()

        return self._found(crops, batch_size, entering, "tokens")

    def predict(self, given: np.ndarray, **params: Any) -> np.ndarray:
        """`embed`."""
        return self.embed(given)

    def _found(
        self, crops: np.ndarray, batch_size: int, made: Callable[[torch.Tensor], torch.Tensor], what: str
    ) -> np.ndarray:
        """What `made` makes of batches of crops on the device, (N, ...)."""
        import numpy as np
        import torch

        crops = checked_crops(crops, self.config.input)
        found = None
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for start in range(0, max(len(crops), 1), batch_size):
                batch = (
                    made(torch.from_numpy(np.array(crops[start : start + batch_size])).to(self.device)).cpu().numpy()
                )
                if found is None:
                    found = np.empty((len(crops), *batch.shape[1:]), batch.dtype)
                found[start : start + batch_size] = batch
        finite = np.isfinite(found).reshape(len(found), -1).all(axis=1) if len(found) else np.ones(0, bool)
        if not finite.all():
            raise self._broken(f"the {what} of crop {int(np.argmin(finite))}")
        return found

    def _forward(self, crops: torch.Tensor, precision: Precision) -> torch.Tensor:
        import torch

        from cosmic_ray.ingest.augment import prepare

        steps = self.config.preprocessing
        with torch.autocast(self.device.partition(":")[0], torch.bfloat16, enabled=precision == "bfloat16"):
            return self._network(prepare(crops, steps.size, steps.recipe))
