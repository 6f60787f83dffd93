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
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

HEADS, HEAD_DIM = 8, 64
ATTENTION_SCALE = 8
"""Factor of the cosine similarities of queries and keys."""
TOKENS = 256
"""Places for tokens: text in Imagen; one latent and 255 null tokens here."""


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
            pixels = _to_sequence(h)
            h = _to_image(self.cross_attention(pixels, tokens) + pixels, h)
        h = self.conv2(functional.silu(self.norm2(h) * (scale + 1) + shift))
        if self.gate is not None:
            h = h * self.gate(h)
        return h + self.skip(x)


class Transformer(nn.Module):
    """Self-attention over pixels (and over tokens, where given), then a feed-forward layer; a skip around each."""

    def __init__(self, dim: int, token_dim: int | None = None):
        super().__init__()
        self.attention = SelfAttention(dim, token_dim)
        self.feed_forward = feed_forward(dim, 2)

    def forward(self, x: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """(N, dim, H, W) to the same shape."""
        h = _to_sequence(x)
        h = self.attention(h, tokens) + h
        return _to_image(self.feed_forward(h) + h, x)


class SelfAttention(nn.Module):
    """Cosine attention with eight heads of queries and a single one of keys and values, a learned null among them."""

    def __init__(self, dim: int, token_dim: int | None):
        super().__init__()
        self.null_kv = nn.Parameter(torch.randn(2, HEAD_DIM))
        self.q_scale = nn.Parameter(torch.ones(HEAD_DIM))
        self.k_scale = nn.Parameter(torch.ones(HEAD_DIM))
        self.norm = nn.LayerNorm(dim, bias=False)
        self.to_q = nn.Linear(dim, HEADS * HEAD_DIM, bias=False)
        self.to_kv = nn.Linear(dim, 2 * HEAD_DIM, bias=False)
        self.token_kv = None
        if token_dim is not None:
            self.token_kv = nn.Sequential(nn.LayerNorm(token_dim), nn.Linear(token_dim, 2 * HEAD_DIM))
        self.out = nn.Sequential(nn.Linear(HEADS * HEAD_DIM, dim, bias=False), nn.LayerNorm(dim, bias=False))

    def forward(self, x: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """(N, L, dim) to (N, L, dim)."""
        x = self.norm(x)
        null = self.null_kv.flatten().to(x.dtype).expand(len(x), 1, -1)
        kv = torch.cat((null, self.to_kv(x)), dim=1)
        if self.token_kv is not None:
            kv = torch.cat((self.token_kv(tokens), kv), dim=1)
        k, v = (part[:, None].expand(-1, HEADS, -1, -1) for part in kv.chunk(2, dim=-1))
        return self.out(_cosine_attention(_heads(self.to_q(x)), k, v, self.q_scale, self.k_scale))


class CrossAttention(nn.Module):
    """Cosine attention of pixels to the condition's tokens and a learned null, eight heads."""

    def __init__(self, dim: int, token_dim: int):
        super().__init__()
        self.null_kv = nn.Parameter(torch.randn(2, HEAD_DIM))
        self.q_scale = nn.Parameter(torch.ones(HEAD_DIM))
        self.k_scale = nn.Parameter(torch.ones(HEAD_DIM))
        self.norm = nn.LayerNorm(dim, bias=False)
        self.to_q = nn.Linear(dim, HEADS * HEAD_DIM, bias=False)
        self.to_kv = nn.Linear(token_dim, 2 * HEADS * HEAD_DIM, bias=False)
        self.out = nn.Sequential(nn.Linear(HEADS * HEAD_DIM, dim, bias=False), nn.LayerNorm(dim, bias=False))

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """x (N, L, dim), tokens (N, M, token_dim) to (N, L, dim)."""
        k, v = (_heads(part) for part in self.to_kv(tokens).chunk(2, dim=-1))
        nulls = self.null_kv.to(k.dtype)[:, None, None, None].expand(-1, len(x), HEADS, 1, -1)
        k, v = torch.cat((nulls[0], k), dim=2), torch.cat((nulls[1], v), dim=2)
        return self.out(_cosine_attention(_heads(self.to_q(self.norm(x))), k, v, self.q_scale, self.k_scale))


class Resampler(nn.Module):
    """Perceiver resampler: 32 learned queries, and four made from the mean token, read the tokens twice."""

    def __init__(self, dim: int, queries: int = 32, from_mean: int = 4, depth: int = 2):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, dim))
        self.positions = nn.Embedding(2 * TOKENS, dim)
        self.from_mean = nn.Sequential(nn.LayerNorm(dim, bias=False), nn.Linear(dim, dim * from_mean))
        self.layers = nn.ModuleList(
            [nn.ModuleList((ResamplerAttention(dim), feed_forward(dim, 4))) for _ in range(depth)]
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(N, M, dim) to (N, 36, dim)."""
        made = self.from_mean(tokens.mean(1)).unflatten(1, (-1, tokens.shape[2]))
        queries = torch.cat((made, self.queries.to(made.dtype).expand(len(tokens), -1, -1)), dim=1)
        tokens = tokens + self.positions.weight[: tokens.shape[1]]
        for attention, after in self.layers:
            queries = attention(tokens, queries) + queries
            queries = after(queries) + queries
        return queries


class ResamplerAttention(nn.Module):
    """Cosine attention of the queries to the tokens and to themselves."""

    def __init__(self, dim: int):
        super().__init__()
        self.q_scale = nn.Parameter(torch.ones(HEAD_DIM))
        self.k_scale = nn.Parameter(torch.ones(HEAD_DIM))
        self.norm = nn.LayerNorm(dim)
        self.query_norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, HEADS * HEAD_DIM, bias=False)
        self.to_kv = nn.Linear(dim, 2 * HEADS * HEAD_DIM, bias=False)
        self.out = nn.Sequential(nn.Linear(HEADS * HEAD_DIM, dim, bias=False), nn.LayerNorm(dim))

    def forward(self, tokens: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """tokens (N, M, dim), queries (N, Q, dim) to (N, Q, dim)."""
        queries = self.query_norm(queries)
        seen = torch.cat((self.norm(tokens), queries), dim=1)
        q, k, v = (_heads(part) for part in (self.to_q(queries), *self.to_kv(seen).chunk(2, dim=-1)))
        return self.out(_cosine_attention(q, k, v, self.q_scale, self.k_scale))


class GlobalContext(nn.Module):
    """A gate in (0, 1) for each channel, from pixels pooled by one learned attention map (GCNet; Cao et al. 2019)."""

    def __init__(self, dim: int):
        super().__init__()
        self.to_k = nn.Conv2d(dim, 1, 1)
        hidden = max(3, dim // 2)
        self.gate = nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.SiLU(), nn.Conv2d(hidden, dim, 1), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, dim, H, W) to (N, dim, 1, 1)."""
        weights = self.to_k(x).flatten(2).softmax(dim=-1)
        return self.gate((x.flatten(2) @ weights.transpose(1, 2))[..., None])


class PixelNorm(nn.Module):
    """Each pixel's channels to root-mean-square 1, times a learned gain."""

    def __init__(self, dim: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, dim, H, W) to the same shape."""
        return functional.normalize(x, dim=1) * (x.shape[1] ** 0.5 * self.gain)


class LearnedFourier(nn.Module):
    """log-SNR (N,) to (N, 1 + count): the number itself, then sines and cosines of learned frequencies."""

    def __init__(self, count: int):
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(count // 2))

    def forward(self, logsnr: torch.Tensor) -> torch.Tensor:
        """See the class."""
        x = logsnr[:, None]
        angles = x * self.frequencies * (2 * math.pi)
        return torch.cat((x, angles.sin(), angles.cos()), dim=1)


class MultiScaleConv(nn.Module):
    """Convolutions of 3, 7 and 15 pixels beside one another: a half, a quarter and a quarter of the channels."""

    def __init__(self, channels: int, dim: int):
        super().__init__()
        sizes = ((3, dim // 2), (7, dim // 4), (15, dim - dim // 2 - dim // 4))
        self.convs = nn.ModuleList([nn.Conv2d(channels, out, kernel, padding=kernel // 2) for kernel, out in sizes])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, channels, H, W) to (N, dim, H, W)."""
        return torch.cat([conv(x) for conv in self.convs], dim=1)


class Downsample(nn.Module):
    """Half the resolution: four neighbours side by side, then a convolution of one pixel."""

    def __init__(self, dim: int, dim_out: int):
        super().__init__()
        self.conv = nn.Conv2d(4 * dim, dim_out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, dim, H, W) to (N, dim_out, H/2, W/2)."""
        return self.conv(functional.pixel_unshuffle(x, 2))


class WideConv(nn.Module):
    """The last level keeps its resolution: the sum of a convolution of three pixels and one of one."""

    def __init__(self, dim: int, dim_out: int):
        super().__init__()
        self.conv3 = nn.Conv2d(dim, dim_out, 3, padding=1)
        self.conv1 = nn.Conv2d(dim, dim_out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, dim, H, W) to (N, dim_out, H, W)."""
        return self.conv3(x) + self.conv1(x)


class Upsample(nn.Module):
    """Twice the resolution by a sub-pixel convolution, its four phases alike at first (ICNR; Aitken et al. 2017)."""

    def __init__(self, dim: int, dim_out: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, 4 * dim_out, 1)
        phase = torch.empty(dim_out, dim, 1, 1)
        nn.init.kaiming_uniform_(phase)
        self.conv.weight.data.copy_(phase.repeat_interleave(4, dim=0))
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, dim, H, W) to (N, dim_out, 2H, 2W)."""
        return functional.pixel_shuffle(functional.silu(self.conv(x)), 2)


def feed_forward(dim: int, factor: int) -> nn.Sequential:
    """Norm, linear, GELU, norm, linear, the hidden layer `factor` times as wide."""
    hidden = dim * factor
    return nn.Sequential(
        nn.LayerNorm(dim, bias=False),
        nn.Linear(dim, hidden, bias=False),
        nn.GELU(),
        nn.LayerNorm(hidden, bias=False),
        nn.Linear(hidden, dim, bias=False),
    )


def _cosine_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_scale: torch.Tensor, k_scale: torch.Tensor
) -> torch.Tensor:
    """Queries (N, heads, L, d), keys and values (N, heads, M, d) to (N, L, heads * d)."""
    q = (functional.normalize(q, dim=-1) * q_scale).to(v.dtype)
    k = (functional.normalize(k, dim=-1) * k_scale).to(v.dtype)
    return functional.scaled_dot_product_attention(q, k, v, scale=ATTENTION_SCALE).transpose(1, 2).flatten(2)


def _heads(x: torch.Tensor) -> torch.Tensor:
    """(N, L, heads * d) to (N, heads, L, d)."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def _to_sequence(x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) to (N, H * W, C)."""
    return x.flatten(2).transpose(1, 2)


def _to_image(sequence: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `_to_sequence`, in the shape of `like`."""
    return sequence.transpose(1, 2).reshape(like.shape)
