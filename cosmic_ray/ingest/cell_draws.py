"""What a cell's expression is drawn with: a function of (seed, cell id, sample, purpose), whatever the batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cosmic_ray.ingest import keyed


@dataclass(frozen=True)
class CellDraws:
    """The random numbers of one sample of some cells, as `models.img2seq.Draws` asks for them."""

    seed: int
    keys: torch.Tensor
    """int64 (N,), of `cell_noise.cell_keys`."""
    sample: int = 0
    """Which sample of each cell."""

    def normal(self, purpose: str, count: int) -> torch.Tensor:
        """Standard normal float32 (N, count), on the device of `keys`."""
        return keyed.normal(self.seed, self.keys, self._purpose(purpose), count)

    def negative_binomial(self, purpose: str, mean: torch.Tensor, dispersion: torch.Tensor) -> torch.Tensor:
        """Counts float32 (N, G) of `mean` (N, G) and variance mean + mean**2 / dispersion, `dispersion` (G,).

        Each cell has a NumPy generator (Philox) of its own, on the CPU.
        """
        n = dispersion.double().cpu().numpy()
        found = np.empty(mean.shape, np.float32)
        words = keyed.bits(self.seed, self.keys, self._purpose(purpose), 4).cpu().numpy().astype(np.uint64)
        for cell, (row, mu) in enumerate(zip(words, mean.double().cpu().numpy(), strict=True)):
            key = [int(row[0] << np.uint64(32) | row[1]), int(row[2] << np.uint64(32) | row[3])]
            generator = np.random.Generator(np.random.Philox(key=key))
            found[cell] = generator.poisson(generator.gamma(n, mu / n))
        return torch.from_numpy(found).to(mean.device)

    def _purpose(self, purpose: str) -> str:
        return f"img2seq {purpose} {self.sample}"
