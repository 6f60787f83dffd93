"""`generate`: images of cells, expression of nuclei, or both in turn, by any number of workers."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from cosmic_ray.config import Config, Job, Uri
from cosmic_ray.output import claim


class Images(Config):
    """How images are sampled; null takes what the model says."""

    samples: int = Field(1, ge=1)
    """Images of each cell. Sample k is what the model gives for the job's `seed` + k."""

    guidance: float | None = Field(None, ge=0)
    """Guidance scale."""

    sampler: Literal["ddpm", "ddpm-time", "ddim", "dpm++2m", "dpm++2m-sde", "unipc"] | None = None
    """See `cosmic_ray.models.sampling`."""

    steps: int | None = Field(None, ge=1)
    """Steps of the sampler."""

    rows_per_group: int = Field(256, ge=1)
    """Images in a row group of the crop store that comes out: what a killed worker has to do again."""


class Expression(Config):
    """How expression is sampled and what of it is kept."""

    samples: int = Field(16, ge=1)
    """Draws for each crop."""

    level: float = Field(0.9, gt=0, le=0.99)
    """Probability with which a gene's value lies between the layers `lower` and `upper`."""

    keep_samples: bool = False
    """Whether the draws stay, as layers `sample_0`...: 4 bytes a crop, gene and draw."""


class Generate(Job):
    """Cells in, a crop store of images out (`seq2img`); crops in, AnnData out (`fm` and `img2seq`); or the cycle: with
    all three, the expression of the images that were just drawn.

    Images: a crop store with the columns `cell_id` and `sample`, at `out`, or of a cycle at `out`/images. Expression:
    `expression.h5ad` with the mean as X, layers `lower` and `upper`, and the lineage. A killed run goes on with the
    parts that are missing and ends with the same content, whatever the number of workers.
    """

    kind: ClassVar[str] = "generate"
    incidental: ClassVar[frozenset[str]] = frozenset({"workers", "cpus_per_worker", "gpus_per_worker", "tracking_uri"})

    cells: Uri | None = None
    """For images: URI of the cell store."""

    latents: Uri | None = None
    """For images: URI of its cells' latents, of the transcriptome encoder that `seq2img` was trained with."""

    seq2img: Uri | None = None
    """For images: a registered model (`models:/seq2img@candidate`), or the URI of a model folder."""

    crops: Uri | None = None
    """For expression, where no images are drawn first: URI of a crop store, or of a cell store with images."""

    fm: Uri | None = None
    """For expression: the morphology FM that `img2seq` was trained with."""

    img2seq: Uri | None = None
    """For expression: a registered model, or the URI of a model folder."""

    split: Uri | None = None
    """URI of a split of the cells, or of the crops."""

    part: Literal["train", "val", "test"] | None = None
    """Only this part of the split; null takes all."""

    images: Images = Images()
    """How images are sampled."""

    expression: Expression = Expression()
    """How expression is sampled."""

    seed: int = 0
    """Decides every draw, with the cell's id; another seed is another round of generation."""

    batch_size: int = Field(64, ge=1)
    """Cells on a device at once."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the image network's forward; `bfloat16` is for accelerators."""

    workers: int | None = Field(None, ge=1)
    """Processes that hold the models; by default as many as the cluster's accelerators, or else its CPUs, allow."""

    cpus_per_worker: int = Field(1, ge=1)
    """CPUs of a worker."""

    gpus_per_worker: float | None = Field(None, ge=0)
    """Accelerators of a worker; by default 1 where the cluster has any."""

    tracking_uri: Uri | None = None
    """Where registered models are; MLFLOW_TRACKING_URI by default, else `sqlite:///runs/mlflow.db`."""

    @model_validator(mode="after")
    def _one_direction(self) -> Generate:
        if not (self.seq2img or self.img2seq):
            raise ValueError("give seq2img, for images; img2seq, for expression; or both, for the cycle")
        if self.seq2img and not (self.cells and self.latents):
            raise ValueError("seq2img draws images of cells: give cells and latents")
        if self.img2seq and not self.fm:
            raise ValueError("img2seq takes features of the morphology FM: give fm")
        if self.img2seq and bool(self.crops) == bool(self.seq2img):
            raise ValueError("give crops, or seq2img to draw them first, and not both")
        if (self.part is None) != (self.split is None):
            raise ValueError("split and part go together")
        if not self.seq2img and (self.cells or self.latents):
            raise ValueError("cells and latents are for seq2img")
        return self

    def check(self) -> None:
        """Stores, split and models are there and fit each other, as far as that is known before Ray is up."""
        from cosmic_ray.inference.generating import opened_inputs
        from cosmic_ray.registry.load import require_model

        for key, kind in (("seq2img", "seq2img"), ("fm", "encoder"), ("img2seq", "img2seq")):
            if uri := getattr(self, key):
                require_model(uri, key, self.tracking_uri, (kind,))
        opened_inputs(self)

    def untold_tracking(self) -> str | None:
        """See `Job`."""
        models = (self.seq2img, self.fm, self.img2seq)
        registered = any(uri and uri.startswith("models:") for uri in models)
        return "tracking_uri" if registered and self.tracking_uri is None else None

    def run(self) -> dict[str, Any]:
        """Generate what is not generated yet.

        Returns:
            `images` and `expression`: URI, rows, content hash of what there is; and of this run, how fast it was.

        Raises:
            JobError: where inputs do not fit each other, or the cluster is too small.
            DataError: where an input is missing or damaged, or is not the one that a killed run began with.
        """
        from cosmic_ray.inference.generating import generate

        with claim(self) as output:
            return generate(self, output)
