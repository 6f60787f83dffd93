"""Transcriptome encoders as they are used: raw counts of a cell -> its latent, in plain torch.

They are fitted elsewhere (scvi-tools, scikit-learn) and need neither of them here. An encoder takes the counts of its
own genes, in its own order, and the cell's total; `encode` cuts both out of a sparse matrix of any genes.

No encoder sees the batch. scVI's has `encode_covariates=False` (its default, and the paper's): the batch enters the
decoder alone, so that a cell of a batch which no one has seen needs none, and gets the latent that its counts give it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

if TYPE_CHECKING:
    import numpy as np
    from scipy.sparse import csr_matrix

_SHOWN = 10


@dataclass(frozen=True)
class TranscriptomeSpec:
    """What decides an encoder, its genes and weights aside."""

    method: Literal["scvi", "pca"]
    genes: int
    """G, the genes that go in."""
    latent: int
    """D, width of the latent."""
    hidden: int = 128
    """scvi: width of the hidden layers."""
    layers: int = 1
    """scvi: hidden layers."""
    target_total: float = 1.0
    """pca: the total that every cell is scaled to: the median over the cells that it was fitted on."""

    @property
    def raw_counts(self) -> bool:
        """Whether whole numbers are needed; pca takes any values >= 0."""
        return self.method == "scvi"


class ScviEncoder(nn.Module):
    """The mean of scVI's q(z | x) (Lopez et al. 2018): log1p, then linear, batch norm and ReLU a layer, then linear."""

    def __init__(self, spec: TranscriptomeSpec):
        super().__init__()
        widths = [spec.genes, *[spec.hidden] * spec.layers]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            # eps is scvi-tools', from the first TensorFlow implementation.
            layers += [nn.Linear(before, after), nn.BatchNorm1d(after, eps=0.001), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.mean = nn.Linear(spec.hidden, spec.latent)

    def forward(self, counts: torch.Tensor, totals: torch.Tensor) -> torch.Tensor:
        """Raw counts float32 (N, G) -> latents float32 (N, D); `totals` are for `PcaEncoder`."""
        return self.mean(self.layers(counts.log1p()))


class PcaEncoder(nn.Module):
    """Principal components of log1p of counts that are scaled to one total a cell."""

    def __init__(self, spec: TranscriptomeSpec):
        super().__init__()
        self.target_total = spec.target_total
        self.register_buffer("center", torch.zeros(spec.genes))
        self.register_buffer("axes", torch.zeros(spec.latent, spec.genes))

    def forward(self, counts: torch.Tensor, totals: torch.Tensor) -> torch.Tensor:
        """Counts float32 (N, G) of cells whose `totals`, over all genes, are float32 (N, 1) -> float32 (N, D)."""
        scale = torch.where(totals > 0, self.target_total / totals, 0.0)  # an empty cell stays empty
        return ((counts * scale).log1p() - self.center) @ self.axes.T


def build_transcriptome(spec: TranscriptomeSpec) -> ScviEncoder | PcaEncoder:
    """The network of `spec`, its weights to be loaded: (counts (N, G), totals (N, 1)) -> (N, D), all float32."""
    return ScviEncoder(spec) if spec.method == "scvi" else PcaEncoder(spec)


def columns_of(wanted: Sequence[str], given: Sequence[str]) -> np.ndarray:
    """The place of each of the `wanted` genes among the `given`, which may stand in any order: int64 (len(wanted),).

    Raises:
        ValueError: naming the genes that are missing, or that stand twice.
    """
    import numpy as np

    place = {gene: column for column, gene in enumerate(given)}
    needed = set(wanted)
    if len(place) < len(given):
        seen: set[str] = set()
        twice = sorted({gene for gene in given if gene in needed and (gene in seen or seen.add(gene))})
        if twice:
            raise ValueError(f"{len(twice)} genes stand twice: {_listed(twice)}")
    if missing := [gene for gene in wanted if gene not in place]:
        raise ValueError(f"{len(missing)} of {len(wanted)} genes are missing: {_listed(missing)}")
    return np.array([place[gene] for gene in wanted], np.int64)


def encode(
    network: nn.Module,
    spec: TranscriptomeSpec,
    counts: csr_matrix,
    columns: np.ndarray,
    total_columns: np.ndarray | None = None,
    *,
    batch_size: int = 1024,
) -> np.ndarray:
    """The latents of cells; only `columns` of `batch_size` cells are dense at a time.

    Args:
        network: of `build_transcriptome`, in evaluation mode, on any device.
        spec: what it was built from.
        counts: (N, genes), raw counts (`spec.raw_counts`) or values >= 0, not normalised.
        columns: where the encoder's genes are: int64 (G,), see `columns_of`.
        total_columns: over which genes a cell's total is taken: int64; None: over all.
        batch_size: cells on the device at once.

    Returns:
        float32 (N, D).

    Raises:
        ValueError: for values that are negative, not finite, or no counts where counts are needed; and for latents that
            are not finite.
    """
    import numpy as np
    import scipy.sparse

    counts = scipy.sparse.csr_matrix(counts)
    device = next(iter(network.state_dict().values())).device
    found = np.empty((counts.shape[0], spec.latent), np.float32)
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for start in range(0, len(found), batch_size):
            rows = counts[start : start + batch_size]
            _require_values(rows.data, spec.raw_counts)
            over = rows if total_columns is None else rows[:, total_columns]
            totals = np.asarray(over.sum(axis=1), np.float32).reshape(-1, 1)
            dense = rows[:, columns].toarray().astype(np.float32, copy=False)
            latents = network(torch.from_numpy(dense).to(device), torch.from_numpy(totals).to(device))
            found[start : start + batch_size] = latents.float().cpu().numpy()
    if not np.isfinite(found).all():
        row = int(np.argmin(np.isfinite(found).all(axis=1)))
        raise ValueError(f"the latent of cell {row} is not finite: the model is damaged or diverged")
    return found


def _require_values(values: np.ndarray, raw_counts: bool) -> None:
    import numpy as np

    if not len(values):
        return
    if not np.isfinite(values).all() or values.min() < 0:
        raise ValueError("values are negative or not finite: expected counts")
    if raw_counts and values.dtype.kind == "f" and (values != np.rint(values)).any():
        raise ValueError("values are no whole numbers: this encoder takes raw counts, neither normalised nor logged")


def _listed(genes: Sequence[str]) -> str:
    return ", ".join(genes[:_SHOWN]) + (", ..." if len(genes) > _SHOWN else "")
