"""img2seq as one thing: which network a recipe has, what it is asked for, and how sure its answers are.

Three networks, each in a file of its own, give the same: `predict(features, draws, library)` -> `Prediction`.

- `img2seq_better`: a regression and, on its residual, a diffusion in the space of gene programs; log1p of normalised
  expression.
- `img2seq_counts`: a negative binomial for each gene; counts.
- `img2seq_paper`: as published (App. A); log1p of normalised expression.

**Intervals.** A prediction has a mean and a spread for each cell and gene. On cells held out of training, the residuals
divided by their spread have quantiles, gene by gene; an interval is the mean plus spread times two of these (split
conformal prediction; Lei et al. 2018, Sec. 5.2). Whatever the network is worth, it covers as it says, gene by gene, on
cells like those.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn

Recipe = Literal["paper", "better"]
Counts = Literal["normalised", "negative binomial"]

TAIL = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45)
LEVELS = (*TAIL, 0.5, *(round(1 - p, 3) for p in reversed(TAIL)))
"""The probabilities at which the residuals' quantiles are kept; between them, interpolated."""
HIGHEST = 1 - 2 * TAIL[0]
"""The widest interval there is."""
_GENES_AT_ONCE = 2048


class Draws(Protocol):
    """The random numbers of one sample of N cells, keyed by cell (models know nothing of keys)."""

    def normal(self, purpose: str, count: int) -> torch.Tensor:
        """Standard normal float32 (N, count); the same for the same purpose."""

    def negative_binomial(self, purpose: str, mean: torch.Tensor, dispersion: torch.Tensor) -> torch.Tensor:
        """Counts (N, G) of `mean` (N, G) and `dispersion` (G,)."""


@dataclass(frozen=True)
class Img2SeqConfig:
    """What rebuilds the network."""

    recipe: Recipe
    genes: int
    """G: all genes of the cell store."""
    feature_size: int
    """D of the FM's embeddings; `paper`: width of its tokens."""
    counts: Counts = "normalised"
    """`negative binomial` models counts; `better` alone can."""
    hidden: int = 256
    """Width of the regression and of the denoiser; 2048 in App. A, of the denoiser."""
    depth: int = 2
    """Residual blocks of each; `paper` has none."""
    programs: int = 64
    """Gene programs that are diffused."""
    heads: int = 0
    """`paper`: attention heads of the FM's last block."""
    prefix_tokens: int = 1
    """`paper`: tokens before those of the patches, left out of the mean."""

    @classmethod
    def of(cls, preset: str, recipe: Recipe, genes: int, feature_size: int, **changes: Any) -> Img2SeqConfig:
        """A named size; `paper` has the published one. `changes`: any field. Raises KeyError for an unknown preset."""
        sizes = {"hidden": 2048, "depth": 0, "programs": 0} if recipe == "paper" else PRESETS[preset]
        return cls(recipe, genes, feature_size, **{**sizes, **changes})

    def build(self) -> nn.Module:
        """The network, its weights drawn from torch's generator.

        Raises ValueError for sizes that do not fit each other.
        """
        if self.recipe == "paper":
            from cosmic_ray.models.img2seq_paper import PublishedImg2Seq

            return PublishedImg2Seq(self)
        if self.counts == "negative binomial":
            from cosmic_ray.models.img2seq_counts import CountsImg2Seq

            return CountsImg2Seq(self)
        from cosmic_ray.models.img2seq_better import ResidualImg2Seq

        return ResidualImg2Seq(self)

    def to_json(self) -> dict[str, Any]:
        """`Img2SeqConfig(**to_json())` is the same."""
        return asdict(self)


PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"hidden": 64, "depth": 1, "programs": 16},
    "small": {"hidden": 256, "depth": 2, "programs": 64},
    "base": {"hidden": 512, "depth": 2, "programs": 128},
    "large": {"hidden": 1024, "depth": 3, "programs": 256},
}
"""For minutes on two cores; for some thousand cells; for some ten thousand; for more."""


def normalised(counts: torch.Tensor, total: torch.Tensor | float) -> torch.Tensor:
    """log1p of counts (N, G) scaled to `total` a cell (App. A); an empty cell stays zero."""
    return torch.log1p(counts * (total / counts.sum(1, keepdim=True).clamp(min=1e-12)))


class Calibration(nn.Module):
    """Quantiles of residuals over spreads, by gene: what makes of a mean and a spread an interval."""

    def __init__(self, genes: int):
        super().__init__()
        self.register_buffer("quantiles", torch.zeros(len(LEVELS), genes))

    @torch.no_grad()
    def fit(self, scores: torch.Tensor) -> None:
        """`scores` (N, G): residuals over spreads of held-out cells. Below the median a quantile is the score of rank
        floor((N + 1) p), above it of rank ceil((N + 1) p), so that an interval of two covers at least as it says; with
        few cells the tails end at the extremes."""
        count = len(scores)
        ranks = [int((count + 1) * p) if p <= 0.5 else -int(-(count + 1) * p // 1) for p in LEVELS]
        places = torch.tensor([min(max(rank, 1), count) - 1 for rank in ranks], device=scores.device)
        for start in range(0, scores.shape[1], _GENES_AT_ONCE):
            part = slice(start, start + _GENES_AT_ONCE)
            self.quantiles[:, part] = scores[:, part].sort(dim=0).values[places]

    def interval(self, mean: torch.Tensor, spread: torch.Tensor, level: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Lower and upper limits, each as `mean`, not below 0. Raises ValueError for a level outside (0, HIGHEST]."""
        if not 0 < level <= HIGHEST + 1e-9:
            raise ValueError(f"an interval's level is above 0 and at most {HIGHEST}, not {level}")
        tail = (1 - level) / 2
        lower, upper = (self._quantile(p).to(mean) for p in (tail, 1 - tail))
        return (mean + spread * lower).clamp(min=0), (mean + spread * upper).clamp(min=0)

    def _quantile(self, p: float) -> torch.Tensor:
        p = min(max(p, LEVELS[0]), LEVELS[-1])
        after = min(max(bisect.bisect_left(LEVELS, p), 1), len(LEVELS) - 1)
        weight = (p - LEVELS[after - 1]) / (LEVELS[after] - LEVELS[after - 1])
        return torch.lerp(self.quantiles[after - 1], self.quantiles[after], weight)


@dataclass(frozen=True)
class Prediction:
    """What a network says of N cells and G genes."""

    mean: torch.Tensor
    """float32 (N, G)."""
    spread: torch.Tensor
    """float32 (N, G): the standard deviation that the network expects."""
    samples: torch.Tensor
    """float32 (N, S, G): one for each of the `draws`."""
    calibration: Calibration

    def interval(self, level: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Lower and upper limit, float32 (N, G) each, that hold the truth with probability `level`, gene by gene."""
        return self.calibration.interval(self.mean, self.spread, level)


class Img2SeqNetwork(Protocol):
    """What the three networks have in common, beside being modules."""

    calibration: Calibration

    def predict(
        self, features: torch.Tensor, draws: Sequence[Draws], library: torch.Tensor | None = None
    ) -> Prediction:
        """Mean, spread, and a sample for each of `draws`, of cells with `features` (N, D), tokens (N, T, D) for
        `paper`. `library` (N,): total counts of each cell, for counts alone; the training cells' median by default."""

    def observe(self, features: torch.Tensor, counts: torch.Tensor, draws: Draws) -> dict[str, torch.Tensor]:
        """What `calibrate` needs of held-out cells, (N, ...) each; `mean` and `truth` (N, G) among them."""

    def calibrate(self, observed: dict[str, torch.Tensor]) -> None:
        """Set spreads and quantiles by held-out cells."""

    def spread(self, observed: dict[str, torch.Tensor]) -> torch.Tensor:
        """(N, G), as calibrated."""


def coverage(network: Img2SeqNetwork, observed: dict[str, torch.Tensor], level: float) -> float:
    """The share of the observed values, over cells and genes, that lie in their interval."""
    lower, upper = network.calibration.interval(observed["mean"], network.spread(observed), level)
    return ((observed["truth"] >= lower) & (observed["truth"] <= upper)).double().mean().item()
