"""The network of seq2img's `recipe: better`: a compact conditional U-Net for one-channel nuclei.

After ADM (Dhariwal & Nichol 2021) and simple diffusion (Hoogeboom et al. 2023), with what each part has to earn:

- Pixels enter in patches of 2 x 2 as channels. Full resolution is where a U-Net spends most and says least.
- Few blocks where maps are large, most of them (and all attention) where they are small.
- One vector of the log-SNR and the condition scales and shifts the second norm of every block. A single latent is one
  token; attention to it would add nothing to that. The condition is standardised by statistics that the network
  carries, so that embeddings of any scale arrive at spread 1.
- Every block begins as its skip and the output at zero.

No BatchNorm and no dropout: an output depends on its own sample alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

HEAD_DIM = 32
LOGSNR_UNIT = 4.0
"""log-SNRs are divided by this, about their spread under a cosine schedule."""


@dataclass(frozen=True)
class UNetConfig:
    """Everything that decides the network's shape."""

    image_size: int
    widths: tuple[int, ...]
    """Channels of each level; the first sees one pixel for each patch, every other half the resolution before it."""
    depths: tuple[int, ...]
    """Blocks of each level on the way down; one more on the way up."""
    attention_from: int
    """The first level with self-attention."""
    condition_size: int = 64
    channels: int = 1
    patch: int = 2
    """Side of the patches of pixels that become channels."""

    @classmethod
    def of(cls, preset: str, **changes: Any) -> UNetConfig:
        """A named size; `changes`: any field. Raises KeyError for an unknown preset."""
        return replace(PRESETS[preset], **changes)


PRESETS: dict[str, UNetConfig] = {
    "tiny": UNetConfig(image_size=64, widths=(32, 64, 96), depths=(1, 1, 1), attention_from=2),
    "small": UNetConfig(image_size=128, widths=(48, 96, 160, 192), depths=(1, 1, 2, 2), attention_from=2),
    "base": UNetConfig(image_size=128, widths=(64, 128, 192, 256), depths=(1, 2, 2, 2), attention_from=2),
    "large": UNetConfig(image_size=256, widths=(48, 96, 160, 192, 256), depths=(1, 1, 2, 2, 2), attention_from=3),
}
"""For minutes on two cores; for a small accelerator; for a large one; for the 256 x 256 images of App. A."""


class UNet(nn.Module):
    """`network(x, logsnr, condition, drop)`: the prediction (v, by default), in the shape and dtype of `x`.

    x: (N, C, S, S). logsnr: (N,). condition: (N, D), as it comes: the network standardises it. drop: bool (N,), True
    where the condition is withheld and a learned vector takes its place.
    """

    def __init__(self, config: UNetConfig):
        """Raises ValueError where the image does not halve as often as there are levels."""
        super().__init__()
        smallest = config.patch * 2 ** (len(config.widths) - 1)
        if config.image_size % smallest:
            raise ValueError(f"an image of {config.image_size} px cannot be cut to one {smallest}-fold smaller")
        self.config = config
        first, vector = config.widths[0], 4 * max(config.widths[0], 32)
        pixels = config.channels * config.patch**2
        self.register_buffer("condition_mean", torch.zeros(config.condition_size))
        self.register_buffer("condition_std", torch.ones(config.condition_size))
        self.embed = Conditioning(config.condition_size, vector)
        self.first = nn.Conv2d(pixels, first, 3, padding=1)
        self.down, skips = self._way_down(vector)
        deepest = config.widths[-1]
        self.middle = nn.ModuleList([Block(deepest, deepest, vector, attends=True), Block(deepest, deepest, vector)])
        self.up = self._way_up(vector, skips)
        self.final = nn.Sequential(_norm(first), nn.SiLU(), nn.Conv2d(first, pixels, 3, padding=1))
        nn.init.zeros_(self.final[-1].weight)
        nn.init.zeros_(self.final[-1].bias)

    def forward(
        self, x: torch.Tensor, logsnr: torch.Tensor, condition: torch.Tensor, drop: torch.Tensor
    ) -> torch.Tensor:
        """See the class."""
        condition = (condition - self.condition_mean) / self.condition_std
        vector = self.embed(logsnr, condition.to(self.condition_mean.dtype), drop)
        x = self.first(functional.pixel_unshuffle(x, self.config.patch))
        skips = [x]
        for block in self.down:
            x = block(x, vector)
            skips.append(x)
        for block in self.middle:
            x = block(x, vector)
        for block in self.up:
            x = block(x if block.resize == "up" else torch.cat((x, skips.pop()), dim=1), vector)
        return functional.pixel_shuffle(self.final(x), self.config.patch)

    def blocks(self) -> list[nn.Module]:
        """The parts that are sharded and compiled one by one."""
        return [*self.down, *self.middle, *self.up]

    @torch.no_grad()
    def standardise(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Carry the mean and spread (D,) of the training set's conditions; a constant column counts as spread 1."""
        self.condition_mean.copy_(mean)
        self.condition_std.copy_(torch.where(std > 0, std, 1.0))

    def _way_down(self, vector: int) -> tuple[nn.ModuleList, list[int]]:
        """The blocks, and the channels of what skips over: the first convolution's, then each block's."""
        config, blocks = self.config, nn.ModuleList()
        skips = [config.widths[0]]
        for level, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            if level:
                blocks.append(Block(skips[-1], width, vector, resize="down"))
                skips.append(width)
            for _ in range(depth):
                blocks.append(Block(skips[-1], width, vector, attends=level >= config.attention_from))
                skips.append(width)
        return blocks, skips

    def _way_up(self, vector: int, skips: list[int]) -> nn.ModuleList:
        config, blocks, skips = self.config, nn.ModuleList(), list(skips)
        before = config.widths[-1]
        for level in reversed(range(len(config.widths))):
            width = config.widths[level]
            for _ in range(config.depths[level] + 1):
                attends = level >= config.attention_from
                blocks.append(Block(before + skips.pop(), width, vector, attends=attends))
                before = width
            if level:
                blocks.append(Block(width, width, vector, resize="up"))
        return blocks


class Block(nn.Module):
    """Norm, SiLU, convolution, twice, the second norm scaled and shifted by the vector; self-attention, if any.

    `resize`: "down" halves the resolution by the mean of 2 x 2 pixels, "up" doubles it by repeating them, before the
    first convolution and in the skip alike.
    """

    def __init__(self, dim: int, dim_out: int, vector: int, attends: bool = False, resize: str | None = None):
        super().__init__()
        self.resize = resize
        self.norm1 = _norm(dim)
        self.conv1 = nn.Conv2d(dim, dim_out, 3, padding=1)
        self.modulation = nn.Linear(vector, 2 * dim_out)
        self.norm2 = _norm(dim_out)
        self.conv2 = nn.Conv2d(dim_out, dim_out, 3, padding=1)
        self.skip = nn.Conv2d(dim, dim_out, 1) if dim != dim_out else nn.Identity()
        self.attention = Attention(dim_out) if attends else None
        for layer in (self.modulation, self.conv2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        """(N, dim, H, W) to (N, dim_out, H', W')."""
        scale, shift = self.modulation(vector)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(self._resized(functional.silu(self.norm1(x))))
        h = self.conv2(functional.silu(self.norm2(h) * (1 + scale) + shift))
        h = h + self.skip(self._resized(x))
        return h if self.attention is None else self.attention(h)

    def _resized(self, x: torch.Tensor) -> torch.Tensor:
        if self.resize == "down":
            return functional.avg_pool2d(x, 2)
        return functional.interpolate(x, scale_factor=2.0, mode="nearest") if self.resize == "up" else x


class Attention(nn.Module):
    """Self-attention over pixels with normalised queries and keys (Henry et al. 2020), and a skip around it."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = _norm(dim)
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.scale = nn.Parameter(torch.full((dim // HEAD_DIM, 1, 1), math.log(8.0)))
        self.out = nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, dim, H, W) to the same shape."""
        qkv = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, -1, HEAD_DIM)).transpose(-1, -2)
        q, k, v = qkv.unbind(1)
        q = functional.normalize(q, dim=-1) * self.scale.exp()
        h = functional.scaled_dot_product_attention(
            q.to(v.dtype), functional.normalize(k, dim=-1).to(v.dtype), v, scale=1
        )
        return x + self.out(h.transpose(-1, -2).reshape(x.shape))


class Conditioning(nn.Module):
    """The log-SNR and the condition as one vector (N, vector), after a SiLU."""

    def __init__(self, condition_size: int, vector: int):
        super().__init__()
        frequencies = torch.logspace(math.log10(math.pi / 8), math.log10(4 * math.pi), 8)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.logsnr = nn.Sequential(nn.Linear(17, vector), nn.SiLU(), nn.Linear(vector, vector))
        self.condition = nn.Sequential(nn.Linear(condition_size, vector), nn.SiLU(), nn.Linear(vector, vector))
        self.null = nn.Parameter(torch.zeros(vector))

    def forward(self, logsnr: torch.Tensor, condition: torch.Tensor, drop: torch.Tensor) -> torch.Tensor:
        """See the class."""
        x = logsnr[:, None].to(self.null.dtype) / LOGSNR_UNIT
        angles = x * self.frequencies
        embedded = self.logsnr(torch.cat((x, angles.sin(), angles.cos()), dim=1))
        condition = self.condition(condition)
        return functional.silu(embedded + torch.where(drop[:, None], self.null.to(condition.dtype), condition))


def _norm(dim: int) -> nn.GroupNorm:
    """Groups of at least eight channels, 32 at the most."""
    return nn.GroupNorm(math.gcd(32, dim // 8), dim)
