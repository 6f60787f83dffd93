"""img2seq as published (App. A): the FM's last block, a linear layer to all genes, and a diffusion of the residual.

Known to be wrong, and kept: ten steps of betas from 5e-5 to 5e-4 leave abar at 0.997, so the forward process ends far
from noise, yet sampling begins at N(0, I). Stated by App. A: T = 10, the betas, a 3-layer MLP of 2048. Only in the
published code: x_base as an input, the mean of 7 samples, the residual's weight of 0.3. (It has T = 6 and skews the
times to small values, in a way that is not stated; here they are uniform.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import nn

from cosmic_ray.models.img2seq import Calibration, Draws, Img2SeqConfig, Prediction, normalised

STEPS = 10
BETAS = (5e-5, 5e-4)
MEAN_OF = 7
RESIDUAL_WEIGHT = 0.3


class PublishedBase(nn.Module):
    """Stage 1: the tokens (N, T, D) that enter the FM's last block, to log1p values (N, G)."""

    def __init__(self, config: Img2SeqConfig):
        super().__init__()
        if not config.heads or config.feature_size % config.heads:
            raise ValueError(f"{config.heads} heads do not divide the FM's width of {config.feature_size}")
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.prefix = config.prefix_tokens
        self.block = Block(config.feature_size, config.heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=norm)
        self.norm = norm(config.feature_size).requires_grad_(False)
        self.head = nn.Linear(config.feature_size, config.genes)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Image features (N, D), the mean over the patches' tokens, and values (N, G)."""
        features = self.norm(self.block(tokens.to(self.head.weight.dtype)))[:, self.prefix :].mean(1)
        return features, self.head(features)

    @torch.no_grad()
    def begin(self, block: nn.Module, norm: nn.Module) -> None:
        """Take over the FM's last block and final norm. Raises RuntimeError where they are of another size."""
        self.block.load_state_dict(block.state_dict())
        self.norm.load_state_dict(norm.state_dict())


class PublishedImg2Seq(nn.Module):
    """Both stages. `network(tokens, values, noise, time)` is stage 2's prediction of the noise (N, G), with `time` int
    (N,) in 0..STEPS-1; stage 1 is `network.base`. See `Img2SeqNetwork` for the rest.
    """

    def __init__(self, config: Img2SeqConfig):
        """Raises ValueError where the heads do not divide the width."""
        super().__init__()
        self.config = config
        genes, hidden = config.genes, config.hidden
        self.base = PublishedBase(config)
        self.denoiser = nn.Sequential(
            nn.Linear(2 * genes + config.feature_size + 1, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, genes),
        )
        self.calibration = Calibration(genes)
        self.register_buffer("total", torch.ones(()))
        self.register_buffer("residual_spread", torch.ones(genes))

    def forward(
        self, tokens: torch.Tensor, values: torch.Tensor, noise: torch.Tensor, time: torch.Tensor
    ) -> torch.Tensor:
        """See the class."""
        with torch.no_grad():
            features, base = self.base(tokens)
        abar = abars().to(base)[time][:, None]
        noisy = abar.sqrt() * (values - base) + (1 - abar).sqrt() * noise
        return self._noise(noisy, features, base, time)

    def blocks(self) -> list[nn.Module]:
        """The parts that are sharded and compiled one by one."""
        return []

    @torch.no_grad()
    def predict(self, tokens: torch.Tensor, draws: Sequence[Draws], library: torch.Tensor | None = None) -> Prediction:
        """See `Img2SeqNetwork`; the mean is the regression plus the weighted mean of 7 samples of the residual."""
        features, base = self.base(tokens)
        mean = base + self._mean_residual(features, base, draws[0])
        samples = [base + RESIDUAL_WEIGHT * self._residual(features, base, draw, "residual") for draw in draws]
        return Prediction(mean, self.spread({"mean": mean}), torch.stack(samples, 1), self.calibration)

    @torch.no_grad()
    def observe(self, tokens: torch.Tensor, counts: torch.Tensor, draws: Draws) -> dict[str, torch.Tensor]:
        """See `Img2SeqNetwork`."""
        features, base = self.base(tokens)
        mean = base + self._mean_residual(features, base, draws)
        return {"mean": mean, "truth": normalised(counts, self.total)}

    @torch.no_grad()
    def calibrate(self, observed: dict[str, torch.Tensor]) -> None:
        """See `Img2SeqNetwork`; a gene's spread is the same for every cell."""
        error = observed["truth"] - observed["mean"]
        self.residual_spread.copy_(error.square().mean(0).sqrt().clamp(min=1e-6))
        self.calibration.fit(error / self.residual_spread)

    def spread(self, observed: dict[str, torch.Tensor]) -> torch.Tensor:
        """See `Img2SeqNetwork`."""
        return self.residual_spread.expand_as(observed["mean"])

    def _noise(
        self, noisy: torch.Tensor, features: torch.Tensor, base: torch.Tensor, time: torch.Tensor
    ) -> torch.Tensor:
        step = (time.to(base) + 1)[:, None] / STEPS
        return self.denoiser(torch.cat((noisy, features, base, step), dim=1))

    def _mean_residual(self, features: torch.Tensor, base: torch.Tensor, draws: Draws) -> torch.Tensor:
        drawn = [self._residual(features, base, draws, f"mean {index}") for index in range(MEAN_OF)]
        return RESIDUAL_WEIGHT * torch.stack(drawn).mean(0)

    def _residual(self, features: torch.Tensor, base: torch.Tensor, draws: Draws, purpose: str) -> torch.Tensor:
        """Ancestral sampling from N(0, I) (Ho et al. 2020, Algorithm 2)."""
        betas, products = linear_betas().to(base), abars().to(base)
        x = draws.normal(f"{purpose} start", self.config.genes).to(base)
        for step in reversed(range(STEPS)):
            time = torch.full((len(x),), step, device=x.device)
            noise = self._noise(x, features, base, time)
            x = (x - betas[step] / (1 - products[step]).sqrt() * noise) / (1 - betas[step]).sqrt()
            if step:
                before = (1 - products[step - 1]) / (1 - products[step]) * betas[step]
                x = x + before.sqrt() * draws.normal(f"{purpose} step {step}", self.config.genes).to(base)
        return x


def linear_betas() -> torch.Tensor:
    """float64 (STEPS,)."""
    return torch.linspace(*BETAS, STEPS, dtype=torch.float64)


def abars() -> torch.Tensor:
    """The cumulative products of 1 - beta: float64 (STEPS,)."""
    return (1 - linear_betas()).cumprod(0)
