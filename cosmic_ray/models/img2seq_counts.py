"""img2seq that counts: a negative binomial for each gene, its mean from the features, the library size as offset.

mean = library * rate, where the rates of a cell sum to 1; variance = mean + mean**2 / dispersion, one dispersion a gene
(as scVI's decoder: Lopez et al. 2018, Eq. 4, without its latent). Given the features, genes are independent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from cosmic_ray.models.img2seq import Calibration, Draws, Img2SeqConfig, Prediction
from cosmic_ray.models.img2seq_better import Standardised, Trunk


def nb_log_likelihood(counts: torch.Tensor, log_mean: torch.Tensor, log_dispersion: torch.Tensor) -> torch.Tensor:
    """Log-probability of counts (N, G), given log-mean (N, G) and log-dispersion (G,): (N, G).

    scipy's `nbinom(n=dispersion, p=dispersion / (dispersion + mean))`.
    """
    n = log_dispersion.exp()
    log_both = torch.logaddexp(log_mean, log_dispersion.expand_as(log_mean))
    choose = torch.lgamma(counts + n) - torch.lgamma(n) - torch.lgamma(counts + 1)
    return choose + n * (log_dispersion - log_both) + counts * (log_mean - log_both)


class CountsImg2Seq(nn.Module):
    """`network(features)` -> log-rates (N, G) and log-dispersions (G,); see `Img2SeqNetwork` for the rest."""

    def __init__(self, config: Img2SeqConfig):
        super().__init__()
        self.config = config
        self.feature_scale = Standardised(config.feature_size)
        self.trunk = Trunk(config.feature_size, config.hidden, config.depth)
        self.head = nn.Linear(config.hidden, config.genes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.log_dispersion = nn.Parameter(torch.zeros(config.genes))
        self.calibration = Calibration(config.genes)
        self.register_buffer("total", torch.ones(()))
        self.register_buffer("log_rate", torch.zeros(config.genes))

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the class."""
        logits = self.head(self.trunk(self.feature_scale(features)))
        rates = (logits.to(torch.promote_types(logits.dtype, torch.float32)) + self.log_rate).log_softmax(dim=1)
        return rates, self.log_dispersion.clamp(-10, 10)

    def blocks(self) -> list[nn.Module]:
        """The parts that are sharded and compiled one by one."""
        return list(self.trunk.blocks)

    @torch.no_grad()
    def predict(
        self, features: torch.Tensor, draws: Sequence[Draws], library: torch.Tensor | None = None
    ) -> Prediction:
        """See `Img2SeqNetwork`; everything in counts."""
        rates, log_dispersion = self(features)
        mean = rates.exp() * (self.total if library is None else library.to(rates)[:, None])
        samples = [draw.negative_binomial("counts", mean, log_dispersion.exp()) for draw in draws]
        return Prediction(mean, self.spread({"mean": mean}), torch.stack(samples, 1), self.calibration)

    @torch.no_grad()
    def observe(self, features: torch.Tensor, counts: torch.Tensor, draws: Draws) -> dict[str, torch.Tensor]:
        """See `Img2SeqNetwork`; each cell's library is its own."""
        rates, _ = self(features)
        return {"mean": rates.exp() * counts.sum(1, keepdim=True), "truth": counts.to(rates)}

    def calibrate(self, observed: dict[str, torch.Tensor]) -> None:
        """See `Img2SeqNetwork`."""
        self.calibration.fit((observed["truth"] - observed["mean"]) / self.spread(observed))

    @torch.no_grad()
    def spread(self, observed: dict[str, torch.Tensor]) -> torch.Tensor:
        """See `Img2SeqNetwork`."""
        mean = observed["mean"]
        return (mean + mean.square() * (-self.log_dispersion.clamp(-10, 10)).exp()).sqrt().clamp(min=1e-6)
