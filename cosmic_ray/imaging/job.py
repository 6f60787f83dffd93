"""`build-crops`: fields -> a crop store, in three resumable steps."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from cosmic_ray import storage
from cosmic_ray.config import Job
from cosmic_ray.errors import JobError
from cosmic_ray.imaging.intensity import Intensity
from cosmic_ray.imaging.quality import Quality
from cosmic_ray.imaging.segment import Segmentation
from cosmic_ray.imaging.source import Source
from cosmic_ray.imaging.thresholds import AreaLimits
from cosmic_ray.stores.manifest import CropSpec
from cosmic_ray.stores.writer import COMPRESSION, GROUPS_PER_SHARD, ROWS_PER_GROUP

_SHARD_BYTES = 2**27


class BuildCrops(Job):
    """Cut every nucleus out of microscope fields, and publish the crops as a crop store.

    Below `out`: `shards/` and `manifest.json` (the store), `fields.parquet` (what became of each field),
    `rejected.parquet` (the fields left out, and why), `objects/` (every object found, and why it was left out).
    Killed at any point and run again, it goes on; the content hash is the same at any parallelism, and wherever the
    fields lie.
    """

    kind: ClassVar[str] = "build-crops"
    incidental: ClassVar[frozenset[str]] = frozenset({"workers", "chunk_fields", "memory_gib", "max_rejected_share"})

    source: Source | None = None
    """Where the fields are."""

    sources: dict[str, Source] = {}
    """Several of them, by name; each is a source of its own for `area.scope`."""

    recipe: Literal["paper", "better"] = "better"
    """What `segmentation.recipe`, `quality.enabled` and `intensity.mapping` are where the job does not say. `paper`:
    Otsu, no quality checks, each patch to [0, 1]. `better`: what beats it, brightness comparable within a plate."""

    crop_px: Annotated[int, Field(ge=8, le=4096)] = 128
    """Height and width of a crop in px; a nucleus that does not fit, centred, is left out and counted."""

    target_um_px: Annotated[float, Field(gt=0)] | None = None
    """Rescale every field to this pixel size before nuclei are searched; needs `pixel_size_um` of each field. By
    default fields keep their own."""

    segmentation: Segmentation = Segmentation()
    """How nuclei are found, where the catalogue gives no label images."""

    quality: Quality = Quality()
    """Which nuclei are too blurred, saturated or odd."""

    area: AreaLimits = AreaLimits()
    """Which nuclei are too small or too large."""

    intensity: Intensity = Intensity()
    """How raw intensities become uint8."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Decides the order of the store's rows, with the crop ids."""

    rows_per_group: Annotated[int, Field(ge=1)] = ROWS_PER_GROUP
    """Crops a row group, the unit that is read."""

    groups_per_shard: Annotated[int, Field(ge=1)] | None = None
    """Row groups a shard; by default 8, or fewer where that exceeds 128 MiB of pixels."""

    compression: Literal["none", "lz4", "zstd"] = COMPRESSION
    """Of the shards."""

    max_rejected_share: Annotated[float, Field(ge=0, le=1)] = 0.2
    """The job ends with an error where more than this share of the fields is rejected."""

    workers: Annotated[int, Field(ge=0)] | None = None
    """Tasks at a time; by default one for each CPU of the cluster. 0: one by one in this process, without Ray."""

    chunk_fields: Annotated[int, Field(ge=1)] | None = None
    """Fields a task; by default up to 64 (of ready crops: 4,096), fewer where there are few."""

    memory_gib: Annotated[float, Field(gt=0)] = 2.0
    """Memory that Ray sets aside for each task; fields above 30 Mpx need more."""

    @model_validator(mode="before")
    @classmethod
    def _recipe_decides(cls, data: Any) -> Any:
        """Fill what the recipe decides, so that the resolved job says it."""
        if not isinstance(data, dict) or data.get("recipe", "better") not in ("paper", "better"):
            return data
        better = data.get("recipe", "better") == "better"
        decided = {
            "segmentation": {"recipe": "better" if better else "paper"},
            "quality": {"enabled": better},
            "intensity": {"mapping": "plate" if better else "patch"},
        }
        filled = {key: decided[key] | data.get(key, {}) for key in decided if isinstance(data.get(key, {}), dict)}
        return {**data, **filled}

    @model_validator(mode="after")
    def _one_kind_of_crop(self) -> BuildCrops:
        if not self.catalogues:
            raise ValueError("needs `source`, or several `sources` by name")
        if self.source is not None and self.sources:
            raise ValueError("has both `source` and `sources`: put all of them under `sources`")
        kinds = {(tuple(c.name for c in source.channels), source.holds) for source in self.catalogues.values()}
        if len(kinds) > 1:
            raise ValueError(f"sources differ in their channels or in what they hold: {sorted(kinds)}")
        if self.ready and self.target_um_px is not None:
            raise ValueError("target_um_px is for fields; ready crops are taken as they are")
        return self

    @property
    def catalogues(self) -> dict[str, Source]:
        """All sources by name; a single one is called `source`."""
        return {"source": self.source} if self.source is not None else self.sources

    def key_of(self, name: str) -> str:
        """Where in the job the URI of the source `name` stands."""
        return "source.uri" if self.source is not None else f"sources.{name}.uri"

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels of a crop."""
        return tuple(channel.name for channel in next(iter(self.catalogues.values())).channels)

    @property
    def ready(self) -> bool:
        """Whether the sources hold ready crops."""
        return next(iter(self.catalogues.values())).holds == "crops"

    @property
    def spec(self) -> CropSpec:
        """What every image of the store is."""
        return CropSpec(channels=self.channels, height=self.crop_px, width=self.crop_px)

    @property
    def rows_per_shard(self) -> int:
        """Crops a shard."""
        fitting = max(1, _SHARD_BYTES // (self.rows_per_group * self.spec.nbytes))
        return self.rows_per_group * (self.groups_per_shard or min(GROUPS_PER_SHARD, fitting))

    def check(self) -> None:
        """Check that every source is there."""
        for name, source in self.catalogues.items():
            if not storage.exists(source.uri):
                remedy = "give a folder, a table, or s3://bucket/prefix"
                raise JobError(self.key_of(name), source.uri, "nothing is there", remedy)

    def run(self) -> dict[str, Any]:
        """Build the store, or find it built.

        Returns:
            `out`, `rows`, `content_hash`, `simulated`, `shards`, `fields`, `fields_rejected` and `objects_rejected`
            (reason -> count), `objects`, `area_limits_px` (source -> [smallest, largest]).
        """
        from cosmic_ray.imaging.build import build

        return build(self)
