"""One entry of a catalogue -> its pixels: channels read, corrected, brought to one pixel size; labels where given."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import xxhash

from cosmic_ray import storage
from cosmic_ray.errors import DataError, NotFoundError
from cosmic_ray.imaging.catalogue import Entry
from cosmic_ray.imaging.quality import white_pixels
from cosmic_ray.imaging.read import PIXEL_LIMIT, FieldError, read_field
from cosmic_ray.imaging.source import Source

_AHEAD = 2
_FACTORS = (1 / 16, 16)


class Rejected(Exception):
    """A field that is left out: `reason` is a few words to count by, `detail` what was seen."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


@dataclass(frozen=True)
class Field:
    """The pixels of one field."""

    pixels: np.ndarray
    """(C, H, W) uint8 or uint16."""
    labels: np.ndarray | None
    """(H, W) int32 where the catalogue gives a label image."""
    white: np.ndarray
    """(H, W) bool: where the first channel's file lies at the camera's white level, before anything was corrected."""
    factor: float
    """How much larger it is than its files, along each side; 1 where it was not rescaled."""
    pixel_size_um: float
    """Micrometres a pixel of `pixels`; NaN where unknown."""


def fetched(entries: Iterable[Entry]) -> Iterator[tuple[Entry, dict[str, bytes] | Rejected]]:
    """Each entry with the bytes of its files and label image by URI, or why they cannot be had; reads ahead."""
    entries = list(entries)
    with ThreadPoolExecutor(_AHEAD) as pool:
        ahead: list[Future] = [pool.submit(_fetch, entry) for entry in entries[:_AHEAD]]
        for position, entry in enumerate(entries):
            data = ahead.pop(0).result()
            if position + _AHEAD < len(entries):
                ahead.append(pool.submit(_fetch, entries[position + _AHEAD]))
            yield entry, data


def _fetch(entry: Entry) -> dict[str, bytes] | Rejected:
    """A file that is missing or refused is left out; a server that does not answer ends the job, to be resumed."""
    if entry.reason:
        return Rejected(entry.reason, entry.detail)
    data: dict[str, bytes] = {}
    try:
        for uri in dict.fromkeys([*entry.files, *([entry.label_uri] if entry.label_uri else [])]):
            data[uri] = storage.read_bytes(uri)
    except NotFoundError:
        return Rejected("missing", f"no file {uri}")
    except DataError as error:
        if not error.problem.startswith(("access refused", "the file system refused")):
            raise
        return Rejected("unreadable", str(error))
    return data


def digest_of(data: dict[str, bytes]) -> str:
    """xxh3_128 over the bytes of an entry's files, label image last."""
    total = xxhash.xxh3_128()
    for blob in data.values():
        total.update(len(blob).to_bytes(8, "little") + blob)
    return total.hexdigest()


def load_field(entry: Entry, source: Source, data: dict[str, bytes], target_um_px: float | None) -> Field:
    """Decode the files of `entry`.

    Args:
        data: the files' bytes by URI.
        target_um_px: the field is rescaled to this pixel size; None leaves it.

    Raises:
        Rejected: where anything is wrong with them.
    """
    raw = [_plane(entry, source, position, data) for position in range(len(source.channels))]
    white = white_pixels(raw[0])
    planes = [_corrected(plane, uri) for plane, uri in zip(raw, entry.illumination or [""] * len(raw), strict=True)]
    shapes = {plane.shape for plane in planes}
    if len(shapes) > 1:
        raise Rejected("wrong dimensions", f"channels differ: {sorted(shapes)}")
    pixels = np.stack(planes)
    labels = read_labels(data[entry.label_uri], entry.label_uri) if entry.label_uri else None
    if labels is not None and labels.shape != pixels.shape[1:]:
        raise Rejected("label image", f"its shape is {labels.shape}, the field's {pixels.shape[1:]}")
    return _rescaled(Field(pixels, labels, white, 1.0, entry.pixel_size_um), target_um_px)


def _plane(entry: Entry, source: Source, position: int, data: dict[str, bytes]) -> np.ndarray:
    uri = entry.files[position]
    page = entry.page if entry.page >= 0 else None
    try:
        return read_field(data[uri], uri, channel=source.channels[position].index, page=page)
    except FieldError as error:
        raise Rejected(error.reason, error.detail) from None


def _corrected(plane: np.ndarray, uri: str) -> np.ndarray:
    if not uri:
        return plane
    function = _illumination(uri)
    if isinstance(function, str):
        raise Rejected("illumination", f"{uri}: {function}")
    if function.shape != plane.shape:
        raise Rejected("illumination", f"{uri} has shape {function.shape}, the field {plane.shape}")
    return np.minimum(np.rint(plane / function), 65535).astype(np.uint16)


@functools.lru_cache(maxsize=16)
def _illumination(uri: str) -> np.ndarray | str:
    """(H, W) float32 above 0, or what is wrong with it; a plate's fields share one, so a few are kept."""
    try:
        function = np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False)
    except NotFoundError:
        return "no such file"
    except (ValueError, EOFError, OSError) as error:
        return f"not a .npy array: {error}"
    if (
        function.ndim != 2
        or function.dtype.kind not in "fu"
        or not (np.isfinite(function).all() and function.min() > 0)
    ):
        return "not a 2-D array of numbers above 0"
    return function.astype(np.float32)


def read_labels(data: bytes, uri: str) -> np.ndarray:
    """A label image: 0 background, one number a nucleus; an image of one number is a mask, split into its parts.

    Returns:
        (H, W) int32.

    Raises:
        Rejected: where it cannot be read, or is empty.
    """
    try:
        image = read_field(data, uri)
    except FieldError as error:
        if error.reason == "black":
            raise Rejected("no nuclei", "the label image is empty") from None
        if error.reason != "wrong dtype":
            raise Rejected("label image", f"{uri}: {error.reason}: {error.detail}") from None
        image = _wide_labels(data, uri)
    if image.min() < 0 or image.max() >= 2**31:
        raise Rejected("label image", f"{uri}: numbers from {image.min()} to {image.max()}")
    labels = image.astype(np.int32)
    if (labels[labels > 0] == labels.max()).all():
        from scipy import ndimage

        ndimage.label(labels, structure=np.ones((3, 3)), output=labels)
    return labels


def _wide_labels(data: bytes, uri: str) -> np.ndarray:
    """The first page of a TIFF of wide or signed integers, as other programs write labels."""
    import tifffile

    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages[0]
            if page.imagelength * page.imagewidth > PIXEL_LIMIT or page.dtype.kind not in "iu":
                raise ValueError(f"{page.imagelength} x {page.imagewidth} of {page.dtype}")
            image = page.asarray(maxworkers=1)
    except Exception as error:  # tifffile raises nearly anything on damaged bytes
        raise Rejected("label image", f"{uri}: {type(error).__name__}: {error}") from None
    if image.ndim != 2:
        raise Rejected("label image", f"{uri}: an image of shape {image.shape}")
    if not image.any():
        raise Rejected("no nuclei", "the label image is empty")
    return image


def _rescaled(field: Field, target: float | None) -> Field:
    """Channels by a triangle filter as wide as the coarser pixel, so that nothing aliases; the rest by nearest."""
    if target is None:
        return field
    if math.isnan(field.pixel_size_um):
        raise Rejected("pixel size unknown", "target_um_px is set, and the catalogue does not say pixel_size_um")
    factor = field.pixel_size_um / target
    if math.isclose(factor, 1, rel_tol=1e-3):
        return field
    height, width = (max(1, round(side * factor)) for side in field.pixels.shape[1:])
    if not _FACTORS[0] <= factor <= _FACTORS[1] or height * width > PIXEL_LIMIT:
        raise Rejected("absurd pixel size", f"{field.pixel_size_um:g} um/px to {target:g} makes {height} x {width} px")
    from PIL import Image

    def resized(plane: np.ndarray, method: int) -> np.ndarray:
        return np.asarray(Image.fromarray(plane).resize((width, height), method))

    scaled = [resized(plane.astype(np.float32), Image.Resampling.BILINEAR) for plane in field.pixels]
    pixels = np.stack([np.rint(plane).astype(field.pixels.dtype) for plane in scaled])
    labels = None if field.labels is None else resized(field.labels, Image.Resampling.NEAREST)
    return Field(pixels, labels, resized(field.white, Image.Resampling.NEAREST), factor, target)
