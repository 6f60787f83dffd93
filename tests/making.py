"""Crop stores made to order for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from cosmic_ray.config import Job
from cosmic_ray.output import claim
from cosmic_ray.stores.columns import image_column
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.manifest import CropSpec, Intensity, ShardEntry
from cosmic_ray.stores.writer import encode_shard, publish_store, write_shard


class MakeTestStore(Job):
    """The job that stands in the manifests of test stores."""

    kind: ClassVar[str] = "test-store"


def make_store(
    out: str,
    rows: int,
    *,
    channels: int = 1,
    size: int = 16,
    rows_per_group: int = 8,
    groups_per_shard: int = 2,
    compression: str = "lz4",
    seed: int = 0,
    simulated: bool = True,
    columns: dict[str, Any] | None = None,
) -> CropStore:
    """Write and open a store of `rows` blobs of (channels, size, size); `columns` replaces or adds columns."""
    spec = CropSpec(channels=tuple(f"channel-{c}" for c in range(channels)), height=size, width=size)
    table = make_rows(rows, spec, seed)
    for name, values in (columns or {}).items():
        array = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values)
        index = table.column_names.index(name) if name in table.column_names else None
        table = table.append_column(name, array) if index is None else table.set_column(index, name, array)
    return store_of(out, table, spec, rows_per_group, groups_per_shard, compression, simulated=simulated)


def store_of(
    out: str,
    rows: pa.Table,
    spec: CropSpec,
    rows_per_group: int,
    groups_per_shard: int,
    compression: str,
    masked: bool = True,
    simulated: bool = True,
) -> CropStore:
    """Write `rows` as they are and open the store."""
    per_shard = rows_per_group * groups_per_shard
    slices = [rows.slice(start, per_shard) for start in range(0, len(rows), per_shard)]
    entries = [
        write_shard(out, index, encode_shard(part, spec, rows_per_group, compression))
        for index, part in enumerate(slices)
    ]
    return publish_entries(out, entries, spec, masked, simulated)


def publish_entries(
    out: str, entries: Sequence[ShardEntry], spec: CropSpec, masked: bool = True, simulated: bool = True
) -> CropStore:
    """Publish written shards as a store and open it."""
    intensity = Intensity(scope="stored", description="made for a test", masked=masked)
    with claim(MakeTestStore(out=out)) as target:
        publish_store(target, spec, entries, {}, intensity, {}, {"kind": "test-store"}, simulated)
    return CropStore.open(out)


def make_rows(rows: int, spec: CropSpec, seed: int = 0) -> pa.Table:
    """`rows` masked discs of random radius and texture, with every column of a crop store."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[: spec.height, : spec.width]
    radius = rng.uniform(0.2, 0.45, (rows, 1, 1)) * spec.height
    inside = (yy - spec.height / 2 + 0.5) ** 2 + (xx - spec.width / 2 + 0.5) ** 2 <= radius**2
    crops = rng.integers(1, 256, (rows, *spec.shape), dtype=np.uint8) * inside[:, None]
    area = inside.sum(axis=(1, 2)).astype(np.int32)
    text = {
        "crop_id": [f"crop-{seed}-{row:06}" for row in range(rows)],
        "source": ["simulated"] * rows,
        "plate": [f"plate-{row % 3}" for row in range(rows)],
        "well": [f"{'ABCDEFGH'[row % 8]}{row % 12 + 1:02}" for row in range(rows)],
        "site": [str(row % 4) for row in range(rows)],
        "field_uri": [f"fields/{row // 5:04}.tif" for row in range(rows)],
        "cell_line": [("U2OS", "HeLa")[row % 2] for row in range(rows)],
        "treatment": [""] * rows,
    }
    floats = {
        "centroid_x": rng.uniform(0, 1000, rows),
        "centroid_y": rng.uniform(0, 1000, rows),
        "eccentricity": rng.uniform(0, 0.9, rows),
        "mean_intensity": crops.sum(axis=(1, 2, 3)) / (area * spec.shape[0]),
        "pixel_size_um": np.full(rows, np.nan),
        "intensity_scale": np.ones(rows),
        "intensity_offset": np.zeros(rows),
    }
    columns: dict[str, pa.Array] = {name: pa.array(values) for name, values in text.items()}
    columns |= {name: pa.array(values.astype(np.float32)) for name, values in floats.items()}
    columns |= {"area_px": pa.array(area), "image": image_column(crops)}
    return pa.table(columns)
