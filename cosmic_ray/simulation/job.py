"""`simulate-plates`: microscope plates whose every nucleus is known, in the layout of the Cell Painting Gallery."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from cosmic_ray import storage
from cosmic_ray.config import Job
from cosmic_ray.errors import JobError
from cosmic_ray.simulation.spec import CELL_TYPES, Fault, FieldSpec, Positive, Treatment

if TYPE_CHECKING:
    from cosmic_ray.output import Output
    from cosmic_ray.simulation.layout import PlannedField


class SimulatePlates(Job):
    """Simulate plates with known truth; the same seed gives the same bytes, and every file says that it is simulated.

    Below `out`: `<plate>/Images/*.tiff` (16-bit), `<plate>/Labels/*.png` (16-bit), `load_data/<plate>/load_data.csv`,
    `truth.parquet` (a row a nucleus), `fields.parquet` (a row a field), and last `manifest.json`.
    """

    kind: ClassVar[str] = "simulate-plates"
    incidental: ClassVar[frozenset[str]] = frozenset({"processes"})

    seed: Annotated[int, Field(ge=0)] = 0
    """Decides everything that is drawn, with the names of plate, well and site."""
    plates: Annotated[int, Field(ge=1, le=99)] = 1
    """Number of plates; each has its own illumination, staining and arrangement."""
    wells: Annotated[int, Field(ge=1, le=384)] = 12
    """Wells a plate."""
    sites: Annotated[int, Field(ge=1, le=999)] = 2
    """Fields of view a well."""
    cell_lines: dict[str, dict[str, Positive]] = {name: {name: 1.0} for name in CELL_TYPES}
    """Cell line -> weights of the cell types that it is a mixture of; a well holds one line."""
    treatments: dict[str, Treatment] = {"none": Treatment()}
    """Treatment -> its known effects; a well gets one. Lines and treatments are crossed."""
    faults: dict[Fault, Annotated[int, Field(ge=0)]] = {}
    """Bad fields a plate, by kind: empty, blurred, saturated, truncated (the file ends in the middle)."""
    field: FieldSpec = FieldSpec()
    """What a field holds, and the microscope and camera that see it."""
    processes: Annotated[int, Field(ge=0)] = 0
    """Processes on this machine; 0 takes one for each CPU that this process may use. It changes no byte."""

    def check(self) -> None:
        """Check that names are known and numbers fit together."""
        for line, mix in self.cell_lines.items():
            unknown = sorted(set(mix) - set(self.field.cell_types))
            if unknown or not mix:
                known = ", ".join(self.field.cell_types)
                raise JobError(f"cell_lines.{line}", mix, "needs known cell types with weights", f"known: {known}")
        for key in ("cell_lines", "treatments"):
            if not getattr(self, key):
                raise JobError(key, {}, "at least one is needed")
        spoilt = sum(self.faults.values())
        if spoilt > self.wells * self.sites:
            raise JobError("faults", self.faults, f"{spoilt} bad fields on a plate of {self.wells * self.sites}")
        area_mm2 = self.field.height * self.field.width * self.field.pixel_size_um**2 / 1e6
        if area_mm2 * self.field.density_per_mm2 > 30_000:
            raise JobError("field.density_per_mm2", self.field.density_per_mm2, "more than 30,000 nuclei a field",
                           "labels have 16 bits: make the field smaller")  # fmt: skip

    def plan(self) -> list[PlannedField]:
        """All fields, in order of plate, well and site."""
        from cosmic_ray.simulation.layout import plan_plate, plate_names

        names = sorted(self.cell_lines), sorted(self.treatments)
        return [
            field
            for plate in plate_names(self.plates)
            for field in plan_plate(self.seed, plate, self.wells, self.sites, *names, self.faults)
        ]

    def run(self) -> dict[str, Any]:
        """Simulate what is not there yet, then publish.

        Returns:
            `simulated` (true), `out`, `fields`, `nuclei`, `load_data` and `truth` (URIs), `content`.
        """
        from cosmic_ray.output import claim

        with claim(self) as out:
            if not out.done:
                self._simulate(out.uri)
                self._publish(out)
            storage.delete(out.at("parts"))
            manifest = out.manifest()
        return {
            "simulated": True,
            "out": out.uri,
            "fields": manifest["fields"],
            "nuclei": manifest["nuclei"],
            "load_data": out.at("load_data"),
            "truth": out.at("truth.parquet"),
            "content": manifest["content"],
        }

    def _simulate(self, uri: str) -> None:
        from cosmic_ray.simulation.parallel import write_parts

        named = {_part_name(field): field for field in self.plan()}
        write_parts(uri, named, partial(write_field, self, uri), self.processes, "simulate plates", "fields")

    def _publish(self, out: Output) -> None:
        from cosmic_ray.simulation.files import load_data_csv, merged, parquet_bytes, parquet_table
        from cosmic_ray.simulation.layout import plate_names

        plan = self.plan()
        parts = [parquet_table(storage.read_bytes(out.at("parts", _part_name(field)))) for field in plan]
        nuclei, fields = merged(parts)
        for plate in plate_names(self.plates):
            rows = [field for field in plan if field.plate == plate]
            out.write(f"load_data/{plate}/load_data.csv", load_data_csv(rows, self.field.pixel_size_um))
        out.write("truth.parquet", parquet_bytes(nuclei))
        out.write("fields.parquet", parquet_bytes(fields))
        digest = hashlib.sha256("".join(fields["content"].to_pylist()).encode()).hexdigest()
        said = {key: value for key, value in self.resolved().items() if key != "out" and key not in self.incidental}
        out.publish({
            "simulated": True,
            "format": "simulated-plates",
            "version": 1,
            "content": digest,
            "fields": len(plan),
            "nuclei": len(nuclei),
            "pixel_size_um": self.field.pixel_size_um,
            "job": said,
        })  # fmt: skip


def write_field(job: SimulatePlates, uri: str, planned: PlannedField) -> None:
    """Simulate one field and write its image, labels and, last, its truth: what makes it count as done."""
    from cosmic_ray.simulation.field import FieldKey, simulate_field
    from cosmic_ray.simulation.files import field_table, image_path, labels_path, parquet_bytes, png_bytes, tiff_bytes

    key = FieldKey(job.seed, planned.plate, planned.well, planned.site)
    mix, treatment = job.cell_lines[planned.cell_line], job.treatments[planned.treatment]
    field = simulate_field(job.field, key, mix, treatment, planned.fault)
    image = tiff_bytes(field.image, job.field.pixel_size_um)
    if planned.fault == "truncated":
        image = image[: len(image) // 2]
    storage.write_bytes(storage.join(uri, image_path(planned)), image)
    storage.write_bytes(storage.join(uri, labels_path(planned)), png_bytes(field.labels))
    storage.write_bytes(storage.join(uri, "parts", _part_name(planned)), parquet_bytes(field_table(planned, field)))


def _part_name(field: PlannedField) -> str:
    return f"{field.plate}_{field.stem}.parquet"
