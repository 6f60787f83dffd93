"""`train-seq2img`: from a cell's latent to its nucleus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from cosmic_ray.config import Config, Uri
from cosmic_ray.training.base import TrainingJob
from cosmic_ray.training.settings import Tracking

if TYPE_CHECKING:
    from cosmic_ray.training.seq2img_stage import Seq2ImgStage

PAPER: dict[str, Any] = {
    "global_batch": 16,
    "optim": {"lr": 1.5e-4, "lr_rule": "fixed", "betas": (0.9, 0.999), "weight_decay": 0.01, "decay": "all",
              "clip": None},
    "schedule": {"kind": "constant", "warmup": 0.0},
    "ema": None,
    "sampling": {"guidance": 1.0, "sampler": "ddpm-time", "steps": 1000},
}  # fmt: skip
"""App. A: AdamW at 1.5e-4, batch 16, no schedule, average or clipping; sampled at guidance scale 1 in 1000 steps."""

BETTER: dict[str, Any] = {
    "optim": {"lr": 4e-4, "lr_rule": "sqrt", "betas": (0.9, 0.99), "weight_decay": 0.01},
    "ema": 0.999,
}


class Model(Config):
    """The network."""

    preset: Literal["tiny", "small", "base", "large"] = "large"
    """Side of the images in px: `tiny` 64, `small` and `base` 128, `large` 256. Of `better`, the network's size too;
    `paper` has one network for all."""

    condition_drop: float = Field(0.1, ge=0, lt=1)
    """Probability with which a training cell's latent is withheld, so that guidance has something to lean on."""


class Sampling(Config):
    """How the exported model samples where its user does not say otherwise."""

    guidance: float = Field(1.5, ge=0)
    """Guidance scale: 1 is the conditional model, more exaggerates what the latent says."""

    sampler: Literal["ddpm", "ddpm-time", "ddim", "dpm++2m", "dpm++2m-sde", "unipc"] = "unipc"
    """See `cosmic_ray.models.sampling`; `ddpm-time` is the published one."""

    steps: int = Field(12, ge=1)
    """Steps; a guided step takes two evaluations of the network."""


class Seq2ImgTracking(Tracking):
    """MLflow: one run for this job, however often it is interrupted, and the registered model."""

    register_as: str | None = "seq2img"
    """Name of the registered model; null registers none."""


class TrainSeq2Img(TrainingJob):
    """Train a diffusion model that draws a cell's nucleus from its latent.

    Below `out`: `checkpoints/`, `model/` (as `cosmic_ray.load_model` takes it), `metrics.jsonl`, `generated.png`.
    Trains on the split's `train`, reports `val`, and never sees `test`.
    """

    kind: ClassVar[str] = "train-seq2img"
    recipes = {"paper": PAPER, "better": BETTER}

    cells: Uri
    """URI of the cell store; its cells need images."""

    latents: Uri
    """URI of the cells' latents: the `latents` folder that `fit-transcriptome` left, or what `embed` made of the cell
    store with a transcriptome encoder."""

    model: Model = Model()
    """The network."""

    sampling: Sampling = Sampling()
    """How the exported model samples."""

    epochs: float = Field(100.0, gt=0)
    """Passes over the training cells."""

    global_batch: int = Field(64, ge=1)
    """Cells of one optimiser step, over all workers and micro-batches."""

    tracking: Seq2ImgTracking | None = Seq2ImgTracking()
    """MLflow; null does without."""

    @model_validator(mode="after")
    def _guidable(self) -> TrainSeq2Img:
        if self.model.condition_drop == 0 and self.sampling.guidance not in (0.0, 1.0):
            raise ValueError("guidance leans on training without latents: give model.condition_drop, or guidance 1")
        return self

    def stage(self) -> Seq2ImgStage:
        """See `TrainingJob`."""
        from cosmic_ray.training.seq2img_stage import Seq2ImgStage

        return Seq2ImgStage(self)
