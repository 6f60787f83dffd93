"""The files of simulated plates: TIFF fields, PNG labels, load_data.csv, truth; each says that it is simulated."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from cosmic_ray.simulation.field import SimulatedField
from cosmic_ray.simulation.layout import PlannedField

if TYPE_CHECKING:
    import pyarrow as pa

_NOTE = "simulated"


def tiff_bytes(image: np.ndarray, pixel_size_um: float) -> bytes:
    """A grey 16-bit TIFF, deflate with predictor; the description says `{"simulated": true, ...}`."""
    import tifffile

    file = io.BytesIO()
    per_cm = 1e4 / pixel_size_um
    description = json.dumps({"simulated": True, "pixel_size_um": pixel_size_um})
    tifffile.imwrite(
        file, image, compression="zlib", predictor=True, photometric="minisblack", description=description,
        software="cosmic_ray simulation", resolution=(per_cm, per_cm), resolutionunit="CENTIMETER", metadata=None,
    )  # fmt: skip
    return file.getvalue()


def png_bytes(labels: np.ndarray) -> bytes:
    """A 16-bit grey PNG with the text `simulated`."""
    from PIL import Image, PngImagePlugin

    about = PngImagePlugin.PngInfo()
    about.add_text("Comment", _NOTE)
    file = io.BytesIO()
    Image.fromarray(labels).save(file, "PNG", compress_level=4, pnginfo=about)
    return file.getvalue()


def image_path(field: PlannedField) -> str:
    """Where a field's image lies below the output folder."""
    return f"{field.plate}/Images/{field.stem}_OrigDNA.tiff"


def labels_path(field: PlannedField) -> str:
    """Where a field's label image lies below the output folder."""
    return f"{field.plate}/Labels/{field.stem}_labels.png"


def load_data_csv(fields: Iterable[PlannedField], pixel_size_um: float) -> bytes:
    """The Cell Painting Gallery's `load_data.csv` of one plate; paths are relative to the CSV's own folder."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ("Plate", "Well", "Site", "cell_line", "treatment", "pixel_size_um", "simulated")
    writer.writerow(["FileName_OrigDNA", "PathName_OrigDNA", *(f"Metadata_{name}" for name in names)])
    for field in fields:
        folder, _, name = image_path(field).rpartition("/")
        about = field.plate, field.well, field.site, field.cell_line, field.treatment, pixel_size_um, "True"
        writer.writerow([name, f"../../{folder}", *about])
    return text.getvalue().encode()


def field_table(planned: PlannedField, field: SimulatedField) -> pa.Table:
    """The truth of one field's nuclei; what is true of the field as a whole stands in the schema's metadata."""
    import pyarrow as pa

    count = len(field.nuclei["label"])
    names = {"plate": planned.plate, "well": planned.well, "site": planned.site, "cell_line": planned.cell_line,
             "treatment": planned.treatment}  # fmt: skip
    columns = {name: pa.array([value] * count, pa.int32() if name == "site" else pa.string())
               for name, value in names.items()}  # fmt: skip
    columns |= {name: pa.array(values, _arrow_type(values)) for name, values in field.nuclei.items()}
    about = {**names, "image": image_path(planned), "labels": labels_path(planned), **field.about,
             "content": content(planned, field)}  # fmt: skip
    return pa.table(columns).replace_schema_metadata({"simulated": "true", "field": json.dumps(about, sort_keys=True)})


def content(planned: PlannedField, field: SimulatedField) -> str:
    """Hex digest of a field's pixels, labels and truth; the encoding of files and the code's version do not enter."""
    digest = hashlib.sha256(repr(planned).encode())
    for array in (field.image, field.labels, *field.nuclei.values()):
        plain = array.astype("U") if array.dtype.kind in "UO" else array
        digest.update(str(plain.shape).encode() + np.ascontiguousarray(plain).tobytes())
    return digest.hexdigest()


def merged(parts: list[pa.Table]) -> tuple[pa.Table, pa.Table]:
    """One table of all nuclei and one of all fields, in the order of `parts`; each says that it is simulated."""
    import pyarrow as pa

    note = {"simulated": "true"}
    fields = pa.Table.from_pylist([json.loads(part.schema.metadata[b"field"]) for part in parts])
    nuclei = pa.concat_tables([part.replace_schema_metadata(note) for part in parts])
    return nuclei.combine_chunks(), fields.replace_schema_metadata(note)


def parquet_bytes(table: pa.Table) -> bytes:
    """A Parquet file, zstd."""
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd")
    return file.getvalue()


def parquet_table(data: bytes) -> pa.Table:
    """Read a Parquet file."""
    import pyarrow.parquet as pq

    return pq.read_table(io.BytesIO(data))


def _arrow_type(values: np.ndarray) -> pa.DataType:
    import pyarrow as pa

    return pa.string() if values.dtype.kind in "UO" else pa.from_numpy_dtype(values.dtype)
