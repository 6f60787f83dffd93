"""What is measured of a real nucleus' crop, and how it becomes the factors that simulated expression follows."""

from __future__ import annotations

import numpy as np

SHAPE = ("area", "eccentricity", "solidity")
"""As of `skimage.measure.regionprops`, of the pixels above 0."""

TEXTURE = ("intensity", "intensity_cv", "roughness", "coarseness", "granularity", "pattern")
"""Of the pixels above 0. `intensity`: mean. `intensity_cv`: standard deviation / mean. Of 16 grey levels between the
1st and 99th percentile (Haralick): `roughness`, the contrast at 1 px; `coarseness`, the correlation at 3 px.
`granularity`: share of the variance that a Gaussian blur of sigma 1.5 px inside the mask takes away. `pattern`: entropy
of uniform local binary patterns (8 neighbours, 1 px)."""

MEASURES = SHAPE + TEXTURE
_LEVELS, _BLUR_PX = 16, 1.5


def measured(crops: np.ndarray) -> np.ndarray:
    """MEASURES of masked nuclei: float64 (N, 9).

    Args:
        crops: uint8 (N, H, W): background 0, nucleus at least 1.

    Raises:
        ValueError: where a crop has fewer than 30 pixels above 0.
    """
    return np.array([_one(crop) for crop in crops]).reshape(-1, len(MEASURES))


def factors(values: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """Normal scores cut at +-2.5 within each source: those of SHAPE as measured, those of TEXTURE beyond shape.

    A texture measure's score is first regressed on area, eccentricity and solidity (with squares and products) and the
    residual is scored again: no quadratic model of the shape tells it.

    Args:
        values: (N, MEASURES).
        sources: (N,), text: the sets of fields that crops come from.

    Returns:
        float64 (N, MEASURES), each column close to the law of `links.draw_factors` in each source.
    """
    found = np.empty(values.shape)
    for source in np.unique(sources):
        rows = sources == source
        scores = np.stack([_scores(column) for column in values[rows].T], axis=1)
        shape = scores[:, : len(SHAPE)]
        terms = [np.ones(len(shape)), *shape.T]
        terms += [shape[:, i] * shape[:, j] for i in range(len(SHAPE)) for j in range(i, len(SHAPE))]
        design = np.stack(terms, axis=1)
        for column in range(len(SHAPE), len(MEASURES)):
            fitted = design @ np.linalg.lstsq(design, scores[:, column], rcond=None)[0]
            scores[:, column] = _scores(scores[:, column] - fitted)
        found[rows] = scores
    return found


def _scores(values: np.ndarray) -> np.ndarray:
    """Ranks (ties get their mean) as quantiles of the standard normal law cut at +-2.5."""
    from scipy.special import ndtr, ndtri
    from scipy.stats import rankdata

    from cosmic_ray.simulation.links import CUT

    low = ndtr(-CUT)
    return ndtri(low + (1 - 2 * low) * (rankdata(values) - 0.5) / len(values))


def _one(crop: np.ndarray) -> list[float]:
    from scipy.ndimage import gaussian_filter
    from skimage.measure import regionprops

    rows, columns = np.nonzero(crop)
    if len(rows) < 30:
        raise ValueError(f"a crop of {len(rows)} pixels above 0")
    box = crop[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    mask = box > 0
    region = regionprops(mask.astype(np.uint8))[0]
    inside = box[mask].astype(float)
    weight = gaussian_filter(mask.astype(float), _BLUR_PX)
    smooth = (gaussian_filter(box * 1.0, _BLUR_PX) / np.maximum(weight, 1e-9))[mask]
    variance = max(float(inside.var()), 1e-9)
    return [
        float(region.area),
        float(region.eccentricity),
        float(region.solidity),
        float(inside.mean()),
        float(inside.std() / inside.mean()),
        *_haralick(box, mask),
        float((inside - smooth).var() / variance),
        _pattern(box, mask),
    ]


def _haralick(box: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    from skimage.feature import graycomatrix, graycoprops

    low, high = np.percentile(box[mask], [1, 99])
    levels = np.clip((box - low) / max(high - low, 1e-9) * _LEVELS, 0, _LEVELS - 1).astype(np.uint8) + 1
    angles = [0, np.pi / 4, np.pi / 2, 3 * np.pi / 4]
    pairs = graycomatrix(np.where(mask, levels, 0).astype(np.uint8), [1, 3], angles, _LEVELS + 1, symmetric=True)
    inner = pairs[1:, 1:].sum(axis=3, keepdims=True).astype(float)
    inner /= np.maximum(inner.sum(axis=(0, 1), keepdims=True), 1)
    return float(graycoprops(inner, "contrast")[0, 0]), float(graycoprops(inner, "correlation")[1, 0])


def _pattern(box: np.ndarray, mask: np.ndarray) -> float:
    from skimage.feature import local_binary_pattern

    shares = np.bincount(local_binary_pattern(box, 8, 1, "uniform")[mask].astype(int), minlength=10) / mask.sum()
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())
