"""`semi-real`: real crops beside expression that is simulated from what is measured of them, over real counts."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from cosmic_ray import storage
from cosmic_ray.config import Config, Job, Uri
from cosmic_ray.errors import JobError
from cosmic_ray.simulation.paired_spec import Function, Strength
from cosmic_ray.simulation.spec import Positive

Measure = Literal[
    "area", "eccentricity", "solidity", "intensity", "intensity_cv", "roughness", "coarseness", "granularity", "pattern"
]


class MeasuredEffect(Config):
    """How a planted gene's log expression follows one measure of the crop; functions as of `simulate-cells`."""

    factor: Measure
    """The measure, as a normal score within its source; those of intensity and texture beyond what shape tells."""
    function: Function = "linear"
    """`linear`: z. `u-shaped`: z^2. `threshold`: tanh(3 (z - 0.5))."""


MEASURED_EFFECTS: dict[str, MeasuredEffect] = {
    "area": MeasuredEffect(factor="area"),
    "eccentricity": MeasuredEffect(factor="eccentricity"),
    "intensity-cv": MeasuredEffect(factor="intensity_cv"),
    "granularity": MeasuredEffect(factor="granularity"),
    "roughness-threshold": MeasuredEffect(factor="roughness", function="threshold"),
    "area-u-shaped": MeasuredEffect(factor="area", function="u-shaped"),
}


class RealCounts(Config):
    """Real raw counts, whose cells have no images here."""

    uri: Uri
    """An `.h5ad` file with raw counts in X, cells in rows."""
    cell_type: str = "cell_line"
    """Column of `obs` with the cell type."""
    batch: str = "batch"
    """Column of `obs` with the batch."""
    genes: Annotated[int, Field(ge=10)] = 1000
    """The genes with most counts are kept, so many."""


class PlantedInReal(Config):
    """Planted genes: one for each effect, strength and replicate; and one control for each."""

    effects: dict[str, MeasuredEffect] = MEASURED_EFFECTS
    """Name -> what such a gene follows."""
    strengths: Annotated[tuple[Strength, ...], Field(min_length=1)] = (0.15, 0.3, 0.45)
    """Correlation between the noise-free function and log1p of the depth-normalised counts, within cell type and batch
    (mean over these groups)."""
    replicates: Annotated[int, Field(ge=2, le=1000, multiple_of=2)] = 2
    """Genes of each effect and strength: half rise with the function and half fall."""
    min_mean: Positive = 8.0
    """Least mean count of a planted gene and its control in the real cells, before thinning."""

    @property
    def count(self) -> int:
        """Number of planted genes; there are as many controls."""
        return len(self.effects) * len(self.strengths) * self.replicates


class SemiReal(Job):
    """Semi-real pairs: real images, simulated expression. Each crop gets the counts of a real cell, chosen without
    regard to it; then the counts of planted genes are thinned binomially, more or less as the crop's measures say
    (Gerard 2020, BMC Bioinformatics 21:206), which keeps the noise of real counts.

    Below `out`: `expression.h5ad` (cell_id = crop_id; cell_type and batch of the real cell, its name as `background`;
    `field`, `plate`, and `fold`), for `build-cells` with `images.holds: crops`; and for judging alone `truth.parquet`
    and `factors.parquet`. Whole fields and whole real cells lie in one `fold`: split by it, so that neither recurs.
    """

    kind: ClassVar[str] = "semi-real"

    crops: Uri
    """A crop store of real nuclei."""
    counts: RealCounts
    """Where the real counts are."""
    planted: PlantedInReal = PlantedInReal()
    """The planted genes."""
    channel: Annotated[int, Field(ge=0)] = 0
    """Channel of the crops that is measured."""
    folds: Annotated[int, Field(ge=2, le=1000)] = 20
    """Sets that fields and real cells are dealt into."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides folds, pairs, genes and counts, with the ids of crops, fields and real cells."""

    def check(self) -> None:
        """Check that the sources are there."""
        for key, uri in (("crops", self.crops), ("counts.uri", self.counts.uri)):
            if not storage.exists(uri):
                raise JobError(key, uri, "nothing is there")
        if not self.planted.effects:
            raise JobError("planted.effects", {}, "at least one is needed")
        if 2 * self.planted.count > self.counts.genes:
            raise JobError("counts.genes", self.counts.genes, f"no room for {self.planted.count} planted genes and "
                           "as many controls")  # fmt: skip

    def run(self) -> dict[str, Any]:
        """Make the expression, or find it made.

        Returns:
            `simulated` (true), `expression_is`, `out`, `cells`, `genes`, `planted`, `expression`, `truth`, `factors`
            (URIs), `content`.
        """
        from cosmic_ray.simulation.semi_real import make

        return make(self)
