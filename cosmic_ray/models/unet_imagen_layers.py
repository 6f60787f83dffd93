"""The layers of Imagen's U-Net (`unet_imagen`): attention, the resampler, convolutions, norms."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

HEADS, HEAD_DIM = 8, 64
ATTENTION_SCALE = 8
"""Factor of the cosine similarities of queries and keys."""
TOKENS = 256
"""Places for tokens: text in Imagen; one latent and 255 null tokens here."""


class Transformer(nn.Module):
    """Self-attention over pixels (and over tokens, where given), then a feed-forward layer; a skip around each."""

    def __init__(self, dim: int, token_dim: int | None = None):
        super().__init__()
        self.attention = SelfAttention(dim, token_dim)
        self.feed_forward = feed_forward(dim, 2)

    def forward(self, x: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """(N, dim, H, W) to the same shape."""
        h = to_sequence(x)
        h = self.attention(h, tokens) + h
        return to_image(self.feed_forward(h) + h, x)


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


def to_sequence(x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) to (N, H * W, C)."""
    return x.flatten(2).transpose(1, 2)


def to_image(sequence: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_sequence`, in the shape of `like`."""
    return sequence.transpose(1, 2).reshape(like.shape)
