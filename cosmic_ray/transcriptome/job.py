"""`fit-transcriptome`: an encoder of expression, fitted on a split's `train` alone, and the latents of all cells."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from cosmic_ray import storage
from cosmic_ray.config import Config, Job, Uri
from cosmic_ray.errors import JobError, NotFoundError
from cosmic_ray.stores.cells import CellStore

Count = Annotated[int, Field(ge=1)]


class Scvi(Config):
    """scVI (Lopez et al. 2018) as scvi-tools trains it: zero-inflated negative binomial, Adam, and the weight of the KL
    term rising over 400 epochs, so that it ends 50 of them at 0.125. The paper (appendix A) states what is here by
    default, but for layers, batch and rate, which are scvi-tools'. There is no early stopping.

    The batch is seen by the decoder alone. So the latent of a cell depends on its counts and on nothing else; one of a
    batch that `train` does not hold needs no special case. (Only for the loss on `val`, such cells are decoded as the
    largest batch of `train`.)
    """

    hidden: Count = 128
    """Width of the hidden layers of encoder and decoder."""

    layers: Count = 1
    """Hidden layers of each."""

    epochs: Count = 50
    """Passes over the cells."""

    batch_size: Annotated[int, Field(ge=2)] = 128
    """Cells a step."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate."""


class Obsm(Config):
    """Where a ready embedding is: UCE, scGPT, scFoundation, or any other."""

    adata: Uri
    """An `.h5ad` file."""

    key: str
    """Key of its `obsm`: numbers (cells, D)."""

    cell_id: str | None = None
    """Column of its `obs` with the id of a cell; null: the names of `obs`."""


class Tracking(Config):
    """MLflow: one run for this job, and the registered model."""

    uri: Uri | None = None
    """Tracking URI; by default MLFLOW_TRACKING_URI, else `sqlite:///runs/mlflow.db` in the working directory."""

    register_as: str | None = "transcriptome-encoder"
    """Name of the registered model; null registers none."""

    alias: str = "candidate"
    """Alias of the version that this run registers."""


class FitTranscriptome(Job):
    """Fit a transcriptome encoder. Below `out`: `model/`, and `latents/`, embeddings of all cells of the store.

    It runs in one process (scVI has BatchNorm, and knows no workers). A killed run is done again, from the beginning.
    """

    kind: ClassVar[str] = "fit-transcriptome"
    incidental: ClassVar[frozenset[str]] = frozenset({"gpus", "tracking"})

    cells: Uri
    """URI of the cell store."""

    split: Uri | None = None
    """URI of its split, or of its crops': genes are chosen and the encoder is fitted on `train` alone. Not for `obsm`,
    with which nothing is fitted."""

    method: Literal["scvi", "pca", "obsm"] = "scvi"
    """`scvi`: on raw counts. `pca`: the plain baseline: each cell scaled to the median total of `train`, log1p,
    principal components; of raw or soft values. `obsm`: a ready embedding, joined by cell id; it leaves `latents/`
    alone, and their lineage says that what it was fitted on is unknown."""

    genes: Count = 1024
    """Highly variable genes that go in (Seurat v3's, chosen within each batch); where there are no more, all."""

    batch: str | None = "batch"
    """Column of the cells with their batch; null: they are all of one."""

    latent: Count = 64
    """Width of the latent."""

    scvi: Scvi = Scvi()
    """What only `scvi` takes."""

    obsm: Obsm | None = None
    """What only `obsm` takes."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Another seed, another fit. On CPUs the same seed gives the same latents, with the same `cpus`."""

    cpus: Count = 1
    """CPUs, and threads."""

    gpus: Annotated[float, Field(ge=0)] | None = None
    """Accelerators; by default 1 for `scvi` where the cluster has any. On one, equal seeds agree but for rounding."""

    tracking: Tracking | None = Tracking()
    """MLflow. Null tracks and registers nothing."""

    @model_validator(mode="after")
    def _consistent(self) -> FitTranscriptome:
        if (self.method == "obsm") != (self.obsm is not None):
            raise ValueError("`obsm` is for `method: obsm`, which needs it")
        if (self.method == "obsm") != (self.split is None):
            raise ValueError("`split` is needed to fit; with `method: obsm` nothing is fitted, so it takes none")
        return self

    def check(self) -> None:
        """The store, the split and the batch column are there, and the store's values are what the method needs."""
        try:
            store = CellStore.open(self.cells)
        except NotFoundError as error:
            raise JobError("cells", self.cells, error.problem, error.remedy) from None
        self.require(store)
        if self.split is not None and not storage.exists(storage.join(self.split, "manifest.json")):
            raise JobError("split", self.split, "no split is published here", "run its job first")
        if self.obsm is not None and not storage.exists(self.obsm.adata):
            raise JobError("obsm.adata", self.obsm.adata, "nothing is there")

    def require(self, store: CellStore) -> None:
        """Refuse a store that lacks the batch column, or whose values are not what the method needs.

        Raises:
            JobError: naming the key.
        """
        if self.method == "obsm":
            return
        if self.batch is not None and self.batch not in store.manifest.columns:
            known = ", ".join(store.manifest.columns)
            raise JobError("batch", self.batch, "the cells have no such column", f"they have {known}; null: one batch")
        if self.method == "scvi" and store.manifest.values != "raw":
            problem = f"scVI needs raw counts; {store.uri} holds {store.manifest.values} values"
            raise JobError("method", self.method, problem, "use pca, or build the cells from raw counts")

    def run(self) -> dict[str, Any]:
        """Fit, or find it fitted.

        Returns:
            `model` (URI, where there is one), `latents` (URI), `rows`, `width`, `content_hash` (of the latents),
            `genes`, `cells_fitted`, and the last metrics.

        Raises:
            JobError: where the store, the split and the keys do not go together.
            DataError: where an input is damaged, or not what the job says of it.
            CosmicError: where the loss is no number any more.
        """
        from cosmic_ray.transcriptome.run import run

        return run(self)
