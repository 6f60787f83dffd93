"""The network of img2seq's `recipe: better`: a regression, and a diffusion of what it leaves over.

z are the log1p values standardised gene by gene, with the median gene's spread mixed in, so that a gene found in three
cells does not weigh as one that varies in all. With features f:

- **Regression**: z_base = B(f), a residual MLP of a few hundred wide, so a regression of reduced rank.
- **Programs**: c = V'(z - z_base) / w, where V holds the leading principal axes of what a linear regression leaves of
  the training cells' z, and w the standard deviations along them. Genes vary together along these; the diffusion gives
  their joint distribution, given f: a residual MLP that f and the log-SNR scale and shift (adaLN; Peebles & Xie 2023),
  v-prediction, a cosine schedule from a log-SNR of 15 down to -15, where nothing is left of c: sampling begins at what
  training ends with.
- **Gene noise**: what is left, z - z_base - V w c, drawn for each gene by itself from the quantiles that it has on
  held-out cells: skewed, and mostly zero for a gene that is rarely found.

How far programs spread on held-out cells, too, is measured there: training residuals are too small by what the
regression has learnt by heart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from cosmic_ray.models.diffusion import Diffusion, diffuse
from cosmic_ray.models.img2seq import Calibration, Draws, Img2SeqConfig, Prediction, normalised
from cosmic_ray.models.sampling import sample

DIFFUSION = Diffusion("v", threshold=None)
STEPS = 20
SPREAD_SAMPLES = 16
"""Samples of the programs from which their covariance is taken, for each cell."""
LOGSNR_UNIT = 4.0
NOISE_QUANTILES = 65
"""Quantiles of the gene noise at equally spaced probabilities."""
_GENES_AT_ONCE = 2048


class Said(NamedTuple):
    """What training looks at."""

    base: torch.Tensor
    """(N, G): z as the regression has it."""
    programs: torch.Tensor
    """(N, K): what is diffused; without gradient."""
    v: torch.Tensor
    """(N, K): what the denoiser says of it."""


class ResidualImg2Seq(nn.Module):
    """`network(features, z, noise, logsnr)` -> `Said`; see `Img2SeqNetwork` for the rest.

    features: (N, D), as they come. z: (N, G), of `standardise`. noise: (N, K). logsnr: (N,).
    """

    def __init__(self, config: Img2SeqConfig):
        """Raises ValueError for more programs than genes."""
        super().__init__()
        if not 1 <= config.programs <= config.genes:
            raise ValueError(f"programs must be between 1 and the {config.genes} genes, not {config.programs}")
        self.config = config
        genes, size, programs = config.genes, config.feature_size, config.programs
        self.feature_scale = Standardised(size)
        self.base = nn.Sequential(Trunk(size, config.hidden, config.depth), nn.Linear(config.hidden, genes))
        self.denoiser = Denoiser(size, programs, config.hidden, config.depth)
        nn.init.zeros_(self.base[-1].weight)
        nn.init.zeros_(self.base[-1].bias)
        self.calibration = Calibration(genes)
        for name, value in {
            "total": torch.ones(()),
            "gene_mean": torch.zeros(genes),
            "gene_scale": torch.ones(genes),
            "loadings": torch.zeros(genes, programs),
            "program_scale": torch.ones(programs),
            "program_spread": torch.ones(programs),
            "cloud_variance": torch.zeros(genes),
            "cloud_weight": torch.ones(()),
            "noise_quantiles": torch.zeros(NOISE_QUANTILES, genes),
            "noise_spread": torch.zeros(genes),
        }.items():
            self.register_buffer(name, value)

    def forward(self, features: torch.Tensor, z: torch.Tensor, noise: torch.Tensor, logsnr: torch.Tensor) -> Said:
        """See the class."""
        features = self.feature_scale(features)
        base = self.base(features)
        programs = self.programs(z - base.detach())
        return Said(base, programs, self.denoiser(diffuse(programs, noise, logsnr), logsnr, features))

    def standardise(self, counts: torch.Tensor) -> torch.Tensor:
        """Counts (N, G) to z (N, G)."""
        return (normalised(counts, self.total) - self.gene_mean) / self.gene_scale

    def programs(self, residual: torch.Tensor) -> torch.Tensor:
        """Of residuals in z (N, G), the programs (N, K)."""
        with torch.autocast(residual.device.type, enabled=False):
            return residual.to(self.loadings) @ self.loadings / self.program_scale

    def blocks(self) -> list[nn.Module]:
        """The parts that are sharded and compiled one by one."""
        return [*self.base[0].blocks, *self.denoiser.blocks]

    @torch.no_grad()
    def predict(
        self, features: torch.Tensor, draws: Sequence[Draws], library: torch.Tensor | None = None
    ) -> Prediction:
        """See `Img2SeqNetwork`."""
        z, cloud = self._seen(features, draws[0])
        samples = [self._sample(features, z, draw) for draw in draws]
        mean, spread = self._values(z), self.spread({"cloud": cloud})
        return Prediction(mean, spread, torch.stack(samples, 1), self.calibration)

    @torch.no_grad()
    def observe(self, features: torch.Tensor, counts: torch.Tensor, draws: Draws) -> dict[str, torch.Tensor]:
        """See `Img2SeqNetwork`: `cloud` (N, S, K) are samples of the programs, `programs` (N, K) those of the cell and
        `left` (N, G) what they do not hold, in log1p."""
        z, cloud = self._seen(features, draws)
        residual = self.standardise(counts) - z
        programs = self.programs(residual)
        left = (residual - self._genes(programs)) * self.gene_scale
        truth = normalised(counts, self.total)
        return {"mean": self._values(z), "truth": truth, "cloud": cloud, "programs": programs, "left": left}

    @torch.no_grad()
    def calibrate(self, observed: dict[str, torch.Tensor]) -> None:
        """See `Img2SeqNetwork`."""
        expected = observed["cloud"].square().mean((0, 1))
        self.program_spread.copy_((observed["programs"].square().mean(0) / expected.clamp(min=1e-12)).sqrt())
        self._calibrate_cloud(self._cloud_variance(observed["cloud"]))
        left = observed["left"]
        self.noise_spread.copy_(left.var(0, unbiased=False).sqrt())
        at = (torch.arange(NOISE_QUANTILES, dtype=left.dtype, device=left.device) + 0.5) / NOISE_QUANTILES
        for start in range(0, left.shape[1], _GENES_AT_ONCE):
            part = slice(start, start + _GENES_AT_ONCE)
            quantiles = torch.quantile(left[:, part], at, dim=0)
            quantiles = quantiles - quantiles.mean(0)
            # The ends are cut off; what they held of the variance is given back.
            kept = quantiles.square().mean(0).sqrt()
            self.noise_quantiles[:, part] = quantiles * (self.noise_spread[part] / kept.clamp(min=1e-12)).clamp(max=3)
        self.calibration.fit((observed["truth"] - observed["mean"]) / self.spread(observed))

    def spread(self, observed: dict[str, torch.Tensor]) -> torch.Tensor:
        """See `Img2SeqNetwork`."""
        variance = torch.lerp(self.cloud_variance, self._cloud_variance(observed["cloud"]), self.cloud_weight)
        return (variance + self.noise_spread.square()).sqrt().clamp(min=1e-6)

    def _cloud_variance(self, cloud: torch.Tensor) -> torch.Tensor:
        """The variance that the programs' samples (N, S, K) give each gene, in log1p: (N, G)."""
        cloud = (cloud - cloud.mean(1, keepdim=True)) * self.program_spread
        varies = torch.stack([self._genes(one).square().sum(0) for one in cloud]) / (cloud.shape[1] - 1)
        return varies * self.gene_scale.square()

    def _calibrate_cloud(self, variance: torch.Tensor) -> None:
        """Few samples tell a cell's variance roughly: each is drawn to the mean over cells, as far as the differences
        between cells are no more than that roughness (empirical Bayes; Var of a variance of S is 2 v**2 / (S - 1))."""
        self.cloud_variance.copy_(variance.mean(0))
        apart = variance.var(0, unbiased=False).sum()
        rough = (2 * variance.square() / (SPREAD_SAMPLES + 1)).mean(0).sum()
        self.cloud_weight.copy_((1 - rough / apart.clamp(min=1e-30)).clamp(min=0))

    def _seen(self, features: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        """The regression's z (N, G), and SPREAD_SAMPLES samples of the programs (N, S, K), as they come."""
        features = self.feature_scale(features)
        return self.base(features), self._draw(features, draws, [f"spread {index}" for index in range(SPREAD_SAMPLES)])

    def _sample(self, features: torch.Tensor, z: torch.Tensor, draws: Draws) -> torch.Tensor:
        programs = self._draw(self.feature_scale(features), draws, ["programs"])[:, 0] * self.program_spread
        uniform = torch.special.ndtr(draws.normal("gene noise", self.config.genes).to(z))
        at = (uniform * NOISE_QUANTILES - 0.5).clamp(0, NOISE_QUANTILES - 1)
        below = at.floor().long().clamp(max=NOISE_QUANTILES - 2)
        low, high = (self.noise_quantiles.gather(0, below + more) for more in (0, 1))
        return (self._values(z + self._genes(programs), at_least=None) + torch.lerp(low, high, at - below)).clamp(min=0)

    def _draw(self, features: torch.Tensor, draws: Draws, purposes: Sequence[str]) -> torch.Tensor:
        """For each purpose a sample of the programs (N, S, K), by UniPC in STEPS steps."""

        def network(x: torch.Tensor, logsnr: torch.Tensor, condition: torch.Tensor, drop: torch.Tensor) -> torch.Tensor:
            return self.denoiser(x, logsnr, condition)

        def noise(step: int) -> torch.Tensor:
            drawn = [draws.normal(purpose, self.config.programs).to(features) for purpose in purposes]
            return torch.stack(drawn, 1).flatten(0, 1)

        condition = features.repeat_interleave(len(purposes), dim=0)
        made = sample(network, DIFFUSION, condition, noise, steps=STEPS).images
        return made.unflatten(0, (len(features), len(purposes)))

    def _genes(self, programs: torch.Tensor) -> torch.Tensor:
        return (programs * self.program_scale) @ self.loadings.T

    def _values(self, z: torch.Tensor, at_least: float | None = 0.0) -> torch.Tensor:
        """z to log1p values, which are never negative."""
        values = self.gene_mean + self.gene_scale * z
        return values if at_least is None else values.clamp(min=at_least)


class Standardised(nn.Module):
    """Features as the training cells' mean and spread make them: (N, D) to (N, D)."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return (features.to(self.mean.dtype) - self.mean) / self.std


class Block(nn.Module):
    """x + MLP(norm(x)); where it is conditioned, a vector scales and shifts the norm and gates the MLP, from zero."""

    def __init__(self, width: int, vector: int = 0):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=not vector)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.modulate = nn.Linear(vector, 3 * width) if vector else None
        if self.modulate is not None:
            nn.init.zeros_(self.modulate.weight)
            nn.init.zeros_(self.modulate.bias)

    def forward(self, x: torch.Tensor, vector: torch.Tensor | None = None) -> torch.Tensor:
        """(N, W) to (N, W)."""
        if self.modulate is None:
            return x + self.mlp(self.norm(x))
        scale, shift, gate = self.modulate(vector).chunk(3, dim=1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class Trunk(nn.Module):
    """Standardised features (N, D) to (N, width): linear, then residual blocks."""

    def __init__(self, size: int, width: int, depth: int):
        super().__init__()
        self.first = nn.Linear(size, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """See the class."""
        x = self.first(features)
        for block in self.blocks:
            x = block(x)
        return x


class Denoiser(nn.Module):
    """Noisy programs (N, K) at a log-SNR (N,), given standardised features (N, D), to v (N, K)."""

    def __init__(self, size: int, programs: int, width: int, depth: int):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width))
        self.level = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.first = nn.Linear(programs, width)
        self.blocks = nn.ModuleList(Block(width, width) for _ in range(depth + 1))
        self.last = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, programs))
        nn.init.zeros_(self.last[-1].weight)
        nn.init.zeros_(self.last[-1].bias)

    def forward(self, x: torch.Tensor, logsnr: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """See the class."""
        frequencies = torch.exp(torch.linspace(math.log(0.1), math.log(10), 16, dtype=x.dtype, device=x.device))
        angles = (logsnr.to(x.dtype) / LOGSNR_UNIT)[:, None] * frequencies
        level = self.level(torch.cat((angles.sin(), angles.cos()), dim=1))
        vector = torch.nn.functional.silu(self.features(features) + level)
        x = self.first(x)
        for block in self.blocks:
            x = block(x, vector)
        return self.last(x)
