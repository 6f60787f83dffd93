"""Step one, of a chunk of fields: every object found, measured and judged; the pixels of those that may be kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cosmic_ray.imaging.catalogue import Entry
from cosmic_ray.imaging.crops import Patch, cut, fits
from cosmic_ray.imaging.fields import Field, Rejected, digest_of, fetched, load_field
from cosmic_ray.imaging.histogram import Histogram
from cosmic_ray.imaging.quality import check_objects
from cosmic_ray.imaging.segment import measure, segment
from cosmic_ray.imaging.source import TEXT_COLUMNS
from cosmic_ray.stores.writer import order_keys

if TYPE_CHECKING:
    from cosmic_ray.imaging.job import BuildCrops

BORDER, TOO_LARGE = "touches the border", "larger than the crop"
KEEP = ""
"""In the column `reject`: nothing is wrong with it, as far as its field alone can tell."""


@dataclass(frozen=True)
class Found:
    """What step one knows of a chunk of fields."""

    objects: pa.Table
    """Every object, in the order of its `order` key: columns of a crop store but image and intensities, `order`
    (uint64), `reject` (string; "" may be kept) and `patch` (binary, `Patch.pack`; null where rejected)."""
    fields: list[dict[str, Any]]
    """For each field in order: `reason`, `detail`, `digest`, `objects`, `candidates`."""
    areas: dict[str, Histogram]
    """source -> areas in px of its whole nuclei of good quality, those larger than the crop included."""
    pixels: dict[tuple[str, str, int], Histogram]
    """(source, plate, channel) -> raw intensities of the candidates' pixels."""


def find_candidates(job: BuildCrops, entries: Sequence[Entry]) -> Found:
    """Read and segment fields one by one; what is wrong with a field is written down and never raised.

    Raises:
        DataError: where the storage does not answer.
    """
    tables, fields = [], []
    areas: dict[str, list[Histogram]] = {}
    pixels: dict[tuple[str, str, int], list[Histogram]] = {}
    for entry, data in fetched(entries):
        about: dict[str, Any] = {"reason": "", "detail": "", "digest": "", "objects": 0, "candidates": 0}
        fields.append(about)
        try:
            if isinstance(data, Rejected):
                raise data
            about["digest"] = digest_of(data)
            table, patches = _objects_of(job, entry, data)
        except Rejected as why:
            about |= {"reason": why.reason, "detail": why.detail}
            continue
        except (MemoryError, ArithmeticError, LookupError, RuntimeError, ValueError) as error:
            # One odd field must not end a job of days; a fault of ours shows as many of these, and they are counted.
            about |= {"reason": "failed", "detail": f"{type(error).__name__}: {error}"[:500]}
            continue
        reject = np.array(table["reject"].to_pylist())
        about |= {"objects": len(table), "candidates": len(patches)}
        if not patches:
            about |= {"reason": "no usable nuclei", "detail": _told(reject)}
        tables.append(table)
        measured = table["area_px"].to_numpy()[(reject == KEEP) | (reject == TOO_LARGE)]
        areas.setdefault(entry.source, []).append(Histogram.of(measured))
        for channel in range(len(job.channels) if patches else 0):
            values = np.concatenate([patch.pixels[channel] for patch in patches])
            pixels.setdefault((entry.source, entry.plate, channel), []).append(Histogram.of(values))
    return Found(
        objects=_ordered(tables, job.seed),
        fields=fields,
        areas={source: Histogram.merged(parts) for source, parts in areas.items()},
        pixels={key: Histogram.merged(parts) for key, parts in pixels.items()},
    )


def _told(reject: np.ndarray) -> str:
    counts = Counter(reject.tolist()).most_common()
    return f"{len(reject)} objects: " + ", ".join(f"{count} {reason}" for reason, count in counts)


def _objects_of(job: BuildCrops, entry: Entry, data: dict[str, bytes]) -> tuple[pa.Table, list[Patch]]:
    source = job.catalogues[entry.origin]
    field = load_field(entry, source, data, job.target_um_px)
    if source.holds == "crops":
        return _ready_crop(job, entry, field)
    labels = field.labels if field.labels is not None else segment(field.pixels[0], job.segmentation)
    columns = measure(labels, field.pixels[0])
    if not len(columns["label"]):
        raise Rejected("no nuclei", "no object above the speck floor")
    checks, reject = check_objects(labels, field.pixels[0], columns, job.quality, field.white)
    reject = np.where(fits(columns, job.crop_px) | (reject != KEEP), reject, TOO_LARGE)
    reject = np.where(columns["touches_border"], BORDER, reject)
    rows = np.flatnonzero(reject == KEEP)
    patches = [cut(field.pixels, labels, columns, row, job.crop_px) for row in rows]
    for axis in ("centroid_x", "centroid_y"):
        columns[axis] = (columns[axis] + 0.5) / field.factor - 0.5
    ids = _crop_ids(entry.name, columns["centroid_x"], columns["centroid_y"])
    return _table(entry, field, ids, {**columns, **checks}, reject, patches), patches


def _crop_ids(name: str, x: np.ndarray, y: np.ndarray) -> list[str]:
    """`<field>/x0123y0456`, the rounded centroid in px of the field; a second object there gets `-2`."""
    ids, seen = [], Counter()
    for column, row in zip(np.rint(x).astype(int), np.rint(y).astype(int), strict=True):
        crop_id = f"{name}/x{column:04}y{row:04}"
        seen[crop_id] += 1
        ids.append(crop_id + ("" if seen[crop_id] == 1 else f"-{seen[crop_id]}"))
    return ids


def _ready_crop(job: BuildCrops, entry: Entry, field: Field) -> tuple[pa.Table, list[Patch]]:
    """A crop as it is: its pixels above 0 (in any channel) are the nucleus, unchecked."""
    shape = (job.crop_px, job.crop_px)
    if field.pixels.shape[1:] != shape:
        raise Rejected("wrong dimensions", f"a ready crop of {field.pixels.shape[1:]} px, not {shape}")
    mask = field.pixels.any(axis=0)
    columns = measure(mask.astype(np.int32), field.pixels[0])
    patches = [Patch(0, 0, mask, field.pixels[:, mask])]
    return _table(entry, field, [entry.site], columns, np.array([KEEP]), patches), patches


MEASURED = ("centroid_x", "centroid_y", "area_px", "eccentricity", "mean_intensity")


def _table(
    entry: Entry, field: Field, ids: list[str], columns: dict[str, np.ndarray], reject: np.ndarray, patches: list[Patch]
) -> pa.Table:
    count = len(ids)
    text = {name: getattr(entry, name) for name in (*TEXT_COLUMNS, "field_uri")}
    packed = iter(patches)
    numbers = {name: values for name, values in columns.items() if name in MEASURED or name.startswith("q_")}
    numbers["pixel_size_um"] = np.full(count, field.pixel_size_um)
    return pa.table(
        {"crop_id": ids}
        | {name: pa.repeat(value, count) for name, value in text.items()}
        | {name: _narrow(values) for name, values in numbers.items()}
        | {
            "reject": pa.array(reject.tolist(), pa.string()),
            "patch": pa.array([None if why else next(packed).pack() for why in reject.tolist()], pa.binary()),
        }
    )


def _narrow(values: np.ndarray) -> pa.Array:
    return pa.array(values.astype(np.float32 if values.dtype.kind == "f" else np.int32))


def _ordered(tables: list[pa.Table], seed: int) -> pa.Table | None:
    if not tables:
        return None
    table = pa.concat_tables(tables)
    ids = table["crop_id"].to_pylist()
    keys = order_keys(ids, seed)
    return table.append_column("order", pa.array(keys)).take(np.lexsort((np.array(ids), keys)))
