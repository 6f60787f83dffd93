"""img2seq as published: two objectives, trained one after the other: the regression, then its residual's diffusion."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from cosmic_ray.ingest import keyed
from cosmic_ray.models.diffusion import squared_error
from cosmic_ray.models.img2seq import Img2SeqConfig, normalised
from cosmic_ray.models.img2seq_paper import STEPS, PublishedImg2Seq
from cosmic_ray.training.img2seq import NAME, checked_inputs
from cosmic_ray.training.objective import Share, Sum


class _Stage:
    """What both stages have in common: `share.tensors`: "features", floating tokens (n, T, D); "counts" (n, G)."""

    phases = (NAME,)

    def __init__(self, config: Img2SeqConfig, statistics: Mapping[str, torch.Tensor], seed: int):
        """`seed` draws the initial weights; `statistics`: of `img2seq_statistics`; both equal on every rank."""
        torch.manual_seed(seed)
        self.config = config
        self.whole = PublishedImg2Seq(config)
        self.whole.total.copy_(statistics["total"])

    def blocks(self, name: str) -> list[nn.Module]:
        """None: the networks are flat."""
        return []

    def _inputs(self, share: Share) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens, and log1p values (n, G), in the network's dtype."""
        tokens, counts = checked_inputs(share, self.config, 3, self.whole.base.head.weight.dtype)
        return tokens, normalised(counts, self.whole.total.to(counts))


class RegressionObjective(_Stage):
    """Stage 1: squared error of the values, mean over genes; the FM's last block and the linear layer are trained."""

    def networks(self) -> Mapping[str, nn.Module]:
        """Stage 1 alone."""
        return {NAME: self.whole.base}

    def losses(self, networks: Mapping[str, nn.Module], share: Share, seed: int, phase: str) -> dict[str, Sum]:
        """`loss`."""
        tokens, values = self._inputs(share)
        error = squared_error(networks[NAME](tokens)[1], values)
        return {"loss": (error.sum(), torch.full((), len(error), device=error.device))}

    def metrics(self, networks: Mapping[str, nn.Module], share: Share, seed: int) -> dict[str, Sum]:
        """The same, as `error` too, in log1p."""
        found = self.losses(networks, share, seed, NAME)
        return {**found, "error": found["loss"]}


class ResidualObjective(_Stage):
    """Stage 2: squared error of the noise, mean over genes, at times drawn uniformly; stage 1 stays as it is."""

    def __init__(self, config: Img2SeqConfig, statistics: Mapping[str, torch.Tensor], seed: int):
        """As `_Stage`. Stage 1 is whatever `whole.base` is given."""
        super().__init__(config, statistics, seed)
        self.whole.base.requires_grad_(False)

    def networks(self) -> Mapping[str, nn.Module]:
        """Both stages, the first frozen."""
        return {NAME: self.whole}

    def losses(self, networks: Mapping[str, nn.Module], share: Share, seed: int, phase: str) -> dict[str, Sum]:
        """`loss`."""
        return self._sums(networks, share, seed, "")

    def metrics(self, networks: Mapping[str, nn.Module], share: Share, seed: int) -> dict[str, Sum]:
        """The same, at times and with noise that never change."""
        return self._sums(networks, share, seed, "held-out ")

    def _sums(self, networks: Mapping[str, nn.Module], share: Share, seed: int, purpose: str) -> dict[str, Sum]:
        tokens, values = self._inputs(share)
        time = keyed.bits(seed, share.positions, f"{purpose}time", 1)[:, 0] * STEPS >> 32
        noise = keyed.normal(seed, share.positions, f"{purpose}noise", self.config.genes).to(values.dtype)
        error = squared_error(networks[NAME](tokens, values, noise, time), noise)
        return {"loss": (error.sum(), torch.full((), len(error), device=error.device))}
