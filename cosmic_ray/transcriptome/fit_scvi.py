"""scVI by scvi-tools' own trainer: what it is told, what it says after each epoch, and its encoder in plain torch."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmic_ray.errors import CosmicError

if TYPE_CHECKING:
    import anndata
    import lightning.pytorch as pl
    import torch

    from cosmic_ray.models.transcriptome import TranscriptomeSpec
    from cosmic_ray.transcriptome.fitted import Cells, Report
    from cosmic_ray.transcriptome.job import FitTranscriptome

_BATCH = "batch"
_METRICS = {
    "train/reconstruction": "reconstruction_loss_train",
    "train/kl": "kl_local_train",
    "train/negative_elbo": "elbo_train",
    "val/reconstruction": "reconstruction_loss_validation",
    "val/kl": "kl_local_validation",
    "val/negative_elbo": "elbo_validation",
}
"""Ours -> scvi-tools' (its `elbo` is the negative one). Means over cells, in nats."""


def fit_scvi(
    job: FitTranscriptome, train: Cells, val: Cells, report: Report
) -> tuple[TranscriptomeSpec, dict[str, torch.Tensor], dict[str, Any]]:
    """Fit, reporting after each epoch; the spec and weights of its encoder, and the last metrics.

    Cells without a count in the chosen genes are left out. `val` is looked at after each epoch and changes nothing:
    not the weights, not the random numbers.

    Raises:
        CosmicError: where the loss is no number any more, or there is nothing to fit on.
    """
    import torch

    train, val, without = train.found(), val.found(), len(train) - len(train.found())
    if len(train) < 2:
        raise CosmicError(f"{len(train)} cells have a count in the chosen genes: nothing to fit on")
    torch.set_num_threads(job.cpus)
    model = fitted_model(job, train, val, report)
    weights = encoder_weights(model.module.state_dict(), job.scvi.layers)
    last = {key: float(model.history[name].iloc[-1, 0]) for key, name in _METRICS.items() if name in model.history}
    return spec_of(job, train.counts.shape[1]), weights, {**last, "cells_without_counts": without}


def fitted_model(job: FitTranscriptome, train: Cells, val: Cells, report: Report) -> Any:
    """scvi-tools' `SCVI`, fitted."""
    import scvi
    from lightning.fabric.utilities.seed import log as seed_log

    for noisy in (logging.getLogger("lightning.pytorch"), logging.getLogger("lightning.fabric"), seed_log):
        noisy.setLevel(logging.ERROR)
    scvi.settings.verbosity = logging.ERROR
    scvi.settings.seed = job.seed
    adata = _adata(train, val)
    watch = _watch(job, report)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as scratch:
        warnings.simplefilter("ignore")  # advice on data workers, small last batches and the like
        scvi.model.SCVI.setup_anndata(adata, batch_key=_BATCH)
        model = scvi.model.SCVI(adata, n_hidden=job.scvi.hidden, n_latent=job.latent, n_layers=job.scvi.layers)
        here = [np.arange(len(train)), np.arange(len(train), len(train) + len(val))]
        try:
            model.train(
                max_epochs=job.scvi.epochs,
                batch_size=job.scvi.batch_size,
                early_stopping=False,
                accelerator="gpu" if job.gpus else "cpu",
                devices=1,
                check_val_every_n_epoch=1 if len(val) else None,
                # BatchNorm has no statistics of a last batch of one cell.
                datasplitter_kwargs={"external_indexing": here, "drop_last": len(train) % job.scvi.batch_size == 1},
                plan_kwargs={"lr": job.scvi.lr},
                callbacks=[watch],
                enable_progress_bar=False,
                default_root_dir=scratch,
            )
        except ValueError as error:
            # torch's distributions refuse NaN before there is a loss.
            if "nan" not in str(error):
                raise
            raise diverged(watch.epoch) from None
    return model


def diverged(epoch: int) -> CosmicError:
    """The error of a loss that is no number."""
    remedy = "lower scvi.lr, or look for outliers among the counts"
    return CosmicError(f"the loss is no number any more in epoch {epoch} ({remedy})")


def _watch(job: FitTranscriptome, report: Report) -> Any:
    """A callback that reports each epoch, ends a fit whose loss is no number, and keeps `val` from changing it."""
    import lightning.pytorch as pl
    import torch

    class Watch(pl.Callback):
        epoch = 1

        def on_train_epoch_start(self, trainer: pl.Trainer, *_: object) -> None:
            self.epoch = trainer.current_epoch + 1

        def on_train_batch_end(self, trainer: pl.Trainer, module: object, outputs: Any, *_: object) -> None:
            if not torch.isfinite(outputs["loss"]):
                raise diverged(self.epoch)
            self._random = torch.get_rng_state(), torch.cuda.get_rng_state_all()

        def on_train_epoch_end(self, trainer: pl.Trainer, *_: object) -> None:
            # `val` was looked at in between: its sampling, and even making its loader, draws random numbers.
            torch.set_rng_state(self._random[0])
            torch.cuda.set_rng_state_all(self._random[1])
            have = trainer.callback_metrics
            report({"epoch": self.epoch, **{key: float(have[name]) for key, name in _METRICS.items() if name in have}})

    return Watch()


def _adata(train: Cells, val: Cells) -> anndata.AnnData:
    """Both parts as scvi-tools takes them. A batch that `train` lacks is decoded as its largest one."""
    import anndata
    import pandas as pd
    from scipy.sparse import vstack

    largest = int(np.bincount(train.codes).argmax())
    codes = np.concatenate([train.codes, np.where(val.codes < 0, largest, val.codes)])
    obs = pd.DataFrame({_BATCH: pd.Categorical(codes)}, index=[str(row) for row in range(len(codes))])
    return anndata.AnnData(vstack([train.counts, val.counts], format="csr"), obs=obs)


def spec_of(job: FitTranscriptome, genes: int) -> TranscriptomeSpec:
    """What the encoder of a job is built from."""
    from cosmic_ray.models.transcriptome import TranscriptomeSpec

    return TranscriptomeSpec("scvi", genes, job.latent, job.scvi.hidden, job.scvi.layers)


def encoder_weights(state: Mapping[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """The weights of `models.transcriptome.ScviEncoder` out of those of scvi-tools' `VAE`."""
    names = {f"mean.{name}": f"z_encoder.mean_encoder.{name}" for name in ("weight", "bias")}
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    for layer in range(layers):
        theirs = f"z_encoder.encoder.fc_layers.Layer {layer}"
        names |= {f"layers.{3 * layer}.{name}": f"{theirs}.0.{name}" for name in ("weight", "bias")}
        names |= {f"layers.{3 * layer + 1}.{name}": f"{theirs}.1.{name}" for name in norm}
    return {ours: state[name].detach().cpu().clone() for ours, name in names.items()}
