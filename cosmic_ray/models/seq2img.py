"""seq2img as one thing: a recipe's network and the diffusion around it, as configured, and pixels in and out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from cosmic_ray.models.diffusion import Diffusion
from cosmic_ray.models.unet import PRESETS, UNet, UNetConfig
from cosmic_ray.models.unet_imagen import ImagenConfig, ImagenUNet

Recipe = Literal["paper", "better"]


@dataclass(frozen=True)
class Seq2ImgConfig:
    """What rebuilds the network and says how it is trained and sampled."""

    recipe: Recipe
    network: UNetConfig | ImagenConfig
    condition_drop: float = 0.1
    """Probability with which a training sample's condition is withheld (App. A)."""

    @classmethod
    def of(cls, preset: str, recipe: Recipe = "better", condition_size: int = 64, **changes: Any) -> Seq2ImgConfig:
        """The network of a recipe for the images of a preset; `changes`: other fields of its configuration.

        `paper` has one network for every size: the preset gives the image size alone. Raises KeyError for an unknown
        preset.
        """
        if recipe == "better":
            return cls(recipe, UNetConfig.of(preset, condition_size=condition_size, **changes))
        return cls(recipe, ImagenConfig(PRESETS[preset].image_size, condition_size, **changes))

    @property
    def diffusion(self) -> Diffusion:
        """The recipe's noise schedule, prediction and weights."""
        return Diffusion.imagen() if self.recipe == "paper" else Diffusion.better(self.network.image_size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, S, S) of what is noised and sampled."""
        return (self.network.channels, self.network.image_size, self.network.image_size)

    def build(self) -> UNet | ImagenUNet:
        """The network, its weights drawn from torch's generator."""
        return UNet(self.network) if isinstance(self.network, UNetConfig) else ImagenUNet(self.network)

    def to_crops(self, images: torch.Tensor) -> torch.Tensor:
        """Sampled images (N, C, S, S) in [-1, 1] to crops, uint8; the three channels of `paper`, to one, their mean."""
        if self.recipe == "paper":
            images = images.mean(1, keepdim=True)
        return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
