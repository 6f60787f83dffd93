"""Each quality check on a drawn object that has just that fault, and on one that has none."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from cosmic_ray.imaging.quality import QUALITY_REASONS, Quality, check_objects
from cosmic_ray.imaging.segment import measure

RADIUS = 14


def field(top: int = 40_000) -> tuple[np.ndarray, np.ndarray]:
    """(220, 300) uint16 with nine sharp discs of `RADIUS` px, brightness `top` over a background of 2,000; labels."""
    y, x = np.mgrid[:220, :300]
    labels = np.zeros((220, 300), np.int32)
    for number in range(9):
        row, column = 40 + 70 * (number // 3), 50 + 100 * (number % 3)
        labels[(y - row) ** 2 + (x - column) ** 2 <= RADIUS**2] = number + 1
    light = 2000 + top * gaussian_filter((labels > 0).astype(float), 1.0)
    return (light + np.random.default_rng(0).normal(0, 100, light.shape)).astype(np.uint16), labels


def judged(labels: np.ndarray, image: np.ndarray, **settings) -> tuple[dict[str, np.ndarray], list[str]]:
    checks, reasons = check_objects(labels, image, measure(labels, image), Quality(**settings))
    assert set(reasons) <= {"", *QUALITY_REASONS}
    assert all(values.dtype == np.float32 and np.isfinite(values).all() for values in checks.values())
    return checks, reasons.tolist()


def test_good_nuclei_are_kept():
    checks, reasons = judged(*field()[::-1])
    assert reasons == [""] * 9
    assert (checks["q_saturated"] == 0).all() and (checks["q_touching"] == 0).all()
    assert (checks["q_edge_width"] < 0.2).all()
    assert np.abs(checks["q_debris"]).max() < 0.1


def test_border():
    image, labels = field()
    assert judged(labels[30:], image[30:])[1][:3] == ["touches the border"] * 3


def test_saturated_counts_the_cameras_white():
    image, labels = field()
    image[35:45, 45:55] = 65535
    checks, reasons = judged(labels, image)
    assert reasons == ["saturated"] + [""] * 8
    assert checks["q_saturated"][0] == pytest.approx(100 / (labels == 1).sum())
    image[image == 65535] = 60000  # no camera's white level: the brightest pixels are just bright
    assert judged(labels, image)[1] == [""] * 9


def test_blurred():
    image, labels = field()
    blurred = gaussian_filter(image.astype(float), 9)
    image[:75, :100] = blurred[:75, :100]
    checks, reasons = judged(labels, image)
    assert reasons == ["blurred"] + [""] * 8
    assert checks["q_edge_width"][0] > 2 * checks["q_edge_width"][1:].max()


def test_edge_width_grows_with_defocus():
    image, labels = field()
    widths = [judged(labels, gaussian_filter(image.astype(float), s))[0]["q_edge_width"].mean() for s in (0.1, 2, 4, 8)]
    assert widths == sorted(widths)


def test_debris_is_small_or_small_and_bright():
    image, labels = field()
    y, x = np.mgrid[:220, :300]
    small = (y - 40) ** 2 + (x - 50) ** 2 <= (RADIUS / 2) ** 2
    labels[labels == 1] = 0
    labels[small] = 1
    image[:75, :100] = 2000
    image[small] = 62000
    checks, reasons = judged(labels, image)
    assert reasons == ["debris"] + [""] * 8
    # a quarter of the area and 1.5 times as bright
    assert checks["q_debris"][0] == pytest.approx(2 + np.log2(60000 / (image[labels == 5].mean() - 2000)), abs=0.15)


def test_low_contrast():
    image, labels = field()
    faint = labels == 1
    labels[labels == 1] = 0
    image[faint] = 2000
    labels[90:110, 85:115] = 1  # background, taken for an object
    assert judged(labels, image)[1] == ["low contrast"] + [""] * 8


def test_not_convex():
    image, labels = field()
    y, x = np.mgrid[:220, :300]
    bite = (labels == 1) & (np.hypot(y - 40, x - 60) < 11)
    labels[bite], image[bite] = 0, 2000
    checks, reasons = judged(labels, image)
    assert reasons == ["not convex"] + [""] * 8
    assert checks["q_solidity"][0] < 0.85


def test_crowded_counts_the_outline_against_others():
    image, labels = field()
    y, x = np.mgrid[:220, :300]
    disc = labels == 5
    labels[disc & (y < 106)], labels[disc & (y > 114)] = 10, 11
    checks, reasons = judged(labels, image, min_solidity=None, max_edge_width=None, max_debris=None)
    assert reasons[4] == "crowded"
    assert checks["q_touching"][4] > 0.5 > checks["q_touching"][0]
    halves = np.where(disc & (x < 150), 20, labels)
    share = judged(halves, image)[0]["q_touching"]
    assert share.max() > 0


def test_a_threshold_of_null_is_not_asked():
    image, labels = field()
    image[35:45, 45:55] = 65535
    assert judged(labels, image, max_saturated=None)[1] == [""] * 9


def test_disabled_measures_nothing():
    image, labels = field()
    checks, reasons = check_objects(labels, image, measure(labels, image), Quality(enabled=False))
    assert checks == {} and reasons.tolist() == [""] * 9


def test_no_objects():
    image, labels = field()
    checks, reasons = judged(np.zeros_like(labels), image)
    assert len(reasons) == 0
    assert checks.keys() == judged(labels, image)[0].keys()


def test_missing_labels_and_a_full_field():
    image, labels = field()
    checks, _ = judged(labels, image)
    sparse, _ = judged(labels * 7, image)
    for name, values in checks.items():
        np.testing.assert_array_equal(sparse[name], values)
    assert judged(np.ones_like(labels), image)[1] == ["touches the border"]
