"""The plain baseline: median-total normalisation, log1p, principal components; sparse from end to end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cosmic_ray.errors import JobError

if TYPE_CHECKING:
    import torch
    from scipy.sparse import csr_matrix

    from cosmic_ray.models.transcriptome import TranscriptomeSpec
    from cosmic_ray.transcriptome.fitted import Cells, Report
    from cosmic_ray.transcriptome.job import FitTranscriptome

_BATCH = 4096


def fit_pca(
    job: FitTranscriptome, train: Cells, val: Cells, report: Report
) -> tuple[TranscriptomeSpec, dict[str, torch.Tensor], dict[str, Any]]:
    """Fit; the spec and weights of the encoder, and the share of the variance that the components hold.

    Raises:
        JobError: for more components than there are cells or genes.
    """
    import torch
    from sklearn.decomposition import PCA

    from cosmic_ray.models.transcriptome import TranscriptomeSpec

    most = min(train.counts.shape)
    if job.latent > most:
        raise JobError("latent", job.latent, f"{len(train)} cells of {train.counts.shape[1]} genes have {most} at most")
    target = float(np.median(train.totals[train.totals > 0])) if (train.totals > 0).any() else 1.0
    found = PCA(job.latent, svd_solver="covariance_eigh").fit(normalised(train, target))
    metrics = {"train/explained_variance": float(found.explained_variance_ratio_.sum())}
    if len(val):
        metrics["val/explained_variance"] = _explained(found, normalised(val, target))
    report({"epoch": 1, **metrics})
    weights = {"center": found.mean_, "axes": found.components_}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array, np.float32)) for name, array in weights.items()}
    spec = TranscriptomeSpec("pca", train.counts.shape[1], job.latent, target_total=target)
    return spec, tensors, {**metrics, "target_total": target}


def normalised(cells: Cells, target: float) -> csr_matrix:
    """log1p of the counts scaled to a total of `target` a cell: CSR float64; an empty cell stays empty."""
    from scipy.sparse import csr_matrix

    scale = np.divide(target, cells.totals, out=np.zeros(len(cells)), where=cells.totals > 0)
    scaled = csr_matrix(cells.counts, dtype=np.float64, copy=True)
    scaled.data *= np.repeat(scale, np.diff(scaled.indptr))
    return scaled.log1p()


def _explained(found: Any, values: csr_matrix) -> float:
    """1 - squared distance from the components' plane / squared distance from the mean of `train`."""
    inside = around = 0.0
    for start in range(0, values.shape[0], _BATCH):
        centred = values[start : start + _BATCH].toarray() - found.mean_
        inside += float(((centred @ found.components_.T) ** 2).sum())
        around += float((centred**2).sum())
    return inside / around if around else 0.0
