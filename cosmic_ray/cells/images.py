"""The images of cells: files in a folder or a zip, crops of a crop store, or masks out of a label image."""

from __future__ import annotations

import hashlib
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pyarrow as pa

from cosmic_ray import storage
from cosmic_ray.cells.h5ad import require_column
from cosmic_ray.errors import DataError
from cosmic_ray.imaging.crops import cut, fits, render
from cosmic_ray.imaging.fields import Rejected, read_labels
from cosmic_ray.imaging.read import FieldError, read_field
from cosmic_ray.imaging.segment import measure
from cosmic_ray.stores.columns import image_column, table_schema
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.manifest import COLUMNS, CropSpec, Intensity

if TYPE_CHECKING:
    import pandas as pd

    from cosmic_ray.cells.job import Images

_MEASURED = ("area_px", "centroid_x", "centroid_y", "eccentricity", "mean_intensity")
_MOST_BYTES = 2**28


@dataclass
class Found:
    """Which image is whose."""

    where: dict[str, str | int]
    """Cell id -> where its image is: a name, a row, a label. Ids without an image are not in it."""
    faults: dict[str, tuple[str, str]]
    """Cell id -> (reason, detail) where it cannot be told which image is whose."""
    orphans: list[str]
    """Images of no cell."""
    total: int
    """Images in all."""


@dataclass
class Crops:
    """The images of some cells."""

    rows: pa.Table
    """Rows of a crop store, one for each cell whose image is usable, in the order asked for."""
    faults: dict[str, tuple[str, str]]
    """Cell id -> (reason, detail) of those that are not."""
    digest: str
    """Of what was read: `added` over the cells."""


def added(digests: Iterable[str]) -> str:
    """One digest of several (hex, 256 bits), the same in any order and however they are put together."""
    return f"{sum(int(digest, 16) for digest in digests) % 2**256:064x}"


class Source(Protocol):
    """Where images come from."""

    spec: CropSpec
    """What every image is."""
    intensity: Intensity
    late: bool
    """Whether images are best read in the order of the store to be, and are known to be whole without a look."""
    digest: str
    """sha256 of the whole source, where it is known without reading each image; else empty."""

    def find(self, cells: pd.DataFrame) -> Found:
        """Which image is whose, `cells` being `cell_id` and columns of obs."""

    def read(self, cell_ids: Sequence[str], where: Sequence[str | int]) -> Crops:
        """The images of these cells."""


@contextmanager
def open_images(images: Images, threads: int) -> Iterator[Source]:
    """Open the images of a job for the block.

    Raises:
        DataError: where they are not what the job says.
    """
    uri = storage.absolute(images.uri)
    if images.holds == "crops":
        yield StoredCrops(CropStore.open(uri))
    elif images.holds == "labels":
        yield Labels(uri, images)
    elif uri.endswith(".zip"):
        with storage.local_file(uri) as path, _zip(uri, path) as archive:
            members = [info for info in archive.infolist() if not info.is_dir()]
            by_name = {info.filename: info for info in members}
            names = [info.filename for info in members]
            yield Files(uri, images, names, lambda name: _member(uri, archive, by_name[name]), threads)
    else:
        names = [found.removeprefix(uri).strip("/") for found in storage.listing(uri)]
        yield Files(uri, images, names, lambda name: storage.read_bytes(storage.join(uri, name)), threads)


def _zip(uri: str, path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(uri, f"not a zip file, or a damaged one: {error}") from None


def _member(uri: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.file_size > _MOST_BYTES:
        raise FieldError(storage.join(uri, info.filename), "absurd header", f"{info.file_size:,} bytes")
    try:
        return archive.read(info)
    except Exception as error:  # zipfile's own, zlib's, lzma's, and RuntimeError for a password
        raise FieldError(storage.join(uri, info.filename), "corrupt", f"{type(error).__name__}: {error}") from None


class Files:
    """One file a cell."""

    late, digest = False, ""

    def __init__(self, uri: str, images: Images, names: list[str], read: Callable[[str], bytes], threads: int):
        """`names`: paths below `uri`; one that stands twice is two images. `read`: the bytes of one."""
        self._uri, self._images, self._names, self._bytes, self._threads = uri, images, names, read, threads
        self.spec = images.spec
        described = "image files; those of 8 bits as they are"
        self.intensity = Intensity(scope="stored", description=described, masked=False)

    def find(self, cells: pd.DataFrame) -> Found:
        before, after = self._images.name.split("{cell_id}")
        ids = {before + cell_id + after: cell_id for cell_id in cells["cell_id"]}
        depths = sorted({name.count("/") + 1 for name in ids}, reverse=True)
        seen: dict[str, list[str | int]] = {}
        orphans = []
        for name in self._names:
            if storage.name(name).startswith("."):  # what file managers and archivers leave beside
                continue
            ends = ("/".join(name.split("/")[-depth:]) for depth in depths)
            cell_id = next((ids[end] for end in ends if end in ids), None)
            if cell_id is not None:
                seen.setdefault(cell_id, []).append(name)
            elif name.endswith(after):
                orphans.append(name)
        return _found(seen, orphans)

    def read(self, cell_ids: Sequence[str], where: Sequence[str | int]) -> Crops:
        with ThreadPoolExecutor(self._threads) as pool:
            read = list(pool.map(self._read_one, where))
        good = [index for index, (crop, _, _) in enumerate(read) if crop is not None]
        named = (f"{cell_id} {digest}" for cell_id, (_, _, digest) in zip(cell_ids, read, strict=True))
        total = added(hashlib.sha256(name.encode()).hexdigest() for name in named)
        faults = {cell_ids[i]: fault for i, (crop, fault, _) in enumerate(read) if crop is None}
        crops = np.stack([read[index][0] for index in good]) if good else np.empty((0, *self.spec.shape), np.uint8)
        masks = [crop.any(axis=0) for crop in crops]
        known = [measure(mask.astype(np.int32), crop[0]) for mask, crop in zip(masks, crops, strict=True)]
        measured = {name: np.array([one[name][0] for one in known]) for name in _MEASURED}
        uris = [storage.join(self._uri, str(where[index])) for index in good]
        rows = _rows([cell_ids[index] for index in good], uris, crops, measured, self._images.pixel_size_um)
        return Crops(rows, faults, total)

    def _read_one(self, name: str | int) -> tuple[np.ndarray | None, tuple[str, str], str]:
        try:
            data = self._bytes(str(name))
            digest = hashlib.sha256(data).hexdigest()
            return self._decoded(str(name), data), ("", ""), digest
        except FieldError as error:
            return None, (_REASONS.get(error.reason, f"{error.reason} image"), f"{name}: {error.detail}"), ""

    def _decoded(self, name: str, data: bytes) -> np.ndarray:
        count = len(self.spec.channels)
        if count > 1 and _has_channel(data, name, count):
            raise FieldError(name, "wrong dimensions", f"does not hold {count} channels")
        crop = np.stack([read_field(data, name, channel if count > 1 else None) for channel in range(count)])
        if crop.dtype != np.uint8:
            raise FieldError(name, "wrong dtype", f"{crop.dtype}, not uint8")
        if crop.shape != self.spec.shape:
            raise FieldError(name, "wrong dimensions", f"{crop.shape[1:]} px, not {self.spec.shape[1:]}")
        return crop


def _has_channel(data: bytes, name: str, channel: int) -> bool:
    """Whether there is such a channel, from 0; a grey image, asked for one, is taken for any."""
    try:
        read_field(data, name, channel)
    except FieldError as error:
        return error.reason in ("black", "flat")
    return True


_REASONS = {"wrong dimensions": "wrong size or channels", "wrong dtype": "wrong pixel type"}


class StoredCrops:
    """Crops of a crop store, taken as they are."""

    late = True

    def __init__(self, store: CropStore):
        self._store = store
        self.spec, self.intensity, self.digest = store.spec, store.manifest.intensity, store.content_hash

    def find(self, cells: pd.DataFrame) -> Found:
        wanted = set(cells["cell_id"])
        seen: dict[str, list[str | int]] = {}
        orphans = []
        for row, crop_id in enumerate(self._store.metadata(["crop_id"])["crop_id"].to_pylist()):
            if crop_id in wanted:
                seen.setdefault(crop_id, []).append(row)
            else:
                orphans.append(crop_id)
        return _found(seen, orphans)

    def read(self, cell_ids: Sequence[str], where: Sequence[str | int]) -> Crops:
        rows = np.array(where, np.int64)
        table = self._store.metadata([name for name in self._store.columns if name != "image"], rows)
        return Crops(table.append_column("image", image_column(self._store.crops(rows))), {}, self.digest)


class Labels:
    """Masks of the nuclei of one label image."""

    late = False

    def __init__(self, uri: str, images: Images):
        self._uri, self._images, self.spec = uri, images, images.spec
        data = storage.read_bytes(uri)
        self.digest = hashlib.sha256(data).hexdigest()
        try:
            self._labels = read_labels(data, uri)
        except Rejected as error:
            raise DataError(uri, f"{error.reason} {error.detail}", "images.uri is a label image") from None
        self._columns = measure(self._labels, self._labels)
        self._place = {int(label): row for row, label in enumerate(self._columns["label"])}
        self._fits = fits(self._columns, self.spec.height)
        self.intensity = Intensity(scope="stored", description="masks: 255 is the nucleus", masked=True)

    def find(self, cells: pd.DataFrame) -> Found:
        column = str(self._images.label)
        require_column(cells, column, self._uri, "images.label")
        labels = cells[column].to_numpy()
        if labels.dtype.kind not in "iu":
            raise DataError(self._uri, f"column {column!r} holds {labels.dtype}, not the numbers of nuclei")
        times = Counter(labels.tolist())
        where: dict[str, str | int] = {}
        faults = {}
        for cell_id, label in zip(cells["cell_id"], labels.tolist(), strict=True):
            if label in self._place and times[label] == 1:
                where[cell_id] = label
            elif label in self._place:
                faults[cell_id] = ("several cells", f"nucleus {label} is that of {times[label]} cells")
        orphans = [str(label) for label in self._place if label not in times]
        return Found(where, faults, orphans, len(self._place))

    def read(self, cell_ids: Sequence[str], where: Sequence[str | int]) -> Crops:
        rows = np.array([self._place[int(label)] for label in where], np.int64)
        large = ~self._fits[rows]
        side = self.spec.height
        faults = {
            cell_ids[i]: ("too large", f"nucleus {where[i]} does not fit into {side} px") for i in np.flatnonzero(large)
        }
        good = np.flatnonzero(~large)
        crops = np.zeros((len(good), *self.spec.shape), np.uint8)
        white = np.full((1, *self._labels.shape), 255, np.uint8)
        for crop, row in zip(crops, rows[good], strict=True):
            render(cut(white, self._labels, self._columns, int(row), self.spec.height), None, crop)
        measured = {name: self._columns[name][rows[good]] for name in _MEASURED} | {
            "mean_intensity": np.full(len(good), 255.0)
        }
        ids = [cell_ids[i] for i in good]
        table = _rows(ids, [self._uri] * len(ids), crops, measured, self._images.pixel_size_um)
        return Crops(table, faults, self.digest)


def _found(seen: dict[str, list[str | int]], orphans: list[str]) -> Found:
    """Of cells with several images none is taken: nobody knows which one it is."""
    where = {cell_id: places[0] for cell_id, places in seen.items() if len(places) == 1}
    several = {cell_id: places for cell_id, places in seen.items() if len(places) > 1}
    faults = {cell_id: ("several images", ", ".join(map(str, places[:3]))) for cell_id, places in several.items()}
    return Found(where, faults, orphans, len(orphans) + sum(map(len, seen.values())))


def _rows(
    ids: list[str], uris: list[str], crops: np.ndarray, measured: dict[str, np.ndarray], pixel_size_um: float | None
) -> pa.Table:
    """Rows of a crop store; what is not known is "" or NaN."""
    count = len(ids)
    given = {"crop_id": ids, "field_uri": uris, "image": image_column(crops), **measured}
    given |= {"pixel_size_um": np.full(count, pixel_size_um or np.nan)}
    given |= {"intensity_scale": np.ones(count), "intensity_offset": np.zeros(count)}
    empty = {name: [""] * count for name, kind in COLUMNS.items() if kind == "string"}
    columns = {name: {**empty, **given}[name] for name in COLUMNS}
    schema = table_schema({})
    return pa.table({name: pa.array(values, schema.field(name).type) for name, values in columns.items()}, schema)
