"""Segmentation against what was drawn, and measurements against scikit-image."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cosmic_ray.imaging.segment import Segmentation, measure, otsu_threshold, segment

PAPER = Segmentation(recipe="paper")


def discs(shape: tuple[int, int], centres: list[tuple[float, float]], radius: float) -> np.ndarray:
    """(H, W) int32 labels of discs; a later one covers an earlier one."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    labels = np.zeros(shape, np.int32)
    for number, (row, column) in enumerate(centres, start=1):
        labels[(y - row) ** 2 + (x - column) ** 2 <= radius**2] = number
    return labels


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(st.sampled_from([np.uint8, np.uint16]), (9, 11), elements=st.integers(0, 255)))
def test_otsu_is_scikit_images(image):
    from skimage.filters import threshold_otsu

    if image.min() == image.max():
        assert otsu_threshold(image) == image[0, 0]
    else:
        # Where two thresholds separate equally well, either may win by a rounding: the split then has to be as good.
        assert (image > otsu_threshold(image)).any()
        assert _between(image, otsu_threshold(image)) == pytest.approx(_between(image, threshold_otsu(image)))


def _between(image: np.ndarray, threshold: float) -> float:
    upper, lower = image[image > threshold].astype(float), image[image <= threshold].astype(float)
    return upper.size * lower.size * (upper.mean() - lower.mean()) ** 2


def test_otsu_of_floats_is_scikit_images():
    from skimage.filters import threshold_otsu

    image = np.random.default_rng(0).gamma(2.0, size=(60, 60))
    assert otsu_threshold(image) == pytest.approx(threshold_otsu(image), rel=1e-12)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_paper_finds_bright_discs_and_drops_specks(dtype):
    truth = discs((80, 100), [(20, 20), (50, 70), (0, 50)], 9)
    image = np.where(truth > 0, 180, 20).astype(dtype)
    image[70, 5:9] = 200
    labels = segment(image, PAPER)
    assert labels.dtype == np.int32
    assert labels.max() == 3
    np.testing.assert_array_equal(labels > 0, truth > 0)
    assert segment(image, Segmentation(recipe="paper", min_area_px=4)).max() == 4


def test_paper_components_are_8_connected_and_numbered_by_first_pixel():
    image = np.zeros((30, 30), np.uint8)
    image[20:26, 2:8] = 9
    image[2:8, 10:16] = 9
    image[8:14, 16:22] = 9
    labels = segment(image, PAPER)
    assert labels[2, 10] == labels[13, 21] == 1
    assert labels[20, 2] == 2


def test_measurements_are_scikit_images():
    from skimage.measure import regionprops

    rng = np.random.default_rng(1)
    labels = discs((120, 140), [tuple(rng.uniform(5, 110, 2)) for _ in range(14)], 10) * 3
    image = rng.integers(0, 60000, labels.shape, dtype=np.uint16)
    table, truth = measure(labels, image), regionprops(labels, image)
    assert table["label"].tolist() == [one.label for one in truth]
    for column, name in [("area_px", "area"), ("eccentricity", "eccentricity"), ("mean_intensity", "intensity_mean")]:
        np.testing.assert_allclose(table[column], [getattr(one, name) for one in truth], rtol=1e-9, atol=1e-7)
    np.testing.assert_allclose(np.c_[table["centroid_y"], table["centroid_x"]], [one.centroid for one in truth])
    boxes = np.c_[table["bbox_top"], table["bbox_left"], table["bbox_bottom"], table["bbox_right"]]
    np.testing.assert_array_equal(boxes, [one.bbox for one in truth])
    np.testing.assert_allclose(table["major_axis_px"], [one.axis_major_length for one in truth])
    np.testing.assert_allclose(table["minor_axis_px"], [one.axis_minor_length for one in truth])
    # scikit-image takes the hull of the edges' midpoints and counts pixels in it; ours is that of the whole squares.
    np.testing.assert_allclose(table["solidity"], [one.solidity for one in truth], atol=0.08)


def test_measurements_worked_by_hand():
    labels = np.zeros((6, 8), np.int32)
    labels[1:4, 2:6] = 5
    labels[5, 7] = 9
    table = measure(labels, np.arange(48, dtype=np.uint8).reshape(6, 8))
    assert table["label"].tolist() == [5, 9]
    assert table["area_px"].tolist() == [12, 1]
    assert (table["centroid_y"][0], table["centroid_x"][0]) == (2, 3.5)
    assert table["solidity"].tolist() == [1, 1]
    assert table["mean_intensity"].tolist() == [2 * 8 + 3.5, 47]
    assert table["touches_border"].tolist() == [False, True]
    assert table["eccentricity"][0] == pytest.approx(np.sqrt(1 - (8 / 12) / (15 / 12)))
    assert table["eccentricity"][1] == 0


def test_no_objects_no_rows():
    table = measure(np.zeros((20, 20), np.int32), np.ones((20, 20), np.uint8))
    assert {len(column) for column in table.values()} == {0}
