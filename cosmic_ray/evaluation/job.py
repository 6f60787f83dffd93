"""`evaluate`: generated images and expression of held-out cells against the real ones."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from cosmic_ray import storage
from cosmic_ray.config import Job, Uri
from cosmic_ray.errors import JobError
from cosmic_ray.evaluation.metrics.classifier import ClassifierSettings
from cosmic_ray.output import MANIFEST


class Evaluate(Job):
    """Judge generated images and expression by the real held-out cells that they were generated for (COSMIC, App. C).

    Below `out`: `metrics.parquet` (a row a figure and round), `genes.parquet` (a row a gene) and `manifest.json` with
    all results, the lineage, and every model behind them with what it was fitted on. Cells that any of these models has
    seen are refused. An evaluation of `test` leaves a record in `<split>/opened/`, and tells how many others did.
    """

    kind: ClassVar[str] = "evaluate"
    incidental: ClassVar[frozenset[str]] = frozenset({"device", "tracking_uri"})

    cells: Uri
    """URI of the cell store with the real cells."""

    split: Uri
    """URI of its split, by which every model behind the generated cells was fitted."""

    part: Literal["train", "val", "test"] = "val"
    """Which cells are judged. `test` is for the last evaluation, once every choice is made. `train` needs `seen`."""

    images: list[Uri] = []
    """URIs of crop stores of generated images (columns `cell_id` and `sample`), one a round of generation, all of the
    same cells. Error bars are over rounds: five in the paper, with 10 samples a cell."""

    fm: Uri | None = None
    """The encoder in whose embedding space images are compared: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or the
    URI of a model folder. `images` need it."""

    features: Uri | None = None
    """URI of embeddings of the real cells by `fm`; without, they are embedded here."""

    expression: Uri | None = None
    """URI of generated expression: an `expression.h5ad`, or the folder that holds it."""

    cycle: Uri | None = None
    """URI of expression generated from generated images of the same cells (expression -> image -> expression)."""

    truth: Uri | None = None
    """URI of the truth of simulated cells, `truth.parquet`: which genes follow the morphology, and how strongly. They
    are told by `cycle`, or else by `expression`."""

    cell_type: str = "cell_type"
    """Column of the cells with the cell type or line. Figures are given for each, too."""

    batch: str = "batch"
    """Column of the cells with the batch, within which correlations are taken."""

    classifier: ClassifierSettings = ClassifierSettings()
    """How the cell-type classifiers are trained: on real train cells alone, a fifth of them held out to choose the
    epoch. Images smaller than `size` stay as they are."""

    train_cells: Annotated[int, Field(ge=20)] = 10_000
    """At most so many train cells, drawn with `seed`, for classifiers, means of train and the search for copies."""

    seen: bool = False
    """Judge cells although a model behind them has seen them, or nobody knows; every figure then says so."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Of directions, draws and bootstraps."""

    device: str | None = None
    """`cpu`, `cuda`...; an accelerator by default, where there is one."""

    tracking_uri: Uri | None = None
    """Where a registered `fm` is; MLFLOW_TRACKING_URI by default, else `sqlite:///runs/mlflow.db`."""

    @model_validator(mode="after")
    def _consistent(self) -> Evaluate:
        if not (self.images or self.expression or self.cycle):
            raise ValueError("nothing to judge: give images, expression or cycle")
        if self.images and self.fm is None:
            raise ValueError("images are compared in the embedding space of an encoder: give fm")
        if self.part == "train" and not self.seen:
            raise ValueError("models have seen the train cells; to judge them all the same, say seen: true")
        if self.truth and not (self.cycle or self.expression):
            raise ValueError("truth is of genes: give cycle or expression")
        return self

    def untold_tracking(self) -> str | None:
        """See `Job`."""
        registered = self.fm is not None and self.fm.startswith("models:")
        return "tracking_uri" if registered and self.tracking_uri is None else None

    def check(self) -> None:
        """Every input is there, and the cells have the columns."""
        from cosmic_ray.registry.load import require_model
        from cosmic_ray.stores.cells import CellStore

        named = {"cells": self.cells, "split": self.split, "features": self.features}
        named |= {f"images.{place}": uri for place, uri in enumerate(self.images)}
        for key, uri in named.items():
            if uri is not None and not storage.exists(storage.join(uri, MANIFEST)):
                raise JobError(key, uri, "nothing is published there", "run the job that makes it first")
        for key in ("expression", "cycle", "truth"):
            if (uri := getattr(self, key)) is not None and not storage.exists(uri):
                raise JobError(key, uri, "nothing is there", "run the job that makes it first")
        if self.fm is not None:
            require_model(self.fm, "fm", self.tracking_uri)
        columns = CellStore.open(self.cells).manifest.columns
        for key in ("cell_type", "batch"):
            if columns.get(getattr(self, key)) != "string":
                known = ", ".join(name for name, kind in columns.items() if kind == "string")
                raise JobError(key, getattr(self, key), "the cells have no such column of text", f"they have {known}")

    def run(self) -> dict[str, Any]:
        """Judge what was generated, or find it judged.

        Returns:
            `scores` (those that `compare` knows), `images`, `expression`, `cycle`, `planted` (those that were asked
            for), `part`, `simulated`, `flaws` (what every figure has to say), `opened` (of `test`: evaluations so far).

        Raises:
            DataError: where an input is damaged or is of other cells, or a model has seen the cells that are judged.
        """
        from cosmic_ray.evaluation.evaluate import evaluate

        return evaluate(self)
