"""`train-img2seq`: from a nucleus's features to its cell's expression."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from cosmic_ray.config import Config, Uri
from cosmic_ray.output import claim
from cosmic_ray.training.base import TrainingJob
from cosmic_ray.training.settings import Count, Tracking

if TYPE_CHECKING:
    from cosmic_ray.training.img2seq_stage import Img2SeqStage, RegressionStage

REGRESSION = "regression"
"""Folder of the first stage of `recipe: paper`, below `out`."""

PAPER: dict[str, Any] = {
    "global_batch": 32,
    "epochs": 10.0,
    "optim": {"lr": 1e-4, "lr_rule": "fixed", "betas": (0.9, 0.999), "weight_decay": 0.0, "clip": None},
    "schedule": {"kind": "constant", "warmup": 0.0},
    "ema": None,
}
"""App. A: Adam at 1e-4, batch 32, 10 epochs of the second stage; no schedule, average, decay or clipping is stated."""

BETTER: dict[str, Any] = {
    "optim": {"lr": 2e-3, "lr_rule": "sqrt", "betas": (0.9, 0.99), "weight_decay": 0.1},
    "ema": 0.999,
}


class Model(Config):
    """The network."""

    preset: Literal["tiny", "small", "base", "large"] = "base"
    """Size of `better`: width 64, 256, 512 or 1024 with 16, 64, 128 or 256 gene programs, for minutes on two cores, for
    some thousand cells, for some ten thousand, for more. `paper` has one size."""

    counts: Literal["normalised", "negative binomial"] = "normalised"
    """What is modelled: log1p of expression normalised to the training cells' median total; or raw counts, as negative
    binomials with each cell's total as offset (`better` alone; genes are then independent given the image)."""

    hidden: Count | None = None
    """Another width than the preset's; of `paper` that of the denoiser, 2048."""

    feature_noise: float = Field(1.0, ge=0)
    """Of `better`: standard deviation of the noise that training adds to each standardised feature, as a ridge does
    against learning by heart. Less for more cells."""

    programs: Count | None = None
    """Another number of gene programs than the preset's; fewer are taken where there are fewer genes or cells."""


class Regression(Config):
    """The first stage of `recipe: paper`: the FM's last block and a linear layer to all genes."""

    epochs: float = Field(30.0, gt=0)
    """Passes over the training cells (App. A)."""

    steps: int | None = Field(None, ge=1)
    """Optimiser steps, in place of `epochs`."""


class Img2SeqTracking(Tracking):
    """MLflow: one run for this job, however often it is interrupted, and the registered model."""

    register_as: str | None = "img2seq"
    """Name of the registered model; null registers none."""


class TrainImg2Seq(TrainingJob):
    """Train a model that tells a cell's expression, all genes, from the morphology FM's features of its nucleus.

    Below `out`: `checkpoints/`, `model/` (as `cosmic_ray.load_model` takes it), `metrics.jsonl`; of `recipe: paper`
    also `regression/`, the run of its first stage. Trains on the split's `train`; reports `val`, and by it sets how
    wide the intervals are; never sees `test`. The FM's features are read, never computed: `embed` makes them once.
    """

    kind: ClassVar[str] = "train-img2seq"
    recipes = {"paper": PAPER, "better": BETTER}

    cells: Uri
    """URI of the cell store."""

    features: Uri
    """URI of what `embed` made of the cell store with the morphology FM: embeddings; for `recipe: paper` the tokens
    that enter its last block (`output: tokens`)."""

    model: Model = Model()
    """The network."""

    regression: Regression = Regression()
    """The first stage of `recipe: paper`."""

    epochs: float = Field(30.0, gt=0)
    """Passes over the training cells; of `recipe: paper` those of the second stage, 10."""

    global_batch: int = Field(128, ge=1)
    """Cells of one optimiser step, over all workers and micro-batches."""

    tracking: Img2SeqTracking | None = Img2SeqTracking()
    """MLflow; null does without."""

    @model_validator(mode="after")
    def _counts(self) -> TrainImg2Seq:
        if self.recipe == "paper" and self.model.counts != "normalised":
            raise ValueError("recipe 'paper' models normalised expression: use recipe: better for counts")
        return self

    def stage(self) -> Img2SeqStage:
        """See `TrainingJob`."""
        from cosmic_ray.training.img2seq_stage import Img2SeqStage

        return Img2SeqStage(self)

    def first(self) -> TrainImg2SeqRegression:
        """The first stage of `recipe: paper`, as a job of its own below `out`."""
        keys = {name: getattr(self, name) for name in self.model_fields_set}
        keys |= {"out": f"{self.out.rstrip('/')}/{REGRESSION}", **self.regression.model_dump()}
        if self.tracking:
            keys["tracking"] = self.tracking.model_copy(update={"register_as": None})
        return TrainImg2SeqRegression(**keys)

    def run(self) -> dict[str, Any]:
        """As `TrainingJob.run`; `recipe: paper` runs its first stage first. `coverage_90`: the share of values inside
        their 90 % interval, and `val_r`: the median over genes of Pearson's r, both over held-out cells."""
        if self.recipe == "paper":
            with claim(self) as output:
                if not output.done:
                    self.first().run()
        return super().run()


class TrainImg2SeqRegression(TrainImg2Seq):
    """The first stage of `recipe: paper`; `TrainImg2Seq` runs it."""

    kind: ClassVar[str] = "train-img2seq-regression"

    def stage(self) -> RegressionStage:
        """See `TrainingJob`."""
        from cosmic_ray.training.img2seq_stage import RegressionStage

        return RegressionStage(self)

    def run(self) -> dict[str, Any]:
        """As `TrainingJob.run`."""
        return TrainingJob.run(self)
