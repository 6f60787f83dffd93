"""`simulate-cells`: images and counts of the same cells, with a planted truth, as `build-cells` reads them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from cosmic_ray import storage
from cosmic_ray.config import Job
from cosmic_ray.simulation.paired_spec import PairedSpec

if TYPE_CHECKING:
    from cosmic_ray.output import Output


class SimulateCells(PairedSpec, Job):
    """Simulate paired cells with known truth; the same seed gives the same numbers, and every file says "simulated".

    Below `out`: `expression.h5ad` (raw counts; cell_id, cell_type, batch, donor), `images.zip` (`{cell_id}.png`), which
    `build-cells` takes; and what no stage that is fitted may read: `truth.parquet` (a row a gene: planted or not, its
    factor, function, strength, matched control, ceiling), `factors.parquet` (a row a cell); last `manifest.json`.
    """

    kind: ClassVar[str] = "simulate-cells"
    incidental: ClassVar[frozenset[str]] = frozenset({"processes"})

    seed: Annotated[int, Field(ge=0)] = 0
    """Decides everything that is drawn: genes, cells, images, counts."""
    processes: Annotated[int, Field(ge=0)] = 0
    """Processes on this machine; 0 takes one for each CPU that this process may use. It changes no byte."""

    def check(self) -> None:
        """Check that nuclei fit into their crops, and that planted genes can be as strong as asked."""
        from cosmic_ray.simulation.genes import draw_genes
        from cosmic_ray.simulation.morphology import require_room

        require_room(self)
        draw_genes(self, self.seed)

    def run(self) -> dict[str, Any]:
        """Simulate what is not there yet, then publish.

        Returns:
            `simulated` (true), `out`, `cells`, `genes`, `planted` (number of genes), `expression`, `images`, `truth`,
            `factors` (URIs), `content` (digest of counts, pixels and truth).
        """
        from cosmic_ray.output import claim
        from cosmic_ray.simulation.parallel import PARTS, write_parts
        from cosmic_ray.simulation.population import chunks

        with claim(self) as out:
            if not out.done:
                named = {_part_name(chunk): chunk for chunk in range(chunks(self))}
                write_parts(
                    out.uri, named, partial(write_chunk, self, out.uri), self.processes, "simulate cells", "parts"
                )
                self._publish(out)
            storage.delete(out.at(PARTS))
            manifest = out.manifest()
        return {
            "simulated": True,
            "out": out.uri,
            **{key: manifest[key] for key in ("cells", "genes", "planted", "content")},
            "expression": out.at("expression.h5ad"),
            "images": out.at("images.zip"),
            "truth": out.at("truth.parquet"),
            "factors": out.at("factors.parquet"),
        }

    def _publish(self, out: Output) -> None:
        from cosmic_ray.simulation import paired_files as files
        from cosmic_ray.simulation.counts import draw_counts
        from cosmic_ray.simulation.files import parquet_bytes, parquet_table
        from cosmic_ray.simulation.genes import draw_genes
        from cosmic_ray.simulation.parallel import PARTS
        from cosmic_ray.simulation.population import all_cells, chunks

        cells, genes, types = all_cells(self, self.seed), draw_genes(self, self.seed), list(self.cell_types)
        counts = draw_counts(self, self.seed, genes)
        parts = [parquet_table(storage.read_bytes(out.at(PARTS, _part_name(part)))) for part in range(chunks(self))]
        names, images, pixels = (
            [value for part in parts for value in part[column].to_pylist()] for column in ("cell_id", "png", "pixels")
        )
        obs = files.obs_columns(cells, types)
        truth, factors = files.truth_table(genes), files.factors_table(cells, types)
        out.write("expression.h5ad", files.h5ad_bytes(counts, obs, genes.gene_id, {}))
        out.write(
            "images.zip", files.zip_bytes((f"{name}.png", data) for name, data in zip(names, images, strict=True))
        )
        out.write("truth.parquet", parquet_bytes(truth))
        out.write("factors.parquet", parquet_bytes(factors))
        said = {key: value for key, value in self.resolved().items() if key != "out" and key not in self.incidental}
        out.publish({
            "simulated": True,
            "format": "simulated-cells",
            "version": 1,
            "content": files.content(counts, pixels, (truth, factors)),
            "cells": self.cells,
            "genes": len(genes.gene_id),
            "planted": self.planted.count,
            "job": said,
        })  # fmt: skip


def write_chunk(job: SimulateCells, uri: str, chunk: int) -> None:
    """Draw the images of one chunk of cells and write them as one part."""
    from cosmic_ray.simulation.morphology import draw_images
    from cosmic_ray.simulation.paired_files import part_bytes
    from cosmic_ray.simulation.parallel import PARTS
    from cosmic_ray.simulation.population import draw_cells

    part = part_bytes(draw_cells(job, job.seed, chunk).cell_id, draw_images(job, job.seed, chunk))
    storage.write_bytes(storage.join(uri, PARTS, _part_name(chunk)), part)


def _part_name(chunk: int) -> str:
    return f"cells-{chunk:05}.parquet"
