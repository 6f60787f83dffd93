"""`build-cells`: expression and images of the same cells, joined by cell id -> a cell store."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from cosmic_ray import storage
from cosmic_ray.config import Config, Job, Uri
from cosmic_ray.errors import JobError
from cosmic_ray.stores.manifest import CropSpec
from cosmic_ray.stores.writer import GROUPS_PER_SHARD, ROWS_PER_GROUP

_SHARD_BYTES = 2**27
_CROP_PX = 256


class Expression(Config):
    """Where the expression is, and what its columns are called."""

    uri: Uri
    """An `.h5ad` file (AnnData), or a folder of them: then their cells together, and each has the same genes."""

    pattern: str = "**/*.h5ad"
    """Of a folder: which files."""

    counts: str = "X"
    """Where the counts are: `X`, `raw` (AnnData's `raw.X`), or the name of a layer."""

    values: Literal["raw", "soft"] = "raw"
    """`raw`: counts; values that are no whole numbers are an error. `soft`: what a model made of counts (probabilities
    summed, say): any numbers >= 0, kept as float32, and never taken for counts later."""

    cell_id: str | None = "cell_id"
    """Column of `obs` with the id of a cell, under which its image is found; null: the names of `obs` themselves."""

    gene_id: str | None = None
    """Column of `var` with the id of a gene; null: the names of `var` themselves."""

    symbol: str | None = None
    """Column of `var` with the symbol of a gene; null where there is none."""

    batch: str | None = None
    """Column of `obs` with the batch: the experiment, plate, chip or slide."""

    cell_type: str | None = None
    """Column of `obs` with the cell type or line."""

    donor: str | None = None
    """Column of `obs` with the donor."""


class Images(Config):
    """Where the images are."""

    uri: Uri
    """`files`: a folder, or a `.zip`; `crops`: a crop store; `labels`: a label image."""

    holds: Literal["files", "crops", "labels"] = "files"
    """`files`: one file a cell, called `name`. `crops`: a crop store whose `crop_id` is the cell id. `labels`: an image
    whose pixels carry the number of the nucleus that they belong to; the crop is the mask, 255 inside."""

    name: str = "{cell_id}.jpg"
    """Of `files`: what the image of a cell is called, in any folder below `uri`."""

    label: str | None = None
    """Of `labels`: column of `obs` with the number of a cell's nucleus."""

    crop_px: Annotated[int, Field(ge=8, le=4096)] | None = None
    """Height and width in px: files of another size are rejected, and nuclei that do not fit. By default 256. Crops of
    a crop store are taken as they are."""

    channels: Annotated[tuple[str, ...], Field(min_length=1)] = ("DNA",)
    """Names of the channels of `files`, in their order there; a file with more or fewer is rejected. A crop store has
    its own."""

    pixel_size_um: Annotated[float, Field(gt=0)] | None = None
    """Micrometres a pixel; unknown by default."""

    @field_validator("name")
    @classmethod
    def _names_the_cell(cls, name: str) -> str:
        if name.count("{cell_id}") != 1 or re.search(r"[{}]", name.replace("{cell_id}", "")):
            raise ValueError("needs {cell_id} once, and no other braces")
        return name

    @model_validator(mode="after")
    def _consistent(self) -> Images:
        if (self.label is None) == (self.holds == "labels"):
            raise ValueError("`label` is for `holds: labels`, which needs it")
        if self.holds == "crops" and self.crop_px is not None:
            raise ValueError("`crop_px` is not for a crop store: its crops are taken as they are")
        return self

    @property
    def spec(self) -> CropSpec:
        """What every image of `files` and `labels` is."""
        side = self.crop_px or _CROP_PX
        channels = self.channels if self.holds == "files" else ("mask",)
        return CropSpec(channels=channels, height=side, width=side)


class CellQuality(Config):
    """Which cells and genes stay (COSMIC, appendix B). Cells are looked at first, then genes over the cells that stay.
    What goes is listed; it does not count towards `max_rejected_share`."""

    min_genes: Annotated[int, Field(ge=0)] = 500
    """A cell with fewer genes found goes."""

    max_mito_share: Annotated[float, Field(gt=0, le=1)] | None = 0.2
    """A cell with a larger share of its counts in mitochondrial genes goes (the paper says "high"; the number is ours).
    Null: not looked at. Without a mitochondrial gene among the genes nothing goes, and the results say so."""

    mito: str = r"^(MT|mt|Mt)-"
    """A regular expression for mitochondrial genes, searched in the symbol, or the id where there is none."""

    min_cells: Annotated[int, Field(ge=0)] = 5
    """A gene found in fewer cells goes."""

    @field_validator("mito")
    @classmethod
    def _is_a_pattern(cls, mito: str) -> str:
        try:
            re.compile(mito)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return mito


class BuildCells(Job):
    """Join expression and images of the same cells by cell id, and publish them as a cell store.

    Below `out`: `expression/`, `crops/` (a crop store, where there are images), `cells.parquet`, `genes.parquet`,
    `manifest.json`, and `rejected.parquet`: every cell, gene and image left out, and why. Killed at any point and run
    again, it goes on; the content hash is the same at any chunk size, and wherever the inputs lie.
    """

    kind: ClassVar[str] = "build-cells"
    incidental: ClassVar[frozenset[str]] = frozenset({"chunk_cells", "max_rejected_share", "threads"})

    expression: Expression
    """The expression."""

    images: Images | None = None
    """The images; without, cells of a store have none (morphology known as numbers is in the columns of `obs`)."""

    quality: CellQuality = CellQuality()
    """Which cells and genes stay."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Decides the order of the store's rows, with the cell ids. From a crop store, the one that it was built with is
    fastest."""

    rows_per_group: Annotated[int, Field(ge=1)] = ROWS_PER_GROUP
    """Cells a row group, the unit that is read."""

    max_rejected_share: Annotated[float, Field(ge=0, le=1)] = 0.2
    """The job ends with an error where more than this share of the cells is at fault (no image, a doubled id, NaN...),
    or more than this share of the images belongs to no cell."""

    chunk_cells: Annotated[int, Field(ge=1)] = 2048
    """Cells read at a time."""

    threads: Annotated[int, Field(ge=1)] = 8
    """Images read at a time."""

    def check(self) -> None:
        """Check that the sources are there."""
        for key, source in (("expression", self.expression), ("images", self.images)):
            if source is not None and not storage.exists(source.uri):
                raise JobError(f"{key}.uri", source.uri, "nothing is there")

    def groups_per_shard(self, spec: CropSpec | None) -> int:
        """Row groups that are put together at a time: 8, or fewer where their images exceed 128 MiB."""
        nbytes = spec.nbytes if spec else 1
        return min(GROUPS_PER_SHARD, max(1, _SHARD_BYTES // (self.rows_per_group * nbytes)))

    def run(self) -> dict[str, Any]:
        """Build the store, or find it built.

        Returns:
            `out`, `rows`, `genes`, `content_hash`, `simulated`, `values`, `images` (bool), and of what was read:
            `cells`, `cells_rejected`, `genes_rejected`, `images_rejected` (reason -> count), `mitochondrial_genes`.

        Raises:
            DataError: where the expression is not what `expression` says of it.
            CosmicError: where more is rejected than `max_rejected_share`.
        """
        from cosmic_ray.cells.build import build

        return build(self)
