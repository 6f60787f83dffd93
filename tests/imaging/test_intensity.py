"""What is stored can be turned back into what was measured."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cosmic_ray.imaging.histogram import Histogram
from cosmic_ray.imaging.intensity import Intensity, patch_line, plate_line, quantise

PIXELS = st.sampled_from([np.uint8, np.uint16]).flatmap(lambda kind: hnp.arrays(kind, st.integers(2, 300)))


@settings(max_examples=200, deadline=None)
@given(pixels=PIXELS, low=st.floats(0, 20), high=st.floats(80, 100))
def test_raw_comes_back_within_half_a_step_between_the_ends(pixels, low, high):
    histogram = Histogram.of(pixels)
    scale, offset = plate_line(histogram, Intensity(low=low, high=high))
    stored = quantise(pixels, (scale, offset))
    assert stored.min() >= 1
    between = (pixels >= histogram.percentile(low)) & (pixels <= histogram.percentile(high))
    back = np.float64(offset) + np.float64(scale) * stored
    rounding = 1e-4 * max(1.0, float(scale))
    assert (np.abs(back - pixels)[between] <= scale / 2 + rounding + 0.01).all()
    assert (stored[pixels < histogram.percentile(low)] == 1).all()
    assert (stored[pixels > histogram.percentile(high)] == 255).all() or scale == 0
    order = np.argsort(pixels, kind="stable")
    assert (np.diff(stored[order].astype(int)) >= 0).all()


def test_a_plates_percentiles_become_1_and_255():
    pixels = np.arange(1000, 2001, dtype=np.uint16)
    line = plate_line(Histogram.of(pixels), Intensity(low=0, high=100))
    assert quantise(np.array([0, 1000, 1500, 2000, 65535]), line).tolist() == [1, 1, 128, 255, 255]
    assert line[1] + line[0] * 255 == pytest.approx(2000)


def test_a_patch_goes_to_its_own_maximum_and_never_to_background():
    pixels = np.array([0, 1, 100, 500, 1020], np.uint16)
    line = patch_line(pixels)
    assert quantise(pixels, line).tolist() == [1, 1, 25, 125, 255]
    brighter = pixels * 7
    np.testing.assert_array_equal(quantise(brighter, patch_line(brighter)), quantise(pixels, line))


@pytest.mark.parametrize("value", [0, 1, 255, 40000])
def test_pixels_of_one_value_come_back_exactly(value):
    pixels = np.full(9, value, np.uint16)
    for scale, offset in (plate_line(Histogram.of(pixels), Intensity()), patch_line(pixels)):
        stored = quantise(pixels, (scale, offset))
        assert stored.min() >= 1
        np.testing.assert_allclose(offset + scale * stored.astype(np.float64), value, rtol=1e-6)


def test_two_patches_of_a_plate_keep_their_order_of_brightness():
    dim, bright = np.full(50, 900, np.uint16), np.full(50, 3000, np.uint16)
    line = plate_line(Histogram.of(np.concatenate([dim, bright])), Intensity())
    assert quantise(dim, line).max() < quantise(bright, line).min()
