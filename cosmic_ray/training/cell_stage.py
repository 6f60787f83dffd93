"""What the kinds that train on cells share: the cell store, its split, its plan, and embeddings of its cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from cosmic_ray.errors import DataError, JobError
from cosmic_ray.training.stage import Stage

if TYPE_CHECKING:
    from cosmic_ray.output import Output
    from cosmic_ray.stores.cells import CellStore
    from cosmic_ray.stores.embeddings import Embeddings
    from cosmic_ray.training.base import TrainingJob


class CellStage(Stage):
    """See `Stage`; the job has `cells`, and embeddings of them at the key `table`."""

    samples = "cells"
    table: ClassVar[str]
    images: ClassVar[bool]
    """Whether the cells' images are streamed."""

    def __init__(self, job: TrainingJob):
        from cosmic_ray.ingest.plan import Plan
        from cosmic_ray.ingest.selection import Selection
        from cosmic_ray.training.cell_data import order_hash

        super().__init__(job)
        self.embeddings = self._embeddings()
        selection, options = Selection.of(self.store, self.split, "train"), job.data.model_dump()
        plan_of = order_hash(self.store, self.images)
        self.plan = Plan.fitted(plan_of, selection, job.global_batch, job.seed, **options)
        self.held_out = self.split.rows("val")

    def open_store(self) -> CellStore:
        """The cell store."""
        from cosmic_ray.stores.cells import CellStore

        store = self.opened("cells", lambda: CellStore.open(self.job.cells), "build-cells")
        if self.images and store.manifest.images is None:
            raise JobError("cells", self.job.cells, "these cells have no images", "build the cells with `images`")
        return store

    @property
    def simulated(self) -> bool:
        """Of the cells, or of what made the embeddings."""
        return self.store.simulated or bool(self.embeddings.manifest["simulated"])

    @property
    def made_by(self) -> str | None:
        """Digest of the model that made the embeddings; None where none of ours did."""
        return (self.embeddings.lineage.get("model") or {}).get("content_hash")

    def lineage(self, output: Output) -> dict[str, Any]:
        """What the embeddings are and what made them, too."""
        made = self.embeddings
        about = {"uri": made.uri, "content_hash": made.manifest["content_hash"]}
        return {**super().lineage(output), self.table: {**about, "lineage": made.lineage}}

    def _embeddings(self) -> Embeddings:
        from cosmic_ray.stores.embeddings import Embeddings

        uri = getattr(self.job, self.table)
        found = self.opened(self.table, lambda: Embeddings.open(uri), self.inputs[self.table])
        try:
            found.require(self.store)
        except DataError as error:
            raise JobError(self.table, uri, error.problem, "give those of these cells") from None
        return found
