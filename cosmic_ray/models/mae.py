"""The masked autoencoder (He et al. 2022) whose encoder becomes the morphology FM (COSMIC, App. A).

An image is cut into patches, a quarter of them goes through a timm Vision Transformer, and a small decoder predicts
the rest. Two recipes:

- `paper`: App. A to the letter. Grey repeated to three channels, patches masked uniformly, mean-squared error of raw
  pixels on masked patches only. Unstated there and taken from the MAE paper: sine-cosine positions, Xavier weights.
- `better`: made for crops whose background is exactly 0. One channel; the visible quarter holds a quarter of the
  foreground patches of *every* image, in place of a number left to chance (an image with 8 of them shows none in
  one view of ten); background hardly weighs in the loss; tokens start out on the scale of chromatin's contrast, not
  of a photograph's; and a patch is predicted as level, spread and normalised
  pattern, so that faint chromatin counts as much as the nucleus's edge, while brightness (DNA content) stays a
  target and a reconstruction needs no statistic of the pixels it predicts.

The share of foreground among the visible tokens is that of the whole image, because inference shows all of them.
Masks come from noise handed in by the caller (keyed by sample), and every shape is fixed by the configuration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from timm.models.vision_transformer import Block
from torch import nn

from cosmic_ray.models.vit import (
    PRESETS,
    ViTPreset,
    build_encoder,
    patchify,
    sincos_positions,
    timm_arguments,
    unpatchify,
    xavier_init,
)

SPREAD_FLOOR = 0.02
"""Standard deviation (of intensity in [0, 1]; five grey levels of 255) below which a patch counts as flat: noise is not
blown up, and a constant patch has a pattern of exactly 0."""
CONTRAST_UNIT = 0.1
"""Root-mean-square intensity of a patch whose token starts out as long as its position's, under `better`. Chromatin
has about that contrast; with MAE's initialisation, made for standardised photographs, its tokens would be an order of
magnitude shorter than the positions added to them, and training would begin by growing them."""
LEVEL_UNIT = 0.2
"""Intensity that counts as one unit of error in a patch's level: about the spread of levels over nuclei."""


@dataclass(frozen=True)
class MAEConfig:
    """Everything that decides the network's shape and loss."""

    encoder: ViTPreset
    recipe: Literal["paper", "better"] = "better"
    channels: int = 1
    """Channels of the images: 3 (grey repeated) under `paper`."""
    mask_ratio: float = 0.75
    decoder_dim: int = 512
    decoder_depth: int = 1
    decoder_heads: int = 16
    background_weight: float = 0.02
    """`better`: weight in the loss of a masked patch without a nucleus pixel; 1 for the others."""

    @property
    def visible(self) -> int:
        """Tokens that the encoder sees in training."""
        return round(self.encoder.tokens * (1 - self.mask_ratio))

    @classmethod
    def of(cls, preset: str, recipe: Literal["paper", "better"] = "better", **changes: Any) -> MAEConfig:
        """The configuration of a named encoder; `tiny` gets a decoder of its own size. `changes`: any field.

        Raises KeyError for an unknown preset.
        """
        config = cls(PRESETS[preset], recipe, channels=3 if recipe == "paper" else 1)
        if preset == "tiny":
            config = replace(config, decoder_dim=64, decoder_heads=4)
        return replace(config, **changes)


class MAELoss(NamedTuple):
    """Sums and counts of each sample, float32 (N,): a mean is sum.sum() / count.sum() over any batch, however cut."""

    loss: torch.Tensor
    """Weighted sum over masked patches of the error that is minimised. The only one with a gradient."""
    count: torch.Tensor
    """Sum of these weights."""
    pixel_error: torch.Tensor
    """Sum over masked foreground patches of the mean squared error in intensity: one unit for both recipes."""
    foreground: torch.Tensor
    """Number of masked foreground patches."""


class MaskedAutoencoder(nn.Module):
    """Encoder, decoder and loss. Images are float (N, C, S, S) in [0, 1], background 0."""

    def __init__(self, config: MAEConfig):
        """Raises ValueError for a mask ratio that leaves no visible or no masked patch, and for odd sizes."""
        super().__init__()
        if not 0 < config.visible < config.encoder.tokens:
            raise ValueError(
                f"mask_ratio {config.mask_ratio} leaves {config.visible} of {config.encoder.tokens} patches"
            )
        self.config = config
        size, dim = config.encoder, config.decoder_dim
        self.encoder = build_encoder(size, config.channels)
        if config.recipe == "better":
            pixels = size.patch_size**2 * config.channels
            # A token's length is std * rms * sqrt(pixels * width), a position's sqrt(width / 2).
            nn.init.normal_(self.encoder.patch_embed.proj.weight, std=1 / (CONTRAST_UNIT * math.sqrt(2 * pixels)))
        self.decoder_embed = nn.Linear(size.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer(
            "decoder_positions", sincos_positions(dim, size.img_size // size.patch_size), persistent=False
        )
        self.decoder = nn.Sequential(
            *[Block(dim, config.decoder_heads, qkv_bias=True) for _ in range(config.decoder_depth)],
            nn.LayerNorm(dim, eps=1e-6),
        )
        statistics = 0 if config.recipe == "paper" else 2 * config.channels  # level and spread
        self.head = nn.Linear(dim, size.patch_size**2 * config.channels + statistics)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in (self.decoder_embed, self.decoder, self.head):
            xavier_init(module)

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> MAELoss:
        """The loss of each sample. `noise`: (N, L) in [0, 1), the sample's keyed uniforms."""
        patches = patchify(images, self.config.encoder.patch_size)
        visible, masked = self.split(patches, noise)
        predicted = self._predict(self._encode(_take(patches, visible), visible), visible, masked)
        target = _take(patches, masked)
        foreground = _foreground(target)
        if self.config.recipe == "paper":
            weight, pixels = torch.ones_like(foreground), predicted
            error = (predicted - target).square().mean(-1)
        else:
            weight = torch.where(foreground > 0, 1.0, self.config.background_weight).to(target.dtype)
            error, pixels = self._normalised_error(predicted, target), self._pixels(predicted)
        pixel_error = (pixels.detach() - target).square().mean(-1) * foreground
        return MAELoss((error * weight).sum(1), weight.sum(1), pixel_error.sum(1), foreground.sum(1))

    def split(self, patches: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of the visible and of the masked patches: int64 (N, visible) and (N, L - visible).

        `paper`: the visible ones are those of lowest noise. `better`: those of lowest noise among the foreground,
        as many as its share of the image asks for (rounded), then those of lowest noise among the background.
        Ties fall to the earlier patch, on every device.
        """
        keep, tokens = self.config.visible, self.config.encoder.tokens
        if self.config.recipe == "paper":
            order = noise.argsort(dim=1, stable=True)
            return order[:, :keep], order[:, keep:]
        background = _foreground(patches) == 0
        by_noise = noise.argsort(dim=1, stable=True)
        sorted_background = background.gather(1, by_noise)
        size = (~background).sum(1, keepdim=True)
        shown = (2 * size * keep + tokens) // (2 * tokens)  # size * keep / tokens, rounded in integers
        rank = torch.where(sorted_background, sorted_background.cumsum(1), (~sorted_background).cumsum(1))
        hidden = rank > torch.where(sorted_background, keep - shown, shown)
        order = by_noise.gather(1, hidden.to(torch.uint8).argsort(dim=1, stable=True))
        return order[:, :keep], order[:, keep:]

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Float32 (N, D): the mean over all patch tokens of the unmasked image, class token left out (see `vit`)."""
        return self.encoder(images).float()

    @torch.no_grad()
    def reconstruct(self, images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For pictures and for comparison with inpainting: the images with their masked patches predicted.

        Returns float (N, C, S, S) in [0, 1], and bool (N, L), True where a patch was masked. Nothing of a masked
        patch enters its prediction; under `better`, which patches are visible depends on where the foreground is.
        """
        size = self.config.encoder.patch_size
        patches = patchify(images, size)
        visible, masked = self.split(patches, noise)
        predicted = self._predict(self._encode(_take(patches, visible), visible), visible, masked)
        pixels = predicted if self.config.recipe == "paper" else self._pixels(predicted)
        index = masked[:, :, None].expand(-1, -1, patches.shape[-1])
        filled = patches.scatter(1, index, pixels.clamp(0, 1).to(patches.dtype))
        hidden = torch.zeros(noise.shape, dtype=torch.bool, device=noise.device).scatter(1, masked, True)
        return unpatchify(filled, size, self.config.channels), hidden

    def _encode(self, patches: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Visible patches (N, K, P) at `index` to tokens (N, 1 + K, D), class token first.

        The patch embedding is applied as the linear layer that it is, to the visible patches only.
        """
        encoder = self.encoder
        projection = encoder.patch_embed.proj
        tokens = nn.functional.linear(patches, projection.weight.permute(0, 2, 3, 1).flatten(1), projection.bias)
        positions = encoder.pos_embed.expand(len(patches), -1, -1)
        first = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(patches), -1, -1)
        tokens = torch.cat((first, tokens + _take(positions[:, 1:], index)), dim=1)
        return encoder.norm(encoder.blocks(tokens))

    def _predict(self, tokens: torch.Tensor, visible: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """What the head says of each masked patch: at least float32 (N, L - K, pixels [+ level and spread]).

        Attention does not care about the order of tokens, so they stay as (class, visible, masked): no unshuffling,
        and only masked patches are predicted.
        """
        tokens = self.decoder_embed(tokens)
        positions = self.decoder_positions.expand(len(tokens), -1, -1)
        seen = tokens + torch.cat((positions[:, :1], _take(positions[:, 1:], visible)), dim=1)
        asked = self.mask_token + _take(positions[:, 1:], masked)
        output = self.head(self.decoder(torch.cat((seen, asked), dim=1))[:, -masked.shape[1] :])
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def _parts(self, predicted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pattern (N, M, pixels, C), level and spread (N, M, 1, C) of the head's output under `better`."""
        channels = self.config.channels
        pattern, level, spread = predicted.split((predicted.shape[-1] - 2 * channels, channels, channels), dim=-1)
        return pattern.unflatten(-1, (-1, channels)), level[:, :, None], spread[:, :, None]

    def _normalised_error(self, predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """(N, M): squared errors of pattern, level and spread, added up, as means over pixels and channels."""
        pattern, level, spread = self._parts(predicted)
        target = target.unflatten(-1, (-1, self.config.channels))
        mean = target.mean(2, keepdim=True)
        scale = ((target - mean).square().mean(2, keepdim=True) + SPREAD_FLOOR**2).sqrt()
        return (
            (pattern - (target - mean) / scale).square().mean((2, 3))
            + (level - mean / LEVEL_UNIT).square().mean((2, 3))
            + (spread - (scale / SPREAD_FLOOR).log()).square().mean((2, 3))
        )

    def _pixels(self, predicted: torch.Tensor) -> torch.Tensor:
        """Intensities (N, M, pixels * C) from predicted pattern, level and spread."""
        pattern, level, spread = self._parts(predicted)
        scale = SPREAD_FLOOR * spread.clamp(0, -math.log(SPREAD_FLOOR)).exp()  # at most 1, however wild the prediction
        return (level * LEVEL_UNIT + pattern * scale).flatten(2)


def export_encoder(model: MaskedAutoencoder) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What others need: arguments for `timm.create_model(**arguments)`, and its weights (float32, on the CPU).

    They load with `strict=True`, and that model's forward is `MaskedAutoencoder.embed`.
    """
    arguments = timm_arguments(model.config.encoder, model.config.channels)
    weights = model.encoder.state_dict()
    return arguments, {name: value.detach().float().cpu().contiguous() for name, value in weights.items()}


def _foreground(patches: torch.Tensor) -> torch.Tensor:
    """(N, M, P) to (N, M), in the patches' dtype: 1 where any pixel of any channel lies above the background, 0."""
    return (patches > 0).any(-1).to(patches.dtype)


def _take(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Tokens (N, L, D) at `index` (N, M): (N, M, D)."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[-1]))
