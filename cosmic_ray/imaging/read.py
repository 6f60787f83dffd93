"""One channel of one field, from the bytes of a TIFF, PNG or JPEG; whatever is wrong with them is a `FieldError`."""

from __future__ import annotations

import io
import struct
from typing import Literal, get_args

import numpy as np

from cosmic_ray.errors import DataError

Reason = Literal[
    "empty",
    "truncated",
    "corrupt",
    "unsupported format",
    "wrong dtype",
    "wrong dimensions",
    "absurd header",
    "black",
    "flat",
]
REASONS: tuple[str, ...] = get_args(Reason)

PIXEL_LIMIT = 2**28
"""Most pixels a plane may have (16,384 x 16,384); times two bytes, what one read may allocate a channel."""

MIN_SIDE = 16
"""Shortest side in px that is still taken for a field."""


class FieldError(DataError):
    """A field that cannot be used: `reason` is one of `REASONS`, `detail` says what was seen."""

    def __init__(self, uri: str, reason: Reason, detail: str = ""):
        self.reason, self.detail = reason, detail
        super().__init__(uri, reason + (f": {detail}" if detail else ""))

    def __reduce__(self) -> tuple:
        return FieldError, (self.uri, self.reason, self.detail)


class _Bad(Exception):
    def __init__(self, reason: Reason, detail: str = ""):
        self.reason, self.detail = reason, detail


def read_field(data: bytes, uri: str, channel: int | None = None, page: int | None = None) -> np.ndarray:
    """Decode one channel of one field.

    A TIFF is a chain of pages, each of one or several samples a pixel. `page` picks the page (default 0, and then the
    file must have one). `channel` picks the sample; where pages have one sample each, as in OME and ImageJ stacks, it
    picks the page `page + channel`. Neither is needed for a grey image, nor for RGB whose three samples are equal;
    true colour needs `channel`. Alpha is ignored. Palette TIFFs give their indices (ImageJ stores intensities there),
    and "min is white" is inverted, so that nuclei are bright.

    Args:
        data: the file.
        uri: its name, for the error only.
        channel: index of the channel, from 0; None for the only one.
        page: index of the TIFF page, from 0.

    Returns:
        (H, W) uint8 or uint16, C-contiguous, both sides at least `MIN_SIDE`, neither black nor of one value.

    Raises:
        FieldError: for anything else. Headers are checked against `PIXEL_LIMIT` before memory is asked for.
    """
    try:
        plane = _one_channel(_decode(data, channel, page), channel)
        return _checked(plane)
    except _Bad as bad:
        raise FieldError(uri, bad.reason, bad.detail) from None


def _decode(data: bytes, channel: int | None, page: int | None) -> np.ndarray:
    if not data:
        raise _Bad("empty", "no bytes")
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _guarded(_tiff, data, channel, page)
    if page:
        raise _Bad("wrong dimensions", f"page {page} of a file that has one")
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _guarded(_png, data)
    if data[:2] == b"\xff\xd8":
        return _guarded(_jpeg, data)
    if len(data) < 8:
        raise _Bad("truncated", f"{len(data)} bytes")
    raise _Bad("unsupported format", f"starts with {data[:8]!r}; TIFF, PNG and JPEG are read")


def _guarded(decoder, *args) -> np.ndarray:
    """Decoders of damaged bytes raise nearly anything: an index error in a tag table, zlib's own, a struct error."""
    try:
        return decoder(*args)
    except _Bad:
        raise
    except MemoryError as error:
        raise _Bad("absurd header", str(error)) from None
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        short = any(word in text.lower() for word in ("truncat", "too small", "end of file", "eof", "not enough"))
        raise _Bad("truncated" if short else "corrupt", text[:200]) from None


def _check_size(height: int, width: int, samples: int = 1) -> None:
    if height < 1 or width < 1 or samples < 1 or height * width * samples > 4 * PIXEL_LIMIT:
        raise _Bad("absurd header", f"{height} x {width} pixels of {samples} samples")
    if height * width > PIXEL_LIMIT:
        raise _Bad("absurd header", f"{height} x {width} pixels; the limit is {PIXEL_LIMIT} a plane")


def _png(data: bytes) -> np.ndarray:
    import imagecodecs

    if len(data) < 33:
        raise _Bad("truncated", f"{len(data)} bytes")
    width, height, bits, colour = struct.unpack(">IIBB", data[16:26])
    _check_size(height, width)
    if bits < 8 and colour != 3:
        raise _Bad("wrong dtype", f"{bits} bits a sample; 8 and 16 are read")
    return imagecodecs.png_decode(data)


def _jpeg(data: bytes) -> np.ndarray:
    """Through Pillow: libjpeg itself fills what is missing with grey and says nothing."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG",))
    except Image.DecompressionBombError as error:
        raise _Bad("absurd header", str(error)) from None
    _check_size(image.height, image.width)
    if image.mode not in ("L", "RGB"):
        raise _Bad("unsupported format", f"JPEG of mode {image.mode}")
    return np.asarray(image)


def _tiff(data: bytes, channel: int | None, page: int | None) -> np.ndarray:
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data), _multifile=False) as file:
        pages = [item for item in file.pages if not item.is_reduced]
        if not pages:
            raise _Bad("empty", "no page")
        index = page or 0
        if page is None and channel is None and len(pages) > 1:
            raise _Bad("wrong dimensions", f"{len(pages)} pages: say which page or channel")
        if channel is not None and index < len(pages) and pages[index].samplesperpixel == 1:
            index += channel
        if not 0 <= index < len(pages):
            raise _Bad("wrong dimensions", f"page {index} of a file that has {len(pages)}")
        chosen = pages[index].aspage()
        _check_page(chosen, len(data))
        image = chosen.asarray(maxworkers=1)
        if chosen.planarconfig == tifffile.PLANARCONFIG.SEPARATE and chosen.samplesperpixel > 1:
            image = np.moveaxis(image, 0, -1)
        inverted = chosen.photometric == tifffile.PHOTOMETRIC.MINISWHITE and image.dtype.kind == "u"
    return (2**chosen.bitspersample - 1 - image).astype(image.dtype) if inverted else image


def _check_page(page, size: int) -> None:
    """Header against the bytes that are there, before anything is decoded."""
    if page.dtype is None or page.dtype.kind != "u" or page.dtype.itemsize > 2 or page.bitspersample < 8:
        raise _Bad("wrong dtype", f"{page.bitspersample}-bit {page.dtype}; 8- and 16-bit unsigned integers are read")
    if page.imagedepth != 1:
        raise _Bad("wrong dimensions", f"a volume of {page.imagedepth} planes in one page")
    _check_size(page.imagelength, page.imagewidth, page.samplesperpixel)
    tile = 1
    for side in page.chunks:
        tile *= int(side)
    if tile > 4 * PIXEL_LIMIT:
        raise _Bad("absurd header", f"tiles of {page.chunks}")
    needed = int(np.prod(page.chunked, dtype=np.int64))
    if len(page.dataoffsets) < needed or len(page.databytecounts) < needed:
        raise _Bad("truncated", f"{len(page.dataoffsets)} of {needed} strips or tiles")
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False):
        if offset <= 0 or count <= 0 or offset + count > size:
            raise _Bad("truncated", f"a strip or tile ends at byte {offset + count} of {size}")


def _one_channel(image: np.ndarray, channel: int | None) -> np.ndarray:
    if image.ndim == 2:
        return image
    if image.ndim != 3:
        raise _Bad("wrong dimensions", f"an image of shape {image.shape}")
    samples = image.shape[-1]
    if channel is not None:
        if not 0 <= channel < samples:
            raise _Bad("wrong dimensions", f"channel {channel} of {samples}")
        return image[..., channel]
    colours = samples - 1 if samples in (2, 4) else samples
    if colours == 3 and not (image[..., 0] == image[..., 1]).all() & (image[..., 0] == image[..., 2]).all():
        raise _Bad("wrong dimensions", "a colour image: say which channel")
    if colours not in (1, 3):
        raise _Bad("wrong dimensions", f"{samples} channels: say which one")
    return image[..., 0]


def _checked(plane: np.ndarray) -> np.ndarray:
    if plane.dtype not in (np.uint8, np.uint16):
        raise _Bad("wrong dtype", f"{plane.dtype}; uint8 and uint16 are read")
    if min(plane.shape) < MIN_SIDE:
        raise _Bad("wrong dimensions", f"{plane.shape[0]} x {plane.shape[1]} px; the shortest side is {MIN_SIDE}")
    low, high = plane.min(), plane.max()
    if low == high:
        raise _Bad("flat" if high else "black", f"every pixel is {high}")
    return np.ascontiguousarray(plane, dtype=plane.dtype.newbyteorder("="))
