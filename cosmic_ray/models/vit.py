"""Vision Transformers in a few sizes: timm's own, built so that plain `timm.create_model` rebuilds them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn


@dataclass(frozen=True)
class ViTPreset:
    """Size of an encoder: square images of `img_size` pixels in square patches, `depth` blocks of width `embed_dim`."""

    model_name: str
    """An entry point of timm's plain ViT; every size is given beside it."""
    img_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int

    @property
    def tokens(self) -> int:
        """Patches of an image."""
        return (self.img_size // self.patch_size) ** 2


PRESETS: dict[str, ViTPreset] = {
    "tiny": ViTPreset("vit_tiny_patch16_224", img_size=80, patch_size=8, embed_dim=64, depth=4, num_heads=4),
    "small": ViTPreset("vit_small_patch16_224", img_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6),
    "base": ViTPreset("vit_base_patch16_224", img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12),
    "large": ViTPreset("vit_large_patch16_224", img_size=224, patch_size=16, embed_dim=1024, depth=24, num_heads=16),
}
"""0.2 M parameters for minutes on two cores; ViT-S/16, 22 M; ViT-B/16, 86 M; ViT-L/16, 303 M (App. A)."""


def timm_arguments(preset: ViTPreset, channels: int) -> dict[str, Any]:
    """Keyword arguments with which `timm.create_model(**arguments)` rebuilds the encoder, `model_name` among them.

    Its forward is then the embedding: the mean over the patch tokens after the final norm, class token left out.
    `fc_norm=False` keeps that norm before the mean; timm's own default for `global_pool="avg"` moves it behind.
    """
    head = {"num_classes": 0, "global_pool": "avg", "fc_norm": False}
    return {**asdict(preset), "in_chans": channels, **head}


def build_encoder(preset: ViTPreset, channels: int) -> VisionTransformer:
    """timm's ViT with fixed sine-cosine position embeddings and MAE's initialisation.

    Raises ValueError where the patches do not tile the image or four does not divide the width.
    """
    if preset.img_size % preset.patch_size:
        raise ValueError(f"patches of {preset.patch_size} px do not tile an image of {preset.img_size} px")
    encoder = timm.create_model(**timm_arguments(preset, channels))
    positions = sincos_positions(preset.embed_dim, preset.img_size // preset.patch_size)
    encoder.pos_embed = nn.Parameter(positions, requires_grad=False)
    nn.init.normal_(encoder.cls_token, std=0.02)
    xavier_init(encoder)
    # As a linear layer from pixels to width, which it is; as a convolution its fan-out would count the patch's pixels.
    nn.init.xavier_uniform_(encoder.patch_embed.proj.weight.data.flatten(1))
    return encoder


def xavier_init(module: nn.Module) -> None:
    """MAE's initialisation (He et al. 2022, A.1): Xavier-uniform linear weights, zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def sincos_positions(dim: int, side: int) -> torch.Tensor:
    """Fixed two-dimensional sine-cosine embeddings (He et al. 2022, A.1): float32 (1, 1 + side * side, dim).

    The first token is the class token's and zero; patches follow in raster order. The first half of the width
    encodes the column, the second the row, each as dim/4 sines, then dim/4 cosines, of wavelengths 2*pi to
    20,000*pi. Raises ValueError where four does not divide `dim`.
    """
    if dim % 4:
        raise ValueError(f"the width of a sine-cosine embedding must be a multiple of 4, not {dim}")
    frequencies = 10_000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    parts = []
    for coordinate in (columns, rows):
        angles = coordinate.reshape(-1, 1) * frequencies
        parts += [angles.sin(), angles.cos()]
    patches = torch.cat(parts, dim=1)
    return torch.cat((torch.zeros(1, dim, dtype=torch.float64), patches))[None].float()


def patchify(images: torch.Tensor, patch: int) -> torch.Tensor:
    """(N, C, H, W) to (N, L, patch * patch * C): patches in raster order, each by row, column, then channel."""
    n, channels, height, width = images.shape
    grid = images.reshape(n, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, patch * patch * channels)


def unpatchify(patches: torch.Tensor, patch: int, channels: int) -> torch.Tensor:
    """The inverse of `patchify` for square images: (N, L, patch * patch * C) to (N, C, H, H)."""
    n, tokens, _ = patches.shape
    side = round(tokens**0.5)
    grid = patches.reshape(n, side, side, patch, patch, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(n, channels, side * patch, side * patch)
