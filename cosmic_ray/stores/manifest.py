"""Crop store format, version 1: its columns, its manifest, and how its content hash is made.

    <store>/manifest.json                 this module's `CropManifest`; written last
    <store>/shards/shard-00000.parquet    plain Parquet; readable by anything that reads Parquet
    <store>/shards/shard-00000.json       the shard's own entry, for a build that resumes

A row group lies in its shard as [metadata columns][image column], without gaps, so that one range read fetches a row
group and a shorter one its metadata; both have a digest in the manifest.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from cosmic_ray import output
from cosmic_ray.config import Config
from cosmic_ray.errors import DataError
from cosmic_ray.stores.statistics import Statistics

FORMAT = "cosmic-ray/crops"
CELLS = "cosmic-ray/cells"
VERSION = 1
SHARDS = "shards"

COLUMNS: dict[str, str] = {
    "crop_id": "string",
    "source": "string",
    "plate": "string",
    "well": "string",
    "site": "string",
    "field_uri": "string",
    "cell_line": "string",
    "treatment": "string",
    "centroid_x": "float32",
    "centroid_y": "float32",
    "area_px": "int32",
    "eccentricity": "float32",
    "mean_intensity": "float32",
    "pixel_size_um": "float32",
    "intensity_scale": "float32",
    "intensity_offset": "float32",
    "image": "binary",
}
"""Columns that every crop store has, with their types. No value is null: an unknown string is "", an unknown float NaN.

Centroids are pixels in the field; `pixel_size_um` is um per pixel of the crop; `image` is C*H*W bytes in C order;
a stored value v >= 1 stands for `intensity_offset + intensity_scale * v` in the field's own units.
"""

FIELD, FIELD_NAMES = "field_uri", ("source", "plate", "well", "site")
"""The URI of a field's first file, and what a field is called. Where that file's folder lies is no content: the names
and the file's own name alone count in content hashes and splits, so that a copy of the fields elsewhere gives the same.
"""

EXTRA_TYPES = ("string", "float32", "int32")
"""Types of any further column (what quality checks measured: `q_*`)."""


class CropSpec(Config):
    """What every image of a store is: `channels` names, `height` x `width` px, uint8, C-ordered (C, H, W)."""

    channels: tuple[str, ...] = Field(min_length=1)
    """A name for each channel, in order: `DNA`, `ER`, ..."""
    height: int = Field(ge=1)
    """Pixels."""
    width: int = Field(ge=1)
    """Pixels."""
    dtype: Literal["uint8"] = "uint8"
    """The type of a pixel."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return len(self.channels), self.height, self.width

    @property
    def nbytes(self) -> int:
        """Bytes of one image."""
        return len(self.channels) * self.height * self.width


class Intensity(Config):
    """What a stored pixel means. Each crop carries its own `intensity_scale` and `intensity_offset`."""

    scope: Literal["crop", "plate", "source", "stored"]
    """Which crops share a mapping: none (destroys DNA content), a plate's, a source's; `stored`: taken as imported."""
    description: str
    """The mapping in words: which percentiles go to which values."""
    masked: bool
    """Whether 0 is background and each of the `area_px` pixels of the nucleus is at least 1 in every channel."""


class StoredGroup(NamedTuple):
    """One row group as its shard stores it."""

    offset: int
    """First byte in the shard."""
    nbytes: int
    """Bytes of all columns."""
    rows: int
    digest: str
    """xxh3_128 of the stored bytes."""
    meta_nbytes: int
    """Bytes of the columns before the image."""
    meta_digest: str
    """xxh3_128 of those."""
    content: str
    """sha256 of the decoded content (`content_digest`)."""


class Shard(Config):
    """One shard: where its row groups lie, and the digests to check them by."""

    name: str
    """File name inside `shards/`."""
    nbytes: int
    """Bytes of the file."""
    footer_nbytes: int
    """Bytes from the end of the last row group to the end of the file: Parquet's own metadata."""
    footer_digest: str
    """xxh3_128 of those."""
    row_groups: tuple[StoredGroup, ...]


class ShardEntry(Config):
    """What stands beside a finished shard while its store is being built."""

    spec: CropSpec
    extra_columns: dict[str, Literal["string", "float32", "int32"]]
    rows_per_group: int
    compression: str
    shard: Shard
    statistics: Statistics


class RowGroup(NamedTuple):
    """One row group of a store."""

    index: int
    """Number in the store."""
    shard: str
    """URI of its shard."""
    offset: int
    nbytes: int
    rows: int
    digest: str
    meta_nbytes: int
    meta_digest: str
    within: int
    """Number in its shard."""


class CropManifest(Config):
    """The manifest of a crop store, version 1."""

    format: Literal["cosmic-ray/crops"] = FORMAT
    version: Literal[1] = VERSION
    spec: CropSpec
    extra_columns: dict[str, Literal["string", "float32", "int32"]]
    """Columns beyond `COLUMNS`, by name."""
    rows: int
    """Crops in all."""
    rows_per_group: int
    """Rows of every row group but the last."""
    compression: str
    content_hash: str
    """sha256 of the content alone: no time, code version, compression, number of shards or folder of fields in it."""
    simulated: bool
    """Whether any crop comes from the simulator."""
    intensity: Intensity
    statistics: dict[str, Any]
    """What `Statistics.summary` says, and under `build` what the job counted."""
    lineage: dict[str, str]
    """URIs of the inputs and their content hashes."""
    job: dict[str, Any]
    """The resolved job that made it."""
    shards: tuple[Shard, ...]
    digest: str = ""
    """sha256 of everything above: the manifest checks itself."""


def columns(extra: dict[str, str]) -> dict[str, str]:
    """Every column of a store and its type, in stored order: metadata, extras by name, and the image last."""
    known = dict(COLUMNS)
    image = known.pop("image")
    return {**known, **dict(sorted(extra.items())), "image": image}


def content_hash(spec: CropSpec, extra: dict[str, str], groups: Iterable[StoredGroup]) -> str:
    """sha256 over the spec, the columns and the content digests of the row groups in order."""
    total = hashlib.sha256()
    total.update(
        output.canonical({"spec": spec.model_dump(mode="json"), "columns": columns(extra), "version": VERSION})
    )
    for group in groups:
        total.update(f"{group.rows} {group.content}\n".encode())
    return total.hexdigest()


def self_digest(data: bytes) -> str:
    """sha256 of the bytes of a manifest, its own `digest` taken out."""
    return hashlib.sha256(re.sub(rb'(?m)^"digest": "[0-9a-f]*"', b'"digest": ""', data, count=1)).hexdigest()


@functools.lru_cache(maxsize=2)
def parse_manifest(uri: str, data: bytes) -> CropManifest:
    """Check the bytes of a manifest read from `uri`; 4 MB, for 21,600 row groups, in a third of a second, and the same
    bytes again at once. What it gives is shared: do not change it.

    Raises:
        DataError: for another format, an unknown version, ill-formed content, or content that its digests deny.
    """
    try:
        manifest = CropManifest.model_validate_json(data)
    except ValidationError as error:
        raise _refusal(uri, data, error) from None
    if manifest.digest != self_digest(data):
        raise DataError(
            uri, "the manifest does not match its own digest", "it was changed or damaged after publication"
        )
    groups = (group for shard in manifest.shards for group in shard.row_groups)
    if manifest.content_hash != content_hash(manifest.spec, manifest.extra_columns, groups):
        raise DataError(uri, "the content hash does not follow from the row groups' digests")
    return manifest


def _refusal(uri: str, data: bytes, error: ValidationError) -> DataError:
    try:
        tree = json.loads(data)
    except ValueError as broken:
        return DataError(uri, f"not valid JSON: {broken}")
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        kind = tree.get("format") if isinstance(tree, dict) else type(tree).__name__
        inside = "; the images of a cell store are the crop store in its folder crops/" if kind == CELLS else ""
        return DataError(uri, f"not a crop store: its format is {kind!r}", f"expected {FORMAT!r}{inside}")
    if tree.get("version") != VERSION:
        return DataError(uri, f"unknown version {tree.get('version')!r} of {FORMAT}", f"this program reads {VERSION}")
    first = error.errors(include_url=False)[0]
    return DataError(uri, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
