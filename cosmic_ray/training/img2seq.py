"""img2seq's `recipe: better` as objectives: a regression with the diffusion of its residual, or negative binomials."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from cosmic_ray.ingest import keyed
from cosmic_ray.models.diffusion import squared_error, target
from cosmic_ray.models.img2seq import Img2SeqConfig
from cosmic_ray.models.img2seq_better import DIFFUSION, ResidualImg2Seq, Said
from cosmic_ray.models.img2seq_counts import nb_log_likelihood
from cosmic_ray.training.objective import Share, Sum
from cosmic_ray.training.seq2img import GOLDEN

NAME = "img2seq"
TIMES = 4
"""Noise levels at which each held-out cell is denoised."""


class _Objective:
    """What both have in common: `share.tensors`: "features", floating (n, D); "counts", float32 (n, G)."""

    phases = (NAME,)

    def __init__(
        self, config: Img2SeqConfig, statistics: Mapping[str, torch.Tensor], seed: int, feature_noise: float = 0.0
    ):
        """`seed` draws the initial weights; `statistics`: of `img2seq_statistics`; both equal on every rank.

        `feature_noise`: standard deviation of what training adds to each standardised feature. For a linear regression
        that is a ridge of its square a cell (Bishop 1995).
        """
        torch.manual_seed(seed)
        self.config, self._feature_noise = config, feature_noise
        self.network = config.build()
        buffers = dict(self.network.named_buffers())
        for name, value in statistics.items():
            buffers[name].copy_(value)

    def networks(self) -> Mapping[str, nn.Module]:
        """Everything is one network."""
        return {NAME: self.network}

    def blocks(self, name: str) -> list[nn.Module]:
        """The network's own."""
        return self.network.blocks()

    def _inputs(self, share: Share, noise: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Features, noised by the seed `noise`, if any, and counts, in the network's dtype."""
        features, counts = checked_inputs(share, self.config, 2, next(self.network.parameters()).dtype)
        if noise is not None and self._feature_noise:
            drawn = keyed.normal(noise, share.positions, "feature noise", self.config.feature_size).to(features)
            features = features + self._feature_noise * self.network.feature_scale.std * drawn
        return features, counts


class Img2SeqObjective(_Objective):
    """The regression's squared error of z, mean over genes, plus the weighted squared error of v, mean over programs.

    The denoiser is trained on what the regression leaves over as it is by then; no gradient goes from it to the
    regression. Each has weights of its own, so that, clipping apart, the sum of the losses trains both as if alone.
    """

    network: ResidualImg2Seq

    def losses(self, networks: Mapping[str, nn.Module], share: Share, seed: int, phase: str) -> dict[str, Sum]:
        """`loss`, and its parts `base_error` and `program_error`."""
        start = keyed.uniform(seed, torch.zeros_like(share.positions[:1]), "time", 1)[:, 0].double()
        times = (share.positions.double() * GOLDEN + start).frac()
        features, counts = self._inputs(share, seed)
        z = self.network.standardise(counts)
        said, noise, logsnr = self._say(networks, share, seed, features, z, times, "")
        base = squared_error(said.base, z)
        programs = self._program_error(said, noise, logsnr)
        count = _count(base)
        return {
            "loss": ((base + programs).sum(), count),
            "base_error": (base.sum(), count),
            "program_error": (programs.sum(), count),
        }

    def metrics(self, networks: Mapping[str, nn.Module], share: Share, seed: int) -> dict[str, Sum]:
        """The same, at noise that never changes; and `error`, squared error of the values that the regression gives, in
        log1p."""
        draws = keyed.uniform(seed, share.positions, "held-out time", TIMES).double()
        features, counts = self._inputs(share, None)
        z = self.network.standardise(counts)
        programs = torch.zeros(len(share), dtype=z.dtype, device=z.device)
        for index in range(TIMES):
            times = (index + draws[:, index]) / TIMES
            said, noise, logsnr = self._say(networks, share, seed, features, z, times, f"held-out {index}")
            programs = programs + self._program_error(said, noise, logsnr) / TIMES
        base, count = squared_error(said.base, z), _count(z)
        error = squared_error(said.base * self.network.gene_scale, z * self.network.gene_scale)
        return {
            "loss": ((base + programs).sum(), count),
            "base_error": (base.sum(), count),
            "program_error": (programs.sum(), count),
            "error": (error.sum(), count),
        }

    def _say(
        self,
        networks: Mapping[str, nn.Module],
        share: Share,
        seed: int,
        features: torch.Tensor,
        z: torch.Tensor,
        times: torch.Tensor,
        purpose: str,
    ) -> tuple[Said, torch.Tensor, torch.Tensor]:
        noise = keyed.normal(seed, share.positions, f"noise {purpose}", self.config.programs).to(z.dtype)
        logsnr = DIFFUSION.logsnr(times).to(z.dtype)
        return networks[NAME](features, z, noise, logsnr), noise, logsnr

    def _program_error(self, said: Said, noise: torch.Tensor, logsnr: torch.Tensor) -> torch.Tensor:
        wanted = target(said.programs, noise, logsnr, DIFFUSION.predicts)
        return squared_error(said.v, wanted) * DIFFUSION.weight(logsnr)


class CountsObjective(_Objective):
    """The negative log-likelihood of the counts, mean over genes, given each cell's total."""

    def losses(self, networks: Mapping[str, nn.Module], share: Share, seed: int, phase: str) -> dict[str, Sum]:
        """`loss`."""
        return self._sums(networks, share, seed)

    def metrics(self, networks: Mapping[str, nn.Module], share: Share, seed: int) -> dict[str, Sum]:
        """The same, on features as they are."""
        return self._sums(networks, share, None)

    def _sums(self, networks: Mapping[str, nn.Module], share: Share, noise: int | None) -> dict[str, Sum]:
        features, counts = self._inputs(share, noise)
        rates, dispersion = networks[NAME](features)
        library = counts.sum(1, keepdim=True).clamp(min=1e-12).log()
        found = -nb_log_likelihood(counts, rates + library, dispersion).mean(1)
        return {"loss": (found.sum(), _count(found))}


def checked_inputs(
    share: Share, config: Img2SeqConfig, ndim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (n, D), or tokens (n, T, D) where `ndim` is 3, and counts (n, G), in `dtype`.

    Raises:
        ValueError: for another width or type.
    """
    features, counts = share.tensors["features"], share.tensors["counts"]
    if features.ndim != ndim or features.shape[-1] != config.feature_size or not features.is_floating_point():
        wanted = f"(N, {'T, ' * (ndim - 2)}{config.feature_size})"
        raise ValueError(f"features must be floating {wanted}, not {features.dtype} {tuple(features.shape)}")
    if counts.ndim != 2 or counts.shape[1] != config.genes:
        raise ValueError(f"counts must be (N, {config.genes}), not {tuple(counts.shape)}")
    return features.to(dtype), counts.to(dtype)


def _count(errors: torch.Tensor) -> torch.Tensor:
    return torch.full((), len(errors), device=errors.device)
