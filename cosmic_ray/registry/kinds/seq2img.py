"""`seq2img`: a cell's latent to images of its nucleus. A conditional diffusion model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from cosmic_ray.config import Config
from cosmic_ray.registry.kinds.conditions import VectorSpec, checked_vectors
from cosmic_ray.registry.kinds.crops import InputSpec, checked_crops
from cosmic_ray.registry.kinds.sampling import checked_count
from cosmic_ray.registry.model import Model, ModelConfig, Precision, Served, filled
from cosmic_ray.stores.manifest import CropSpec

if TYPE_CHECKING:
    import numpy as np
    import torch

    from cosmic_ray.models.sampling import Sampler
    from cosmic_ray.models.seq2img import Seq2ImgConfig
    from cosmic_ray.stores.embeddings import Embeddings

Width = Annotated[int, Field(ge=1, le=4096)]
Levels = Annotated[tuple[Width, ...], Field(min_length=1, max_length=8)]
_STEPS_AT_MOST = 10_000


class UNetFields(Config):
    """`models.unet.UNetConfig`, field by field."""

    image_size: Width
    widths: Levels
    depths: Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(min_length=1, max_length=8)]
    attention_from: int = Field(ge=0)
    condition_size: int = Field(ge=1, le=2**20)
    channels: Width
    patch: Width


class ImagenFields(Config):
    """`models.unet_imagen.ImagenConfig`, field by field."""

    image_size: Width
    condition_size: int = Field(ge=1, le=2**20)
    channels: Width
    dim: Width
    token_dim: Width
    widths: Levels


class Sampling(Config):
    """How it is sampled where nobody says otherwise."""

    sampler: Literal["ddpm", "ddpm-time", "ddim", "dpm++2m", "dpm++2m-sde", "unipc"]
    """See `models.sampling.Sampler`."""

    steps: int = Field(ge=1, le=_STEPS_AT_MOST)
    """Of the sampler; under guidance each takes two evaluations of the network."""

    guidance: float = Field(ge=0, allow_inf_nan=False)
    """1: the conditional model; more: beyond it; 0: the unconditional one."""


class Seq2ImgModelConfig(ModelConfig):
    """`config.json` of a seq2img model."""

    kind: Literal["seq2img"] = "seq2img"
    """Maps latents to images of nuclei."""

    recipe: Literal["paper", "better"]
    """Which network and which diffusion: see `models.seq2img.Seq2ImgConfig`."""

    network: UNetFields | ImagenFields
    """Its shape: `UNetFields` for `better`, `ImagenFields` for `paper`."""

    condition_drop: float = Field(ge=0, lt=1, allow_inf_nan=False)
    """Probability with which a training sample's latent was withheld; at 0 there is no unconditional model to guide."""

    latents: VectorSpec
    """The latents that it takes."""

    input: InputSpec
    """The crops that it was trained on, and that `refine` takes. It makes ones of `network.image_size` px."""

    sampling: Sampling
    """How it is sampled where nobody says otherwise."""

    decides: ClassVar[tuple[str, ...]] = ("recipe", "network", "condition_drop", "latents", "input", "sampling")
    needs: ClassVar[tuple[str, ...]] = ("diffusers", "numpy", "safetensors", "torch")

    @model_validator(mode="after")
    def _agrees(self) -> Seq2ImgModelConfig:
        """The parts of the config belong to each other."""
        if isinstance(self.network, UNetFields) != (self.recipe == "better"):
            raise ValueError(f"network is not one of recipe {self.recipe!r}")
        if self.network.condition_size != self.latents.width:
            raise ValueError(f"network takes latents of {self.network.condition_size}, not {self.latents.width}")
        channels = 1 if self.recipe == "paper" else self.network.channels
        if len(self.input.channels) != channels:
            raise ValueError(f"network makes {channels} channels; input has {', '.join(self.input.channels)}")
        if self.sampling.guidance not in (0.0, 1.0) and self.condition_drop == 0:
            raise ValueError("guidance needs a model that was also trained without latents: condition_drop is 0")
        return self

    @property
    def output(self) -> CropSpec:
        """The crops that it makes: channels as those that it was trained on, `network.image_size` px."""
        size = self.network.image_size
        return CropSpec(channels=self.input.channels, height=size, width=size)

    @classmethod
    def facts(cls, config: Seq2ImgConfig, **others: Any) -> dict[str, Any]:
        """The keys of `config` for `package.write_model`, beside `others`: latents, input, sampling."""
        from dataclasses import asdict

        network = {"network": asdict(config.network), "condition_drop": config.condition_drop}
        return {"recipe": config.recipe, **network, **others}

    def settings(self) -> Seq2ImgConfig:
        """What builds the network and its diffusion."""
        from cosmic_ray.models.seq2img import Seq2ImgConfig
        from cosmic_ray.models.unet import UNetConfig
        from cosmic_ray.models.unet_imagen import ImagenConfig

        network = UNetConfig if self.recipe == "better" else ImagenConfig
        return Seq2ImgConfig(self.recipe, network(**self.network.model_dump()), self.condition_drop)

    def build(self, tensors: Mapping[str, torch.Tensor]) -> torch.nn.Module:
        """`models.unet.UNet` or `models.unet_imagen.ImagenUNet`."""
        return filled(self.settings().build, tensors)

    def try_out(self, network: torch.nn.Module) -> None:
        """Denoise one empty image."""
        import torch

        shape = self.settings().shape
        made = network(
            torch.zeros(1, *shape), torch.zeros(1), torch.zeros(1, self.latents.width), torch.zeros(1).bool()
        )
        if made.shape != (1, *shape) or not made.isfinite().all():
            raise ValueError(f"the network's prediction is not finite, or {tuple(made.shape)} and not {(1, *shape)}")

    def served(self) -> Served:
        """float32 (-1, D) latents -> uint8 (-1, C, S, S); a row's noise is keyed by its number."""
        import numpy as np

        latents = np.linspace(-1, 1, 2 * self.latents.width, dtype=np.float32).reshape(2, -1)
        params = {"seed": 0, **self.sampling.model_dump()}
        return Served(("float32", (-1, self.latents.width)), ("uint8", (-1, *self.output.shape)), latents, params)


class Seq2Img(Model[Seq2ImgModelConfig]):
    """From transcriptome latents to images of nuclei."""

    config_type = Seq2ImgModelConfig
    about = "Diffusion models of nuclei given their cells' transcriptomes: latents to uint8 crops."

    def sample(
        self,
        latents: np.ndarray | Embeddings,
        cell_ids: Sequence[str] | None = None,
        *,
        seed: int = 0,
        guidance: float | None = None,
        sampler: Sampler | None = None,
        steps: int | None = None,
        batch_size: int = 64,
        precision: Precision = "float32",
    ) -> np.ndarray:
        """An image of each cell.

        The noise is keyed by (seed, cell id): the same cell, latent and seed give the same image in any batch and
        order, up to what rounding leaves of it (a grey level here and there). Several images of a cell take several
        seeds.

        Args:
            latents: floating (N, D), of the transcriptome encoder that `config.latents` names, or published
                `Embeddings`. Of a bare array nothing but the width can be checked.
            cell_ids: text, one a cell; by default the embeddings' own, or row numbers.
            guidance, sampler, steps: those of `config.sampling` by default; see `models.sampling.sample`.
            batch_size: cells on the device at once.
            precision: of the network's forward; `bfloat16` is for accelerators.

        Returns:
            uint8 (N, C, S, S), as `config.output` says.

        Raises:
            TypeError: for latents that are not floating, or ids that are no text.
            ValueError: for latents of another width or not finite, a wrong number of ids, settings out of range, or
                images that are not finite.
            DataError: for latents of another encoder.
        """
        given = {"guidance": guidance, "sampler": sampler, "steps": steps}
        return self._sampled(latents, cell_ids, None, 1.0, seed, given, batch_size, precision)

    def refine(
        self,
        crops: np.ndarray,
        latents: np.ndarray | Embeddings,
        cell_ids: Sequence[str] | None = None,
        *,
        strength: float = 0.5,
        seed: int = 0,
        guidance: float | None = None,
        sampler: Sampler | None = None,
        steps: int | None = None,
        batch_size: int = 64,
        precision: Precision = "float32",
    ) -> np.ndarray:
        """Given images, changed towards what their latents say (SDEdit; Meng et al. 2022).

        Args:
            crops: uint8 (N, H, W) or (N, C, H, W), as `config.input` says; resized to the network's own size.
            strength: in (0, 1]: the time up to which they are noised. Small ones keep what is there, 1 next to nothing.

        The rest, returns and errors as of `sample`; TypeError and ValueError also for crops that it does not take.
        """
        crops = checked_crops(crops, self.config.input)
        if not 0 < strength <= 1:
            raise ValueError(f"strength must be in (0, 1], not {strength}")
        given = {"guidance": guidance, "sampler": sampler, "steps": steps}
        return self._sampled(latents, cell_ids, crops, strength, seed, given, batch_size, precision)

    def predict(self, given: np.ndarray, **params: Any) -> np.ndarray:
        """`sample`."""
        return self.sample(given, **params)

    def _sampled(
        self,
        latents: np.ndarray | Embeddings,
        cell_ids: Sequence[str] | None,
        crops: np.ndarray | None,
        strength: float,
        seed: int,
        given: Mapping[str, Any],
        batch_size: int,
        precision: Precision,
    ) -> np.ndarray:
        import numpy as np
        import torch

        from cosmic_ray.ingest.cell_noise import cell_keys

        vectors, names = checked_vectors(latents, cell_ids, self.config.latents, "latents", self.uri)
        if crops is not None and len(crops) != len(vectors):
            raise ValueError(f"there are {len(crops)} crops for {len(vectors)} latents")
        keys = cell_keys(names)
        settings = self._settings(given)
        found = np.empty((len(vectors), *self.config.output.shape), np.uint8)
        for start in range(0, len(vectors), checked_count("batch_size", batch_size)):
            part = slice(start, start + batch_size)
            start_at = None if crops is None else torch.from_numpy(np.array(crops[part]))
            conditions = torch.from_numpy(vectors[part]).float()
            found[part] = self._batch(conditions, keys[part], start_at, strength, seed, settings, precision)
        return found

    def _settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The config's, and what is given in their place."""
        settings = self.config.sampling.model_dump() | {key: value for key, value in given.items() if value is not None}
        checked_count("steps", settings["steps"])
        if not 0 <= settings["guidance"] < math.inf:
            raise ValueError(f"guidance must be finite and not negative, not {settings['guidance']}")
        if settings["guidance"] not in (0.0, 1.0) and self.config.condition_drop == 0:
            raise ValueError("guidance needs a model that was also trained without latents; this one was not")
        return settings

    def _batch(
        self,
        conditions: torch.Tensor,
        keys: torch.Tensor,
        crops: torch.Tensor | None,
        strength: float,
        seed: int,
        settings: Mapping[str, Any],
        precision: Precision,
    ) -> np.ndarray:
        import torch

        from cosmic_ray.ingest.augment import prepare
        from cosmic_ray.ingest.cell_noise import cell_noise
        from cosmic_ray.models.sampling import sample

        model, kind = self.config.settings(), self.device.partition(":")[0]
        # Float64, in which the noise is drawn, does not exist on mps.
        noise = cell_noise(seed, keys if kind == "mps" else keys.to(self.device), model.shape)
        start = None
        if crops is not None:
            start = prepare(crops.to(self.device), model.network.image_size, model.recipe) * 2 - 1
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with exact, torch.autocast(kind, torch.bfloat16, enabled=precision == "bfloat16"):
            images = sample(
                self._network,
                model.diffusion,
                conditions.to(self.device),
                noise,
                start=start,
                strength=strength,
                **settings,
            ).images
        if not images.isfinite().all():
            raise self._broken("a sampled image")
        return model.to_crops(images).cpu().numpy()
