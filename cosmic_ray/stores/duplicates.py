"""Copies of a crop: the very same pixels, or the same nucleus encoded again (other contrast, 8 bits for 16, JPEG).

What is compared is texture: a square grid over the nucleus, scaled by its area and placed on its centroid, without its
mean, weighted towards fine structure, since all nuclei share the coarse one. Candidates (by `bands`) are confirmed on
the pixels themselves. Among 17,479 nuclei of real fields two different ones correlate by 0.984 at most; of copies with
other contrast all stay above 0.995, of JPEGs of quality 95 two in three. Among tens of millions chance comes closer,
hence the strict default. A nucleus imaged again has other noise and is not found here: `layouts` finds such fields.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import xxhash

from cosmic_ray.stores.bands import band_key, signatures, similar_pairs
from cosmic_ray.stores.crops import CropStore

BITS, BAND_BITS = 512, 32
LEAST_PX = 50
"""Smaller nuclei say too little to be told apart; they, and those of one grey, are left alone."""
_GRID, _WAVES = 24, 12
_MOST_BITS_APART = 20
_AREA_STEP = np.log(1.2)
_CROPS_AT_ONCE = 512 * 2**20
"""Bytes."""


class Fingerprints(NamedTuple):
    """What is kept of each crop."""

    exact: np.ndarray
    """uint64 (N,): xxh3_64 of the pixels; 0 for a crop that is left alone."""
    area: np.ndarray
    """int32 (N,): nonzero pixels; 0 for a crop that is left alone."""
    bits: np.ndarray
    """uint8 (N, BITS / 8): the texture's signature."""


def fingerprints(crops: np.ndarray) -> Fingerprints:
    """Fingerprint uint8 (N, C, H, W)."""
    total = crops[:, 0] if crops.shape[1] == 1 else crops.sum(axis=1, dtype=np.float32)
    area = np.count_nonzero(total, axis=(1, 2)).astype(np.int32)
    one_grey = total.sum(axis=(1, 2), dtype=np.float64) == area * total.max(axis=(1, 2)).astype(np.float64)
    area[(area < LEAST_PX) | one_grey] = 0
    exact = np.fromiter((xxhash.xxh3_64_intdigest(crop) for crop in crops), np.uint64, len(crops))
    return Fingerprints(np.where(area, exact, 0), area, signatures(_texture(total), BITS))


def exact_pairs(exact: np.ndarray) -> np.ndarray:
    """Rows with the same pixels, as a chain of pairs: int64 (P, 2)."""
    order = np.argsort(exact, kind="stable")
    ordered = exact[order]
    same = (ordered[1:] == ordered[:-1]) & (ordered[1:] != 0)
    return np.stack([order[:-1][same], order[1:][same]], axis=1)


def similar(store: CropStore, area: np.ndarray, bits: np.ndarray, least: float) -> np.ndarray:
    """Rows whose nuclei correlate by at least `least`: int64 (P, 2). Holds 512 MiB of crops in memory at most."""
    pairs = _candidates(area, bits)
    kept = [np.empty((0, 2), np.int64)]
    at_once = max(1, _CROPS_AT_ONCE // (2 * store.spec.nbytes))
    for start in range(0, len(pairs), at_once):
        some = pairs[start : start + at_once]
        rows, where = np.unique(some, return_inverse=True)
        crops = store.crops(rows)
        found = [correlation(crops[one], crops[other]) >= least for one, other in where.reshape(some.shape)]
        kept.append(some[np.array(found, bool)])
    return np.concatenate(kept)


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson correlation of two crops (C, H, W) where both have nonzero pixels, the best of shifts by up to 1 px.

    0 where less than 85 % of their joint pixels are in both.
    """
    best = 0.0
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            moved = np.roll(other, (dy, dx), axis=(1, 2))
            either, both = (one > 0) | (moved > 0), (one > 0) & (moved > 0)
            if both.sum() >= 0.85 * either.sum() and both.any():
                a, b = one[both].astype(np.float64), moved[both].astype(np.float64)
                a, b = a - a.mean(), b - b.mean()
                scale = np.sqrt((a @ a) * (b @ b))
                best = max(best, float(a @ b / scale) if scale else 0.0)
    return best


def _candidates(area: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Pairs of like size and signature. Bins of size are 20 % wide; every second band has them moved by half a bin."""
    size = (np.log(np.maximum(area, 1)) / _AREA_STEP).astype(np.float32)

    def key_of(band: int) -> np.ndarray:
        bins = np.floor(size + band % 2 / 2).astype(np.uint64)
        return band_key(bits, band, BAND_BITS) | bins << np.uint64(BAND_BITS)

    pairs = similar_pairs(key_of, BITS // BAND_BITS, bits, _MOST_BITS_APART)
    pairs = pairs[area[pairs].all(axis=1)]
    low, high = np.minimum(*area[pairs].T), np.maximum(*area[pairs].T)
    return pairs[low >= 0.95 * high]


def _texture(images: np.ndarray) -> np.ndarray:
    """Features of (N, H, W), 0 outside the nucleus: float32 (N, _WAVES**2 - 1)."""
    patches, inside = _patches(images)
    centred = np.where(inside, patches - patches[:, inside].mean(axis=1)[:, None, None], 0).astype(np.float32)
    waves = np.arange(_WAVES)
    basis = np.cos(np.pi * (np.arange(_GRID) + 0.5) * waves[:, None] / _GRID).astype(np.float32)
    weights = np.hypot(waves[:, None], waves[None]).astype(np.float32)
    return ((basis @ centred @ basis.T) * weights).reshape(len(images), -1)[:, 1:]


def _patches(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each nucleus on a _GRID x _GRID grid over the square around a disc of its area, bilinear; and the grid's disc."""
    count, height, width = images.shape
    mask = images > 0
    by_row, by_column = mask.sum(axis=2), mask.sum(axis=1)
    area = np.maximum(by_row.sum(axis=1), 1)
    steps = (np.arange(_GRID) + 0.5) / _GRID * 2 - 1
    reach = steps * np.sqrt(area / np.pi)[:, None]
    y = (by_row @ np.arange(height) / area)[:, None] + reach
    x = (by_column @ np.arange(width) / area)[:, None] + reach
    y0, x0 = np.clip(np.floor(y), 0, height - 2).astype(np.int64), np.clip(np.floor(x), 0, width - 2).astype(np.int64)
    fy, fx = (y - y0).clip(0, 1).astype(np.float32)[:, :, None], (x - x0).clip(0, 1).astype(np.float32)[:, None, :]
    at = np.arange(count)[:, None, None] * (height * width) + y0[:, :, None] * width + x0[:, None, :]
    flat = np.ascontiguousarray(images).reshape(-1)
    upper = flat[at] * (1 - fx) + flat[at + 1] * fx
    lower = flat[at + width] * (1 - fx) + flat[at + width + 1] * fx
    return upper * (1 - fy) + lower * fy, np.hypot(steps[:, None], steps[None]) < 0.9
