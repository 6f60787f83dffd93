"""What simulated paired cells are made of: types, morphological factors, the transcriptome, and the planted genes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cosmic_ray.config import Config
from cosmic_ray.simulation.spec import NonNegative, Optics, Positive, Share

FACTORS = ("size", "elongation", "lobes", "light", "grain", "contrast", "foci")
"""What a simulated nucleus is decided by, each a number u = mean of the type + z; z has the same standard normal law,
cut at +-2.5, in every type, and is independent between factors. `morphology.py` states what u does to the nucleus.
`size`, `elongation` and `lobes` show in area and shape; `grain`, `contrast` and `foci` in texture alone."""

Factor = Literal["size", "elongation", "lobes", "light", "grain", "contrast", "foci"]
Function = Literal["linear", "u-shaped", "threshold"]
Strength = Annotated[float, Field(gt=0, lt=0.95)]
CROP_MARGIN_PX = 2


class PairedType(Config):
    """One cell type: where its factors lie. Overlap of the types decides how well images tell them apart."""

    weight: Positive = 1.0
    """Share of the cells, relative to the other types."""
    means: dict[Factor, Annotated[float, Field(ge=-2.5, le=2.5)]] = {}
    """Mean of u of each factor, in standard deviations within a type; 0 where it is not named."""


PAIRED_TYPES: dict[str, PairedType] = {
    "large": PairedType(means={"size": 1.9, "grain": -1.0, "foci": -1.0}),
    "small": PairedType(means={"size": -2.0, "contrast": 0.9, "elongation": -0.8}),
    "spindle": PairedType(means={"elongation": 2.0, "foci": 1.3, "contrast": -0.7}),
    "coarse": PairedType(means={"lobes": 1.4, "grain": 2.0, "contrast": 0.9, "elongation": -0.9}),
}


class Transcriptome(Config):
    """Counts: Poisson-gamma (negative binomial) around a cell's own rates, then dropout."""

    genes: Annotated[int, Field(ge=2, le=20_000)] = 200
    """Number of genes: planted, their controls, and background genes that follow no factor of any kind."""
    counts_per_gene: Annotated[float, Field(gt=0, le=200)] = 6.0
    """Counts of a cell of median depth, before dropout, divided by the number of genes."""
    gene_sd: Annotated[float, Field(ge=0, le=2)] = 0.8
    """Standard deviation of the log mean between genes."""
    library_cv: Annotated[float, Field(ge=0, le=2)] = 0.35
    """Coefficient of variation of the depth between cells (log-normal)."""
    dispersion: Annotated[float, Field(ge=0.02, le=5)] = 0.25
    """Median phi of the genes: the variance of a count of mean m is m + phi m^2; between genes its log has sd 0.3."""
    dropout: NonNegative = 0.3
    """A count of expected value m is lost with probability dropout / (dropout + m) (Michaelis-Menten, as in M3Drop)."""
    type_sd: NonNegative = 0.35
    """Standard deviation of a gene's log mean between cell types."""
    batch_sd: NonNegative = 0.15
    """Standard deviation of a gene's log mean between batches."""
    donor_sd: NonNegative = 0.1
    """Standard deviation of a gene's log mean between donors."""


class Effect(Config):
    """How a planted gene's log expression follows one factor z within its type.

    `linear`: z. `u-shaped`: z^2, which no linear model of z sees. `threshold`: tanh(3 (z - 0.5)), a soft step.
    """

    factor: Factor
    """The factor."""
    function: Function = "linear"
    """What the log expression is proportional to, once it has mean 0 and variance 1 within a type."""


EFFECTS: dict[str, Effect] = {
    "size": Effect(factor="size"),
    "elongation": Effect(factor="elongation"),
    "grain": Effect(factor="grain"),
    "foci": Effect(factor="foci"),
    "contrast-threshold": Effect(factor="contrast", function="threshold"),
    "size-u-shaped": Effect(factor="size", function="u-shaped"),
}


class Planted(Config):
    """Planted genes: one for each effect, strength and replicate; and one control for each."""

    effects: dict[str, Effect] = EFFECTS
    """Name -> what such a gene follows."""
    strengths: Annotated[tuple[Strength, ...], Field(min_length=1)] = (0.15, 0.3, 0.45, 0.6)
    """Correlation between the noise-free function and log1p of the depth-normalised counts, within cell type and batch
    (mean over these groups)."""
    replicates: Annotated[int, Field(ge=2, le=1000, multiple_of=2)] = 2
    """Genes of each effect and strength: half rise with the function and half fall, so that depth tells nothing."""

    min_mean: Positive = 4.0
    """Least mean count of a planted gene and its control, before dropout: what is hardly counted shows nothing."""

    @property
    def count(self) -> int:
        """Number of planted genes; there are as many controls."""
        return len(self.effects) * len(self.strengths) * self.replicates


class PairedImage(Config):
    """One nucleus' image: masked, 0 outside its outline and 1..255 inside, one intensity scale for all."""

    crop_px: Annotated[int, Field(ge=32, le=512)] = 64
    """Height and width, px."""
    pixel_size_um: Annotated[float, Field(gt=0.02, le=2)] = 0.52
    """Micrometres a pixel."""
    optics: Optics = Optics()
    """The microscope; `vignetting`, `tilt` and `background_gradient` are of fields and not used."""
    photons: Positive = 1.0e6
    """Mean photoelectrons of a nucleus."""
    read_noise: NonNegative = 1.6
    """Standard deviation of the camera's read noise, electrons."""
    stain_cv: Share = 0.05
    """Coefficient of variation of the staining between batches."""


class PairedSpec(Config):
    """Simulated paired cells, all told."""

    cells: Annotated[int, Field(ge=2, le=50_000)] = 2000
    """Number of cells."""
    cell_types: dict[str, PairedType] = PAIRED_TYPES
    """Cell types by name."""
    batches: Annotated[int, Field(ge=1, le=99)] = 3
    """Number of batches: gene effects and brightness differ between them."""
    donors: Annotated[int, Field(ge=1, le=99)] = 4
    """Number of donors: gene effects differ between them. Donor is independent of batch and type."""
    confounding: Share = 0.0
    """Probability that a cell comes from its type's own batch rather than from any; 0: batch is independent of type."""
    image: PairedImage = PairedImage()
    """The images."""
    transcriptome: Transcriptome = Transcriptome()
    """The counts."""
    planted: Planted = Planted()
    """The planted genes."""

    @model_validator(mode="after")
    def _enough_genes(self) -> PairedSpec:
        if not self.cell_types or not self.planted.effects:
            raise ValueError("needs one of cell_types and one of planted.effects at least")
        if 2 * self.planted.count > self.transcriptome.genes:
            raise ValueError(
                f"transcriptome.genes: {self.transcriptome.genes} genes do not hold {self.planted.count} planted ones "
                "and as many controls"
            )
        return self
