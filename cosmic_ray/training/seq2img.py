"""seq2img as an objective: keyed times, noise and dropped conditions around a network of `models.seq2img`."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from cosmic_ray.ingest import keyed
from cosmic_ray.ingest.augment import augment, prepare
from cosmic_ray.models.diffusion import diffuse, squared_error, target, to_x0
from cosmic_ray.models.seq2img import Seq2ImgConfig
from cosmic_ray.training.objective import Share, Sum

NAME = "seq2img"
GOLDEN = (math.sqrt(5) - 1) / 2
BANDS = ((-8.0, -4.0), (-4.0, 0.0), (0.0, 4.0), (4.0, 8.0))
"""log-SNRs, noisiest first, at which held-out samples are denoised: from where only a nucleus's size shows to where
all but its grain does. The same for both recipes, so that their errors compare."""


class Seq2ImgObjective:
    """Denoising of nucleus crops, given their cells' latents.

    `share.tensors`: "images", uint8 (n, C, H, H); "condition", floating (n, D).
    """

    phases = (NAME,)

    def __init__(self, config: Seq2ImgConfig, seed: int, statistics: tuple[torch.Tensor, torch.Tensor] | None = None):
        """`seed` draws the initial weights; equal on every rank.

        `statistics`: mean and standard deviation (D,) of the training cells' conditions, which `better` standardises
        by; `paper` takes them as they are.
        """
        torch.manual_seed(seed)
        self.config, self.diffusion = config, config.diffusion
        self.network = config.build()
        if config.recipe == "better" and statistics is not None:
            self.network.standardise(*statistics)

    def networks(self) -> Mapping[str, nn.Module]:
        """The U-Net."""
        return {NAME: self.network}

    def blocks(self, name: str) -> list[nn.Module]:
        """The U-Net's own."""
        return self.network.blocks()

    def losses(self, networks: Mapping[str, nn.Module], share: Share, seed: int, phase: str) -> dict[str, Sum]:
        """`loss`: the weighted squared error of what is predicted, each sample's mean over its pixels, over samples."""
        x0, condition = self._inputs(share, seed if self.config.recipe == "better" else None)
        logsnr = self.diffusion.logsnr(self._times(seed, share.positions)).to(x0.dtype)
        drop = keyed.uniform(seed, share.positions, "drop", 1)[:, 0] < self.config.condition_drop
        noise = self._noise(seed, share.positions, "noise", x0)
        said = networks[NAME](diffuse(x0, noise, logsnr), logsnr, condition, drop)
        error = squared_error(said, target(x0, noise, logsnr, self.diffusion.predicts))
        return {"loss": ((error * self.diffusion.weight(logsnr)).sum(), _count(error))}

    def metrics(self, networks: Mapping[str, nn.Module], share: Share, seed: int) -> dict[str, Sum]:
        """On held-out samples, each denoised once in each of BANDS, at log-SNRs and with noise that never change.

        `loss`: what `losses` minimises, over these bands, with conditions (weighted by how often training meets each
        log-SNR). `x0_error`: mean squared error of the clean image, in [-1, 1], and of each band, `x0_error_band0` the
        noisiest. `x0_error_null`: the same with every condition withheld; what it exceeds `x0_error` by is what the
        conditions tell.
        """
        x0, condition = self._inputs(share, None)
        draws = keyed.uniform(seed, share.positions, "held-out time", len(BANDS)).to(x0.dtype)
        kept = torch.zeros(len(x0), dtype=torch.bool, device=x0.device)
        sums: dict[str, Sum] = {}
        for band, (low, high) in enumerate(BANDS):
            logsnr = low + (high - low) * draws[:, band]
            noise = self._noise(seed, share.positions, f"held-out noise {band}", x0)
            x = diffuse(x0, noise, logsnr)
            said = networks[NAME](x, logsnr, condition, kept)
            null = networks[NAME](x, logsnr, condition, ~kept)
            error = squared_error(said, target(x0, noise, logsnr, self.diffusion.predicts))
            often = self.diffusion.density(logsnr)
            _add(sums, "loss", ((error * self.diffusion.weight(logsnr) * often).sum(), often.sum()))
            for name, prediction in (("x0_error", said), ("x0_error_null", null), (f"x0_error_band{band}", said)):
                found = squared_error(to_x0(prediction.to(x.dtype), x, logsnr, self.diffusion.predicts), x0)
                _add(sums, name, (found.sum(), _count(found)))
        return sums

    def _inputs(self, share: Share, flips: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Images in [-1, 1] and conditions, in the network's dtype; flipped by the seed `flips`, if any.

        App. A trains without augmentation; a nucleus has no orientation, so `better` flips.
        """
        condition, width = share.tensors["condition"], self.config.network.condition_size
        if condition.ndim != 2 or condition.shape[1] != width or not condition.is_floating_point():
            raise ValueError(f"condition must be floating (N, {width}), not {condition.dtype} {tuple(condition.shape)}")
        size, recipe, crops = self.config.network.image_size, self.config.recipe, share.tensors["images"]
        images = prepare(crops, size, recipe) if flips is None else augment(crops, flips, share.positions, size, recipe)
        if images.shape[1] != self.config.network.channels:
            raise ValueError(f"the network takes {self.config.network.channels} channels, not {images.shape[1]}")
        dtype = next(self.network.parameters()).dtype
        return images.to(dtype) * 2 - 1, condition.to(dtype)

    def _times(self, seed: int, positions: torch.Tensor) -> torch.Tensor:
        """Times in [0, 1), uniform: float64 (n,).

        `paper` draws each by itself. `better` spaces those of neighbouring positions by the golden ratio, from a start
        keyed by the seed, so that every batch covers all times about evenly and the loss varies less (after Kingma et
        al. 2021, App. I.1, without the draw that a batch shares, which would depend on how it is cut).
        """
        if self.config.recipe == "paper":
            return keyed.uniform(seed, positions, "time", 1)[:, 0].double()
        start = keyed.uniform(seed, torch.zeros_like(positions[:1]), "time", 1)[:, 0].double()
        return (positions.double() * GOLDEN + start).frac()

    def _noise(self, seed: int, positions: torch.Tensor, purpose: str, like: torch.Tensor) -> torch.Tensor:
        return keyed.normal(seed, positions, purpose, like[0].numel()).reshape(like.shape).to(like.dtype)


def _count(errors: torch.Tensor) -> torch.Tensor:
    return torch.full((), len(errors), device=errors.device)


def _add(sums: dict[str, Sum], name: str, more: Sum) -> None:
    """Add a band's sum and count to those of the bands before it."""
    total, count = sums.get(name, (0, 0))
    sums[name] = (total + more[0], count + more[1])
