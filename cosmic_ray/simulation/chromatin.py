"""What fills a nucleus: the projected DNA density of one nucleus on its pixels.

density = thickness x chromatin x rim x nucleoli x foci, then scaled so that its sum is the nucleus' light. Chromatin is
a log-normal random field: a Gaussian field of two scales (grain, and domains three times as wide), sampled from a
periodic tile at a random place and angle, stretched to the nucleus' own grain. Integrated light is therefore exact
whatever the texture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from cosmic_ray.simulation.cells import Nuclei
from cosmic_ray.simulation.shapes import Outline, Patch

TILE = 512
_SIGMA, _DOMAIN, _DOMAIN_SHARE = 3.0, 3.0, 0.25
_RIM_UM = 0.7
_RING = np.float32(0.12)
"""Perinucleolar heterochromatin: the thin bright ring around a nucleolus."""


def half_autocorrelation_px() -> float:
    """Distance in tile pixels at which the tile's autocorrelation is one half (bisection of its closed form)."""
    low, high = 0.0, 10 * _SIGMA
    while high - low > 1e-9:
        middle = (low + high) / 2
        value = (1 - _DOMAIN_SHARE) * math.exp(-((middle / (2 * _SIGMA)) ** 2)) + _DOMAIN_SHARE * math.exp(
            -((middle / (2 * _DOMAIN * _SIGMA)) ** 2)
        )
        low, high = (middle, high) if value > 0.5 else (low, middle)
    return low


_HALF_PX = half_autocorrelation_px()


def chromatin_tile(rng: np.random.Generator) -> np.ndarray:
    """A periodic (512, 512) float32 Gaussian field, zero mean, unit variance, of the two scales."""
    from scipy import fft

    white = fft.rfft2(rng.standard_normal((TILE, TILE), dtype=np.float32))
    squared = np.fft.fftfreq(TILE)[:, None] ** 2 + np.fft.rfftfreq(TILE)[None, :] ** 2
    power = sum(
        share * sigma**2 * np.exp(-((2 * np.pi * sigma) ** 2) * squared)
        for share, sigma in ((1 - _DOMAIN_SHARE, _SIGMA), (_DOMAIN_SHARE, _DOMAIN * _SIGMA))
    )
    power[0, 0] = 0
    field = fft.irfft2(white * np.sqrt(power).astype(np.float32), s=(TILE, TILE))
    return (field / field.std()).astype(np.float32)


def nucleus_density(
    nuclei: Nuclei, row: int, shape: Outline, patch: Patch, pixel_um: float, tile: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The light density of one nucleus, before optics.

    Returns:
        (S, S) float32 on the patch's pixels, zero outside the outline, summing to 1.
    """
    thickness = np.sqrt(np.maximum(1 - patch.rho ** np.float32(nuclei.flatness[row]), 0))
    log_density = _sampled(tile, patch.half, nuclei.grain_um[row] / pixel_um, rng)
    if nuclei.threads[row]:
        log_density = (np.float32(0.798) - np.abs(log_density)) / np.float32(0.603)
    density = thickness * np.exp(np.float32(math.sqrt(math.log1p(nuclei.contrast[row] ** 2))) * log_density)
    density *= 1 + np.float32(nuclei.rim[row]) * np.exp(-((patch.depth_um / _RIM_UM) ** 2))
    for where, squared in _scattered(nuclei.nucleoli[row], nuclei.nucleolus_um[row], 0.62, shape, patch, pixel_um, rng):
        ring = _RING * np.exp(-((np.sqrt(squared) - np.float32(1.3)) ** 2) / np.float32(0.08))
        density[where] *= 1 + ring - np.float32(nuclei.nucleolus_depth[row]) * np.exp(-(squared**2))
    for where, squared in _scattered(nuclei.foci[row], nuclei.focus_um[row], 0.88, shape, patch, pixel_um, rng):
        density[where] *= 1 + np.float32(nuclei.focus_gain[row]) * np.exp(squared * np.float32(-0.5))
    return density / density.sum()


def _sampled(tile: np.ndarray, half: int, grain_px: float, rng: np.random.Generator) -> np.ndarray:
    """The tile under a square of 2 half + 1 pixels at a random place and angle, its grain stretched to `grain_px`."""
    from scipy.ndimage import map_coordinates

    angle, (top, left) = rng.uniform(0, 2 * np.pi), rng.uniform(0, TILE, 2)
    step = _HALF_PX / grain_px
    axis = np.arange(-half, half + 1) * step
    y, x = axis[:, None], axis[None, :]
    cos, sin = math.cos(angle), math.sin(angle)
    places = np.stack([top + y * cos - x * sin, left + y * sin + x * cos])
    return map_coordinates(tile, places, order=1, mode="grid-wrap")


def _scattered(
    count: int, median_um: float, reach: float, shape: Outline, patch: Patch, pixel_um: float, rng: np.random.Generator
) -> Iterator[tuple[tuple[slice, slice], np.ndarray]]:
    """Spots at random places within `reach` of the outline: the pixels around each, and their (distance / radius)^2."""
    x, y = shape.inside(reach * np.sqrt(rng.uniform(0, 1, count)), rng.uniform(0, 2 * np.pi, count))
    radii = median_um * np.exp(rng.normal(0, 0.25, count)) / pixel_um
    size = 2 * patch.half + 1
    for row, column, radius in zip(y / pixel_um + patch.half, x / pixel_um + patch.half, radii, strict=True):
        top, left = max(int(row - 3.5 * radius), 0), max(int(column - 3.5 * radius), 0)
        bottom, right = min(int(row + 3.5 * radius) + 2, size), min(int(column + 3.5 * radius) + 2, size)
        dy, dx = (np.arange(top, bottom) - row) / radius, (np.arange(left, right) - column) / radius
        yield (slice(top, bottom), slice(left, right)), (dy[:, None] ** 2 + dx[None, :] ** 2).astype(np.float32)
