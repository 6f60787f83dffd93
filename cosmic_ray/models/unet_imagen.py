"""The network of seq2img's `recipe: paper`: the base U-Net of Imagen (Saharia et al. 2022) as COSMIC, App. A, sets it.

Same mathematics as the U-Net of imagen-pytorch 2.1.0 (the library that COSMIC trained), written anew for the one shape
in use: three channels, base width 32, widths (1, 2, 4, 8) times that, one ResNet block a level, self- and
cross-attention at the last level and the bottleneck, and one condition token. Its 11,565,780 parameters come in the
same order with the same shapes, so a checkpoint of the one fits the other.

How a latent conditions the network. Imagen expects up to 256 text tokens; COSMIC hands over one, its latent. The other
255 places hold learned null tokens, which the resampler (Perceiver; Jaegle et al. 2021) reads like words: it turns all
256 into 36 tokens. Their mean is added to the embedded log-SNR, which scales and shifts every ResNet block, and
beside two tokens of the log-SNR they are what cross-attention reads. A dropped condition becomes the null token of its
place, and a learned null vector in place of the mean.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from cosmic_ray.models.unet_imagen_layers import (
    TOKENS,
    CrossAttention,
    Downsample,
    GlobalContext,
    LearnedFourier,
    MultiScaleConv,
    PixelNorm,
    Resampler,
    Transformer,
    Upsample,
    WideConv,
    to_image,
    to_sequence,
)


@dataclass(frozen=True)
class ImagenConfig:
    """App. A's settings; a test may shrink them."""

    image_size: int = 256
    condition_size: int = 64
    """Width of the latent."""
    channels: int = 3
    """Grey repeated, as published."""
    dim: int = 32
    token_dim: int = 64
    widths: tuple[int, ...] = (1, 2, 4, 8)


class ImagenUNet(nn.Module):
    """`network(x, logsnr, condition, drop)`: the predicted clean image, in the dtype of `x`.

    x: (N, 3, S, S), S a multiple of 8 (any such size, `image_size` or not). logsnr: (N,). condition: (N, D).
    drop: bool (N,), True where the condition is withheld.
    """

    def __init__(self, config: ImagenConfig = ImagenConfig()):
        """Raises ValueError where the image does not halve as often as there are levels."""
        super().__init__()
        halvings = 2 ** (len(config.widths) - 1)
        if config.image_size % halvings:
            raise ValueError(f"an image of {config.image_size} px cannot be halved to {halvings}-fold smaller")
        self.config = config
        dim, token = config.dim, config.token_dim
        time = 4 * dim
        self.null_tokens = nn.Parameter(torch.randn(1, TOKENS, token))
        self.null_vector = nn.Parameter(torch.randn(1, time))
        self.first = MultiScaleConv(config.channels, dim)
        self.embed_logsnr = nn.Sequential(LearnedFourier(16), nn.Linear(17, time), nn.SiLU())
        self.time_vector = nn.Linear(time, time)
        self.time_tokens = nn.Linear(time, 2 * token)
        self.token_norm = nn.LayerNorm(token)
        self.embed_condition = nn.Linear(config.condition_size, token)
        self.resampler = Resampler(token)
        self.condition_vector = nn.Sequential(
            nn.LayerNorm(token), nn.Linear(token, time), nn.SiLU(), nn.Linear(time, time)
        )
        sizes = [dim, *(dim * width for width in config.widths)]
        pairs = list(itertools.pairwise(sizes))
        last = len(pairs) - 1
        self.downs = nn.ModuleList(
            [Down(before, after, time, token, last=level == last) for level, (before, after) in enumerate(pairs)]
        )
        self.ups = nn.ModuleList(
            [Up(*pairs[level], time, token, deepest=level == last, top=level == 0) for level in range(last, -1, -1)]
        )
        deep = sizes[-1]
        self.middle_before = ResBlock(deep, deep, time, token_dim=token)
        self.middle_attention = Transformer(deep)
        self.middle_after = ResBlock(deep, deep, time, token_dim=token)
        self.final_block = ResBlock(dim, dim, time, gated=True)
        self.final = nn.Conv2d(dim, config.channels, 3, padding=1)
        nn.init.zeros_(self.final.weight)
        nn.init.zeros_(self.final.bias)

    def forward(
        self, x: torch.Tensor, logsnr: torch.Tensor, condition: torch.Tensor, drop: torch.Tensor
    ) -> torch.Tensor:
        """See the class."""
        vector, tokens = self._conditioning(logsnr, condition, drop)
        x = self.first(x)
        skips: list[torch.Tensor] = []
        for down in self.downs:
            x, *kept = down(x, vector, tokens)
            skips += kept
        x = self.middle_before(x, vector, tokens)
        x = self.middle_attention(x)
        x = self.middle_after(x, vector, tokens)
        for up in self.ups:
            x = up(x, vector, tokens, skips.pop(), skips.pop())
        return self.final(self.final_block(x, vector))

    def blocks(self) -> list[nn.Module]:
        """The parts that are sharded and compiled one by one."""
        return [*self.downs, self.middle_before, self.middle_attention, self.middle_after, *self.ups, self.final_block]

    def _conditioning(
        self, logsnr: torch.Tensor, condition: torch.Tensor, drop: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The vector (N, 4 dim) that modulates ResNet blocks, and the tokens (N, 38, token_dim) attended to."""
        hidden = self.embed_logsnr(logsnr)
        token = self.embed_condition(condition)[:, None]
        token = torch.where(drop[:, None, None], self.null_tokens[:, :1].to(token.dtype), token)
        nulls = self.null_tokens[:, 1:].to(token.dtype).expand(len(token), -1, -1)
        resampled = self.resampler(torch.cat((token, nulls), dim=1))
        vector = self.condition_vector(resampled.mean(1))
        vector = torch.where(drop[:, None], self.null_vector.to(vector.dtype), vector)
        times = self.time_tokens(hidden).unflatten(1, (2, -1))
        return self.time_vector(hidden) + vector, self.token_norm(torch.cat((times, resampled), dim=1))


class Down(nn.Module):
    """A level on the way down: two ResNet blocks, attention at the last level, half the resolution but there."""

    def __init__(self, dim: int, dim_out: int, time_dim: int, token_dim: int, last: bool):
        super().__init__()
        self.block = ResBlock(dim, dim, time_dim, token_dim=token_dim if last else None)
        self.gated_block = ResBlock(dim, dim, time_dim, gated=True)
        self.attention = Transformer(dim, token_dim) if last else None
        self.out = WideConv(dim, dim_out) if last else Downsample(dim, dim_out)

    def forward(
        self, x: torch.Tensor, vector: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The level's output, and what skips over to the way up: before attention, and after it."""
        x = before = self.gated_block(self.block(x, vector, tokens), vector)
        if self.attention is not None:
            x = self.attention(x, tokens)
        return self.out(x), before, x


class Up(nn.Module):
    """A level on the way up: two ResNet blocks, each beside a skip, attention at the deepest, twice the resolution."""

    def __init__(self, dim_out: int, dim: int, time_dim: int, token_dim: int, deepest: bool, top: bool):
        super().__init__()
        self.block = ResBlock(dim + dim_out, dim, time_dim, token_dim=token_dim if deepest else None)
        self.gated_block = ResBlock(dim + dim_out, dim, time_dim, gated=True)
        self.attention = Transformer(dim, token_dim) if deepest else None
        self.upsample = None if top else Upsample(dim, dim_out)

    def forward(
        self, x: torch.Tensor, vector: torch.Tensor, tokens: torch.Tensor, after: torch.Tensor, before: torch.Tensor
    ) -> torch.Tensor:
        """`after` and `before`: the two skips of the level on the way down."""
        x = self.block(torch.cat((x, after * 2**-0.5), dim=1), vector, tokens)
        x = self.gated_block(torch.cat((x, before * 2**-0.5), dim=1), vector)
        if self.attention is not None:
            x = self.attention(x, tokens)
        return x if self.upsample is None else self.upsample(x)


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice; the second norm is scaled and shifted by the vector; a skip around both.

    With `token_dim`, cross-attention to the tokens in between; with `gated`, a global gate at the end (GlobalContext).
    """

    def __init__(self, dim: int, dim_out: int, time_dim: int, token_dim: int | None = None, gated: bool = False):
        super().__init__()
        self.modulation = nn.Linear(time_dim, 2 * dim_out)
        self.cross_attention = CrossAttention(dim_out, token_dim) if token_dim is not None else None
        self.norm1 = PixelNorm(dim)
        self.conv1 = nn.Conv2d(dim, dim_out, 3, padding=1)
        self.norm2 = PixelNorm(dim_out)
        self.conv2 = nn.Conv2d(dim_out, dim_out, 3, padding=1)
        self.gate = GlobalContext(dim_out) if gated else None
        self.skip = nn.Conv2d(dim, dim_out, 1) if dim != dim_out else nn.Identity()

    def forward(self, x: torch.Tensor, vector: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """(N, dim, H, W) to (N, dim_out, H, W)."""
        scale, shift = self.modulation(functional.silu(vector))[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(functional.silu(self.norm1(x)))
        if self.cross_attention is not None:
            pixels = to_sequence(h)
            h = to_image(self.cross_attention(pixels, tokens) + pixels, h)
        h = self.conv2(functional.silu(self.norm2(h) * (scale + 1) + shift))
        if self.gate is not None:
            h = h * self.gate(h)
        return h + self.skip(x)
