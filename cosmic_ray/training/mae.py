"""The masked autoencoder as an objective: keyed masks and flips around `models.mae`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from cosmic_ray.errors import JobError
from cosmic_ray.ingest import keyed
from cosmic_ray.ingest.augment import augment, prepare
from cosmic_ray.models.mae import MAEConfig, MAELoss, MaskedAutoencoder
from cosmic_ray.training.objective import Share, Sum

NAME = "mae"
MASK = "mask"


class MAEObjective:
    """Masked reconstruction of nucleus crops; `share.tensors["images"]` are uint8 (n, C, H, H)."""

    phases = (NAME,)

    def __init__(self, config: MAEConfig, seed: int):
        """`seed` draws the initial weights; equal on every rank."""
        torch.manual_seed(seed)
        self.config = config
        self.model = MaskedAutoencoder(config)

    def networks(self) -> Mapping[str, nn.Module]:
        """Encoder, decoder and loss are one network."""
        return {NAME: self.model}

    def blocks(self, name: str) -> list[nn.Module]:
        """The Transformer blocks of encoder and decoder."""
        return [*self.model.encoder.blocks, *list(self.model.decoder)[:-1]]

    def losses(self, networks: Mapping[str, nn.Module], share: Share, seed: int, phase: str) -> dict[str, Sum]:
        """`loss`, what the recipe minimises; `pixel_error`, squared error of masked foreground, for both recipes."""
        size, recipe = self.config.encoder.img_size, self.config.recipe
        images = augment(share.tensors["images"], seed, share.positions, size, recipe)
        return self._sums(networks[NAME], images, share.positions, seed)

    def metrics(self, networks: Mapping[str, nn.Module], share: Share, seed: int) -> dict[str, Sum]:
        """The same without flips; the masks of a position never change."""
        images = prepare(share.tensors["images"], self.config.encoder.img_size, self.config.recipe)
        return self._sums(networks[NAME], images, share.positions, seed)

    def _sums(self, network: nn.Module, images: torch.Tensor, positions: torch.Tensor, seed: int) -> dict[str, Sum]:
        noise = keyed.uniform(seed, positions, MASK, self.config.encoder.tokens)
        found: MAELoss = network(images.to(self.model.mask_token.dtype), noise)
        return {
            "loss": (found.loss.sum(), found.count.sum()),
            "pixel_error": (found.pixel_error.sum(), found.foreground.sum()),
        }

    def load_encoder(self, weights: Mapping[str, torch.Tensor], uri: str) -> None:
        """Begin with an exported encoder's weights; the decoder stays new.

        Raises:
            JobError: naming `uri`, where they are those of another network.
        """
        _load(self.model.encoder, weights, uri)

    def load_checkpoint(self, weights: Mapping[str, torch.Tensor], uri: str) -> None:
        """Begin with a checkpoint's weights, `mae.` before each name. Raises as `load_encoder`."""
        _load(self.model, {key.removeprefix(f"{NAME}."): value for key, value in weights.items()}, uri)


def _load(network: nn.Module, weights: Mapping[str, Any], uri: str) -> None:
    try:
        network.load_state_dict(dict(weights))
    except RuntimeError as error:
        first = " ".join(str(error).split()[:40])
        raise JobError(
            "init_from", uri, f"another network: {first}", "give model the preset it was made with"
        ) from None
