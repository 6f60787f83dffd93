"""Nuclei of a field as a label image, and what is measured of each: pure functions of arrays, no I/O.

`paper` is Otsu's threshold and connected components; `better` is in `segment_better.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from cosmic_ray.config import Config


class Segmentation(Config):
    """How nuclei are found in a field."""

    recipe: Literal["paper", "better"] = "better"
    """`paper`: global Otsu threshold, 8-connected components. `better`: survives uneven light and dim fields, and
    splits touching nuclei."""

    min_area_px: Annotated[int, Field(ge=1)] = 30
    """The speck floor: components with fewer pixels are no objects."""

    diameter_px: Annotated[float, Field(ge=4)] | None = None
    """`better` only: the usual diameter of a nucleus in pixels, where it is known; by default it is estimated in each
    field."""


def segment(image: np.ndarray, settings: Segmentation) -> np.ndarray:
    """Label the nuclei of one field.

    Args:
        image: (H, W) uint8, uint16 or float, nuclei brighter than the background.
        settings: the recipe and its settings.

    Returns:
        (H, W) int32: 0 background, 1..n the objects, numbered in the order of their first pixel. The same image gives
        the same labels on every machine, at any number of threads.
    """
    if settings.recipe == "paper":
        return segment_paper(image, settings.min_area_px)
    from cosmic_ray.imaging.segment_better import segment_better

    return segment_better(image, settings)


def segment_paper(image: np.ndarray, min_area_px: int) -> np.ndarray:
    """COSMIC §3.1: pixels above Otsu's threshold, in 8-connected components of at least `min_area_px` pixels.

    Args:
        image: (H, W) uint8, uint16 or float.

    Returns:
        (H, W) int32, as `segment`.
    """
    from scipy import ndimage

    labels = np.empty(image.shape, np.int32)
    ndimage.label(image > otsu_threshold(image), structure=np.ones((3, 3)), output=labels)
    areas = np.bincount(labels.ravel())
    kept = areas >= min_area_px
    kept[0] = False
    renumbered = np.where(kept, np.cumsum(kept), 0).astype(np.int32)
    return renumbered[labels]


def otsu_threshold(image: np.ndarray) -> float:
    """The value t for which {<= t} and {> t} differ most between their means (Otsu 1979).

    Integers are counted exactly, so that the sums are exact; floats in 256 bins between minimum and maximum. The value
    is that of `skimage.filters.threshold_otsu`. An image of one value gives that value, hence no foreground.
    """
    if image.dtype.kind == "f":
        low, high = float(image.min()), float(image.max())
        if low == high:
            return low
        counts, edges = np.histogram(image, bins=256)
        values = (edges[1:] + edges[:-1]) / 2
        counts = counts.astype(np.float64)
    else:
        counts = np.bincount(image.ravel())
        values = np.arange(len(counts))
        first = int(np.argmax(counts > 0))
        counts, values = counts[first:], values[first:]
    if len(counts) == 1:
        return float(values[0])
    below, weighted = np.cumsum(counts)[:-1], np.cumsum(counts * values)
    above, mass = counts.sum() - below, weighted[:-1]
    gap = mass / below - (weighted[-1] - mass) / above
    return float(values[np.argmax(below * above.astype(np.float64) * gap**2)])


def measure(labels: np.ndarray, image: np.ndarray) -> dict[str, np.ndarray]:
    """Measure every object of a label image; columns of equal length, one row an object, in the order of its label.

    Args:
        labels: (H, W) integers, 0 background; labels may be missing, and objects need not be connected.
        image: (H, W), any number type.

    Returns:
        Columns of shape (n,):
        `label` int32;
        `area_px` int64;
        `centroid_y`, `centroid_x` float64, px, of the pixel centres, (0, 0) the first pixel's;
        `bbox_top`, `bbox_left`, `bbox_bottom`, `bbox_right` int32, px, half open;
        `eccentricity` float64, 0 (circle) to 1, of the ellipse with the same second moments;
        `major_axis_px`, `minor_axis_px` float64, px, its full axes;
        `solidity` float64, 0 to 1, area over that of the convex hull of the pixels' squares;
        `mean_intensity` float64, in units of `image`;
        `touches_border` bool, a pixel lies in the outermost rows or columns.
    """
    height, width = labels.shape
    flat = labels.ravel()
    where = np.flatnonzero(flat)
    names, owner = _ranked(flat[where])
    n = len(names)
    y, x = np.divmod(where, width)

    def total(weights: np.ndarray) -> np.ndarray:
        return np.bincount(owner, weights, minlength=n)

    area = np.bincount(owner, minlength=n)
    centroid_y, centroid_x = total(y) / area, total(x) / area
    dy, dx = y - centroid_y[owner], x - centroid_x[owner]
    yy, xx, xy = total(dy * dy) / area, total(dx * dx) / area, total(dx * dy) / area
    mean, half = (yy + xx) / 2, np.sqrt(((yy - xx) / 2) ** 2 + xy**2)
    large, small = mean + half, np.maximum(mean - half, 0)
    top, bottom = _extremes(owner, y, n)
    left, right = _extremes(owner, x, n)
    return {
        "label": names.astype(np.int32),
        "area_px": area,
        "centroid_y": centroid_y,
        "centroid_x": centroid_x,
        "bbox_top": top,
        "bbox_left": left,
        "bbox_bottom": bottom + 1,
        "bbox_right": right + 1,
        "eccentricity": np.sqrt(1 - np.divide(small, large, out=np.ones(n), where=large > 0)),
        "major_axis_px": 4 * np.sqrt(large),
        "minor_axis_px": 4 * np.sqrt(small),
        "solidity": area / _hull_areas(owner, y, x, n),
        "mean_intensity": total(image.ravel()[where]) / area,
        "touches_border": (top == 0) | (left == 0) | (bottom == height - 1) | (right == width - 1),
    }


def _ranked(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`np.unique(values, return_inverse=True)`, without its sort where the values are small, as labels are."""
    if values.size == 0 or values.max() > 4 * values.size:
        return np.unique(values, return_inverse=True)
    present = np.bincount(values) > 0
    return np.flatnonzero(present), (np.cumsum(present) - 1)[values]


def _extremes(owner: np.ndarray, value: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.full(n, np.iinfo(np.int32).max, np.int32), np.full(n, -1, np.int32)
    np.minimum.at(low, owner, value.astype(np.int32))
    np.maximum.at(high, owner, value.astype(np.int32))
    return low, high


def _hull_areas(owner: np.ndarray, y: np.ndarray, x: np.ndarray, n: int) -> np.ndarray:
    """(n,) areas in px of the convex hulls of the objects' pixels, each a unit square; pixels come in raster order."""
    from scipy.spatial import ConvexHull

    order = np.argsort(owner, kind="stable")
    owner, y, x = owner[order], y[order], x[order]
    new_row = np.ones(len(owner), bool)
    new_row[1:] = (owner[1:] != owner[:-1]) | (y[1:] != y[:-1])
    first = np.flatnonzero(new_row)
    last = np.r_[first[1:], len(owner)] - 1
    starts = np.searchsorted(owner[first], np.arange(n + 1))
    areas = np.empty(n)
    for index in range(n):
        rows = slice(starts[index], starts[index + 1])
        top, left, right = y[first[rows]], x[first[rows]], x[last[rows]] + 1
        corners = np.stack([np.r_[top, top, top + 1, top + 1], np.r_[left, right, left, right]], 1)
        areas[index] = ConvexHull(corners).volume
    return areas
