"""Images of cells: each part is a shard of the crop store that comes out, with one row group.

Sample by sample, and within a sample cell by cell in the order of the cell store. So a shard of a part is a pure
function of the job and its inputs, and any number of workers makes the same store.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cosmic_ray.errors import DataError
from cosmic_ray.inference.actors import PartsActor
from cosmic_ray.output import Output
from cosmic_ray.stores.cells import CellStore
from cosmic_ray.stores.cells_form import KNOWN
from cosmic_ray.stores.columns import image_column
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.embeddings import Embeddings
from cosmic_ray.stores.manifest import Intensity
from cosmic_ray.stores.writer import encode_shard, finished_shard, publish_store, write_shard

if TYPE_CHECKING:
    from cosmic_ray.inference.generate import Generate
    from cosmic_ray.inference.generating import Inputs
    from cosmic_ray.registry.model import StoredModel

SOURCE = "generated"
_CARRIED = ("plate", "well", "site", "cell_line", "treatment")
_INTENSITY = Intensity(
    scope="stored",
    description="as a seq2img model drew it; area_px counts the pixels above 0, which need not be one nucleus",
    masked=False,
)


@dataclass(frozen=True)
class Work:
    """What every worker is told."""

    cells: str
    latents: str
    out: str
    model: str
    digest: str
    rows: np.ndarray
    """Of the cells: int64."""
    samples: int
    seed: int
    settings: Mapping[str, Any]
    """Of `Seq2Img.sample`."""
    rows_per_group: int
    device: str | None
    """None: an accelerator."""

    @property
    def total(self) -> int:
        """Images in all."""
        return len(self.rows) * self.samples

    def span(self, part: int) -> range:
        """Numbers of the images of a part: sample number * cells + number of the cell."""
        return range(part * self.rows_per_group, min((part + 1) * self.rows_per_group, self.total))


def generate_images(
    job: Generate, target: Output, found: Inputs, stored: StoredModel, model: str, lineage: Mapping[str, Any]
) -> tuple[CropStore, dict[str, float]]:
    """Make the missing shards and publish the store at `target`; it, and how fast that was.

    Args:
        model: URI of the folder of `stored` that every worker reads.
    """
    from cosmic_ray.cluster import require_seen_everywhere
    from cosmic_ray.inference.workers import make_parts, plan_pool

    if target.done:
        return CropStore.open(target.uri), {}
    settings = job.images.model_dump(include={"guidance", "sampler", "steps"})
    work = Work(
        cells=found.store.uri,
        latents=found.latents.uri,
        out=target.uri,
        model=model,
        digest=stored.config.digest,
        rows=found.rows,
        samples=job.images.samples,
        seed=job.seed,
        settings={**settings, "batch_size": job.batch_size, "precision": job.precision},
        rows_per_group=job.images.rows_per_group,
        device=None,
    )
    count = -(-work.total // work.rows_per_group)
    speed: dict[str, float] = {}
    if missing := {part: len(work.span(part)) for part in range(count) if finished_shard(target.uri, part) is None}:
        pool = plan_pool(job.workers, job.cpus_per_worker, job.gpus_per_worker)
        work = work if pool.gpus else replace(work, device="cpu")
        seen = {"cells": work.cells, "latents": work.latents, "seq2img": model, "out": target.uri}
        require_seen_everywhere(seen)
        speed = make_parts(ImageParts, work, missing, work.total, pool, "draw", "images")
    target.require()
    shards = [finished_shard(target.uri, part) for part in range(count)]
    spec = stored.config.output
    named = {node["uri"]: node["content_hash"] for key, node in lineage.items() if key not in ("fm", "img2seq")}
    simulated = found.store.simulated or stored.config.simulated
    told = {"cells": len(found.rows), "samples": work.samples}
    publish_store(target, spec, shards, told, _INTENSITY, named, job.resolved(), simulated)
    return CropStore.open(target.uri), speed


class ImageParts(PartsActor[Work]):
    """Holds the seq2img model."""

    def open(self) -> None:
        """The model, the cells, their latents."""
        from cosmic_ray.registry.kinds.seq2img import Seq2Img
        from cosmic_ray.registry.package import read_model

        work, stored = self.work, read_model(self.work.model)
        if stored.config.digest != work.digest:
            raise DataError(work.model, "the model was replaced while it was in use", "choose another out")
        self._model, self._cells = Seq2Img(stored, work.device), CellStore.open(work.cells)
        self._latents = Embeddings.open(work.latents)

    def make(self, part: int) -> dict[str, Any]:
        """Draw and write one shard."""
        began = time.monotonic()
        work, numbers = self.work, self.work.span(part)
        sample, place = np.divmod(np.array(numbers), len(work.rows))
        rows = work.rows[place]
        latents, cells = self._latents.vectors(rows), self._cells.obs(["cell_id", *KNOWN], rows)
        wait_s = time.monotonic() - began
        spec, ids = self._model.config.output, cells["cell_id"].to_pylist()
        drawn = np.empty((len(numbers), *spec.shape), np.uint8)
        for number in np.unique(sample).tolist():
            mine = np.flatnonzero(sample == number)
            names, seed = [ids[i] for i in mine], work.seed + number
            drawn[mine] = self._model.sample(latents[mine], names, seed=seed, **work.settings)
        table = image_rows(self._cells, cells, rows, sample, drawn)
        write_shard(work.out, part, encode_shard(table, spec, work.rows_per_group))
        return {"rows": len(numbers), "seconds": time.monotonic() - began, "read_wait_s": wait_s}


def image_rows(cells: CellStore, known: pa.Table, rows: np.ndarray, sample: np.ndarray, drawn: np.ndarray) -> pa.Table:
    """The rows of a crop store for images of cells; what is known of a cell's real crop stands beside its image.

    Args:
        known: `cell_id` and KNOWN of the cells.
        rows: of the cells, int64 (N,).
        sample: number of each image among its cell's, int64 (N,).
        drawn: uint8 (N, C, H, W).
    """
    count, ids = len(rows), known["cell_id"].to_pylist()
    crops = cells.crops.metadata(list(_CARRIED), rows) if cells.manifest.images else None
    blank, unknown = [""] * count, np.full(count, np.nan, np.float32)
    nucleus = (drawn > 0).any(1)
    with np.errstate(invalid="ignore"):
        brightness = drawn.mean(1).sum((1, 2)) / nucleus.sum((1, 2))
    numbers = ("centroid_x", "centroid_y", "eccentricity", "pixel_size_um", "intensity_scale", "intensity_offset")
    return pa.table(
        {
            "crop_id": [f"{cell}#{number}" for cell, number in zip(ids, sample.tolist(), strict=True)],
            "source": [SOURCE] * count,
            **{name: crops[name] if crops is not None else blank for name in _CARRIED},
            "field_uri": blank,
            **dict.fromkeys(numbers, unknown),
            "area_px": nucleus.sum((1, 2)).astype(np.int32),
            "mean_intensity": brightness.astype(np.float32),
            **{name: known[name] for name in ("cell_id", *KNOWN)},
            "sample": sample.astype(np.int32),
            "image": image_column(drawn),
        }
    )
