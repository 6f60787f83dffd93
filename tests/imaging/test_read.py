"""Reading fields: what is accepted comes back exactly, what is not is named, and damaged bytes raise nothing else."""

from __future__ import annotations

import io
import logging
import pickle
import struct
import tracemalloc

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cosmic_ray.imaging.read import PIXEL_LIMIT, REASONS, FieldError, read_field

RNG = np.random.default_rng(7)
GREY8 = RNG.integers(0, 255, (40, 50), dtype=np.uint8)
GREY16 = RNG.integers(0, 65535, (40, 50), dtype=np.uint16)
STACK = RNG.integers(0, 4095, (3, 40, 50), dtype=np.uint16)


def tiff(image: np.ndarray, **kwargs) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, image, **kwargs)
    return out.getvalue()


def pillow(image: np.ndarray, kind: str, **kwargs) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, kind, **kwargs)
    return out.getvalue()


def reason(data: bytes, **kwargs) -> str:
    with pytest.raises(FieldError) as caught:
        read_field(data, "a/field.tif", **kwargs)
    assert caught.value.reason in REASONS
    assert "a/field.tif" in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "zstd", "packbits"])
@pytest.mark.parametrize("image", [GREY8, GREY16], ids=["8", "16"])
def test_tiff_comes_back_exactly(image, compression):
    predictor = compression in ("lzw", "zlib", "zstd")
    for extra in ({}, {"tile": (16, 16)}, {"rowsperstrip": 7}):
        read = read_field(tiff(image, compression=compression, predictor=predictor, **extra), "x")
        assert read.dtype == image.dtype
        np.testing.assert_array_equal(read, image)


def test_big_endian_and_bigtiff():
    read = read_field(tiff(GREY16, byteorder=">", bigtiff=True), "x")
    np.testing.assert_array_equal(read, GREY16)
    assert read.dtype.isnative


@pytest.mark.parametrize("kwargs", [{"photometric": "minisblack"}, {"imagej": True}, {"ome": True}])
def test_channels_in_pages(kwargs):
    data = tiff(STACK, **kwargs)
    for index in range(3):
        np.testing.assert_array_equal(read_field(data, "x", channel=index), STACK[index])
    np.testing.assert_array_equal(read_field(data, "x", channel=1, page=1), STACK[2])
    assert reason(data) == "wrong dimensions"
    assert reason(data, channel=3) == "wrong dimensions"


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_channels_in_one_page(planar):
    colour = RNG.integers(0, 65535, (40, 50, 3), dtype=np.uint16)
    stored = colour if planar == "contig" else np.ascontiguousarray(np.moveaxis(colour, -1, 0))
    data = tiff(stored, photometric="rgb", planarconfig=planar)
    np.testing.assert_array_equal(read_field(data, "x", channel=2), colour[..., 2])
    assert reason(data) == "wrong dimensions"


def test_reduced_pages_of_a_pyramid_are_no_channels():
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as writer:
        writer.write(GREY16)
        writer.write(GREY16[::2, ::2], subfiletype=1)
    np.testing.assert_array_equal(read_field(out.getvalue(), "x"), GREY16)


def test_min_is_white_is_inverted():
    np.testing.assert_array_equal(read_field(tiff(GREY8, photometric="miniswhite"), "x"), 255 - GREY8)


def test_png_and_jpeg():
    for image in (GREY8, GREY16):
        np.testing.assert_array_equal(read_field(imagecodecs.png_encode(image), "x"), image)
    repeated = np.repeat(GREY16[..., None], 3, -1)
    np.testing.assert_array_equal(read_field(imagecodecs.png_encode(repeated), "x"), GREY16)
    colour = np.stack([GREY8, GREY8, 255 - GREY8], -1)
    assert reason(pillow(colour, "PNG")) == "wrong dimensions"
    np.testing.assert_array_equal(read_field(pillow(colour, "PNG"), "x", channel=2), 255 - GREY8)
    data = pillow(GREY8, "JPEG", quality=95)
    np.testing.assert_array_equal(read_field(data, "x"), np.asarray(Image.open(io.BytesIO(data))))
    grey = pillow(np.repeat(GREY8[..., None], 3, -1), "JPEG", quality=95, subsampling=0)
    np.testing.assert_allclose(read_field(grey, "x").astype(int), np.asarray(Image.open(io.BytesIO(data))), atol=2)


def test_each_fault_has_its_reason():
    assert reason(b"") == "empty"
    assert reason(b"GIF89a..........") == "unsupported format"
    assert reason(tiff(GREY8.astype(np.float32))) == "wrong dtype"
    assert reason(tiff(GREY8.astype(np.int16))) == "wrong dtype"
    assert reason(pillow(GREY8 > 9, "PNG")) == "wrong dtype"
    assert reason(tiff(GREY8[:10])) == "wrong dimensions"
    assert reason(pillow(GREY8, "PNG"), page=2) == "wrong dimensions"
    assert reason(tiff(np.zeros_like(GREY8))) == "black"
    assert reason(tiff(np.full_like(GREY8, 7))) == "flat"
    for whole in (tiff(GREY16), tiff(GREY16, compression="lzw"), imagecodecs.png_encode(GREY16), pillow(GREY8, "JPEG")):
        assert reason(whole[: len(whole) // 2]) in ("truncated", "corrupt")


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_an_absurd_header_costs_no_memory(compression):
    data = bytearray(tiff(GREY16, compression=compression))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        for tag in ("ImageWidth", "ImageLength", "RowsPerStrip"):
            struct.pack_into("<I", data, file.pages[0].tags[tag].valueoffset, 2**31)
            struct.pack_into("<H", data, file.pages[0].tags[tag].offset + 2, 4)
    png = bytearray(imagecodecs.png_encode(GREY8))
    struct.pack_into(">II", png, 16, 2**15, 2 * PIXEL_LIMIT // 2**15)
    tracemalloc.start()
    assert reason(bytes(data)) == "absurd header"
    assert reason(bytes(png)) == "absurd header"
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_the_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(FieldError("s3://b/x.tif", "black", "every pixel is 0")))
    assert (error.uri, error.reason, error.detail) == ("s3://b/x.tif", "black", "every pixel is 0")


VALID = [
    tiff(GREY16),
    tiff(GREY8, compression="lzw", predictor=True),
    tiff(GREY16, compression="zlib", tile=(16, 16)),
    tiff(STACK, compression="zstd", photometric="minisblack"),
    tiff(STACK, ome=True),
    tiff(STACK, imagej=True),
    imagecodecs.png_encode(GREY16),
    pillow(GREY8, "PNG"),
    pillow(GREY8, "JPEG"),
]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_bytes_raise_only_field_errors(data):
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    raw = bytearray(data.draw(st.sampled_from(VALID)))
    header = st.integers(0, min(400, len(raw) - 1))
    anywhere = st.integers(0, len(raw) - 1)
    tail = st.integers(max(0, len(raw) - 400), len(raw) - 1)
    for position in data.draw(st.lists(header | anywhere | tail, max_size=6)):
        raw[position] = data.draw(st.integers(0, 255))
    raw = bytes(raw[: data.draw(st.just(len(raw)) | st.integers(0, len(raw)))])
    try:
        image = read_field(raw, "x", channel=data.draw(st.sampled_from([None, 0, 1])))
    except FieldError as error:
        assert error.reason in REASONS
    else:
        assert image.ndim == 2 and image.dtype in (np.uint8, np.uint16)
