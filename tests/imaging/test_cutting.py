"""A crop holds its nucleus, centred and whole, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmic_ray.imaging.crops import Patch, cut, fits, render
from cosmic_ray.imaging.segment import measure

SIZE = 24


def field_of(draw) -> tuple[np.ndarray, np.ndarray]:
    """(2, 60, 70) uint16 field and labels: ellipses that lie close, some over the border."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    y, x = np.mgrid[:60, :70]
    labels = np.zeros((60, 70), np.int32)
    for label in range(1, 9):
        row, column, a, b = *rng.uniform(0, 60, 2), *rng.uniform(2, 14, 2)
        labels[((y - row) / a) ** 2 + ((x - column) / b) ** 2 <= 1] = label
    return rng.integers(0, 65536, (2, 60, 70)).astype(np.uint16), labels


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_crop_is_its_nucleus_centred_and_nothing_else(data):
    field, labels = field_of(data.draw)
    columns = measure(labels, field[0])
    for row in np.flatnonzero(fits(columns, SIZE)):
        packed = cut(field, labels, columns, row, SIZE).pack()
        crop = np.zeros((2, SIZE, SIZE), np.uint8)
        render(Patch.unpack(packed, 2), [(np.float32(257), np.float32(0))] * 2, crop)
        inside = labels == columns["label"][row]
        assert (crop > 0).sum() == 2 * columns["area_px"][row]
        expected = np.clip(np.rint(field[:, inside] / 257), 1, 255)
        np.testing.assert_array_equal(crop[:, crop[0] > 0], expected)
        y, x = np.nonzero(crop[0])
        assert abs(y.mean() - (SIZE - 1) / 2) <= 0.5 + 1e-9
        assert abs(x.mean() - (SIZE - 1) / 2) <= 0.5 + 1e-9


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_does_not_fit_would_have_been_truncated(data):
    field, labels = field_of(data.draw)
    columns = measure(labels, field[0])
    kept = fits(columns, SIZE)
    for row in range(len(kept)):
        y, x = np.nonzero(labels == columns["label"][row])
        top = np.floor(y.mean() - (SIZE - 1) / 2 + 0.5)
        left = np.floor(x.mean() - (SIZE - 1) / 2 + 0.5)
        assert kept[row] == (y.min() >= top and y.max() < top + SIZE and x.min() >= left and x.max() < left + SIZE)


def test_worked_by_hand():
    labels = np.zeros((10, 10), int)
    labels[4:6, 4:7] = 3
    labels[4:6, 7] = 4
    field = np.arange(100, dtype=np.uint8).reshape(1, 10, 10)
    columns = measure(labels, field[0])
    patch = cut(field, labels, columns, 0, 8)
    assert (patch.top, patch.left) == (3, 2)
    assert patch.pixels.tolist() == [[44, 45, 46, 54, 55, 56]]
    crop = np.zeros((1, 8, 8), np.uint8)
    render(patch, None, crop)
    assert crop[0, 3:5, 2:5].tolist() == [[44, 45, 46], [54, 55, 56]]
    assert crop.sum() == patch.pixels.sum()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (13, 11)])
def test_a_patch_survives_packing(dtype, shape):
    rng = np.random.default_rng(0)
    mask = rng.random(shape) < 0.6
    mask.flat[0] = True
    pixels = rng.integers(0, np.iinfo(dtype).max, (3, mask.sum())).astype(dtype)
    back = Patch.unpack(Patch(2, 7, mask, pixels).pack(), 3)
    assert (back.top, back.left) == (2, 7)
    np.testing.assert_array_equal(back.mask, mask)
    np.testing.assert_array_equal(back.pixels, pixels)
