"""Chromatin measures of one nucleus: what its DNA stain looks like beyond how large and how bright it is.

Every measure is taken inside the mask (pixels above 0) after dividing by the nucleus' own mean, so that area and
exposure alone move none of them by definition; what correlation with area remains is biology or resolution, and
`probe.beyond` takes it out.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

_LEVELS = 16
_DISTANCES_PX = (1, 3, 6)
_OFFSETS = ((0, 1), (1, 0), (1, 1), (1, -1))
_GRANULARITY_SIGMAS_PX = (1.0, 2.0, 4.0)

NAMES: tuple[str, ...] = (
    "coefficient_of_variation",
    "skewness",
    "kurtosis",
    "bright_share",
    "dark_share",
    *(f"glcm_contrast_{d}px" for d in _DISTANCES_PX),
    *(f"glcm_correlation_{d}px" for d in _DISTANCES_PX),
    *(f"glcm_homogeneity_{d}px" for d in _DISTANCES_PX),
    *(f"granularity_{s:g}px" for s in _GRANULARITY_SIGMAS_PX),
    "rim_to_centre",
)
"""The columns of `chromatin`, in order."""


def chromatin(crops: np.ndarray) -> np.ndarray:
    """Chromatin measures of masked nuclei.

    Args:
        crops: uint8 (N, H, W), background 0, nucleus pixels at least 1.

    Returns:
        float64 (N, len(NAMES)); NaN where a nucleus has fewer than 30 pixels.
    """
    return np.stack([_one(crop) for crop in crops]) if len(crops) else np.empty((0, len(NAMES)))


def _one(crop: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(crop)
    if len(rows) < 30:
        return np.full(len(NAMES), np.nan)
    box = crop[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].astype(np.float64)
    mask = box > 0
    values = box / box[mask].mean()
    return np.array([*_histogram(values[mask]), *_glcm(values, mask), *_granularity(values, mask), _rim(values, mask)])


def _histogram(inside: np.ndarray) -> list[float]:
    """Coefficient of variation, skewness, excess kurtosis, shares above 1.5 and below 0.6 of the mean."""
    spread = inside.std()
    standard = (inside - 1.0) / max(spread, 1e-9)
    return [
        spread,
        float((standard**3).mean()),
        float((standard**4).mean()) - 3.0,
        float((inside > 1.5).mean()),
        float((inside < 0.6).mean()),
    ]


def _glcm(values: np.ndarray, mask: np.ndarray) -> list[float]:
    """Haralick contrast, correlation and homogeneity of grey levels at each distance, over pairs inside the mask."""
    low, high = np.percentile(values[mask], [1, 99])
    levels = np.clip((values - low) / max(high - low, 1e-9) * _LEVELS, 0, _LEVELS - 1).astype(np.int64)
    measures = [_haralick(_cooccurrence(levels, mask, distance)) for distance in _DISTANCES_PX]
    return [value for column in zip(*measures, strict=True) for value in column]


def _cooccurrence(levels: np.ndarray, mask: np.ndarray, distance: int) -> np.ndarray:
    """Symmetric joint frequencies (_LEVELS, _LEVELS) of grey levels `distance` pixels apart, in four directions."""
    counts = np.zeros((_LEVELS, _LEVELS))
    for down, right in _OFFSETS:
        here, there = _shifted(levels.shape, down * distance, right * distance)
        both = mask[here] & mask[there]
        pairs = levels[here][both] * _LEVELS + levels[there][both]
        counts += np.bincount(pairs, minlength=_LEVELS**2).reshape(_LEVELS, _LEVELS)
    counts += counts.T
    return counts / max(counts.sum(), 1.0)


def _shifted(shape: tuple[int, int], down: int, right: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    height, width = shape
    rows = slice(0, max(height - down, 0)), slice(down, height)
    columns = (
        (slice(0, max(width - right, 0)), slice(right, width))
        if right >= 0
        else (slice(-right, width), slice(0, max(width + right, 0)))
    )
    return (rows[0], columns[0]), (rows[1], columns[1])


def _haralick(joint: np.ndarray) -> tuple[float, float, float]:
    if joint.sum() == 0:
        return np.nan, np.nan, np.nan
    i, j = np.indices(joint.shape)
    mean = (joint * i).sum()
    variance = (joint * (i - mean) ** 2).sum()
    correlation = (joint * (i - mean) * (j - mean)).sum() / max(variance, 1e-9)
    return (joint * (i - j) ** 2).sum(), correlation, (joint / (1 + np.abs(i - j))).sum()


def _granularity(values: np.ndarray, mask: np.ndarray) -> list[float]:
    """Root mean square of the band-passed nucleus at each scale (difference of mask-normalised Gaussian blurs)."""
    from scipy.ndimage import gaussian_filter

    filled = np.where(mask, values, 0.0)
    inside = mask.astype(np.float64)
    blurred = [filled]
    for sigma in _GRANULARITY_SIGMAS_PX:
        weight = np.maximum(gaussian_filter(inside, sigma), 1e-6)
        blurred.append(np.where(mask, gaussian_filter(filled, sigma) / weight, 0.0))
    return [float(np.sqrt(((a - b)[mask] ** 2).mean())) for a, b in pairwise(blurred)]


def _rim(values: np.ndarray, mask: np.ndarray) -> float:
    """Mean of the outer half of the area over the mean of the inner half, by distance to the edge."""
    from scipy.ndimage import distance_transform_edt

    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1][mask]
    outer = depth <= np.median(depth)
    inner = ~outer
    return float(values[mask][outer].mean() / values[mask][inner].mean()) if inner.any() else 1.0
