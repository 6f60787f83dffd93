"""The recipe `better`: find the scale of the field, level its light, let a small network mark the nuclei, part them.

Everything that decides a label is counted in whole numbers, or rounded to them from float64 right after a filter: where
two machines differ in the last bit of a sum, no label will.
"""

from __future__ import annotations

import numpy as np

from cosmic_ray.imaging.nucleus_net import DIAMETER_PX, Layer, predict
from cosmic_ray.imaging.segment import Segmentation, otsu_threshold

SEED = 55
"""Hundredths of the network's output above which pixels belong to the core of a nucleus: one core, one nucleus."""

FAINT_SEED = 25
"""The same for what no core above `SEED` lies in: thin and faint nuclei."""

EDGE = -5
"""Hundredths at which a nucleus ends."""

SMALLEST = 0.25
"""Objects whose diameter is a smaller share of the field's nuclei than this are specks."""

MAX_ENLARGED = 4.0

SMOOTHING = 1.25
"""Px at the network's scale: how far around a point of the field it is asked which of two touching objects prevails."""


def segment_better(image: np.ndarray, settings: Segmentation, layers: dict[str, Layer] | None = None) -> np.ndarray:
    """Label the nuclei of one field; see `segment` for the contract. `layers` replaces the network that is shipped.

    The field is brought to the scale that the network knows by a first guess at the nuclei's diameter. Where what it
    finds there is much smaller or larger than the guess, the field is looked at once more at the diameter found.
    """
    diameter, sure = (settings.diameter_px, True) if settings.diameter_px else estimate_diameter(image)
    for _ in range(1 if sure else 3):
        scale = min(DIAMETER_PX / diameter, MAX_ENLARGED)
        inside = predict(normalise(rescale(image, scale)), layers)
        objects = part(inside)
        found = _typical_diameter(objects) / scale
        if not found or 0.75 < found / diameter < 1.33:
            break
        diameter = 2 ** (round(8 * np.log2(found)) / 8)
    return _restored(objects, inside, image.shape, settings.min_area_px)


def estimate_diameter(image: np.ndarray) -> tuple[float, bool]:
    """A first guess at the diameter of the field's nuclei, in px, from the thickness of what is bright.

    In a disc, the distance to the outline has a mean of a third of the radius. Half of the bright area belongs to
    components thicker than the guess. A guess above 2/7 of the field's shorter side is the outline of a sample, of an
    embryo say, rather than a nucleus's.

    Returns:
        The guess, in eighths of a doubling, and whether it is to be taken as it is: what the network finds at the
        scale of a whole sample says little.
    """
    from scipy import ndimage

    block = max(1, -(-max(image.shape) // 700))
    root = ndimage.gaussian_filter(np.sqrt(_block_means(image, block)), 1.0)
    root = np.maximum(root - _shade(root), 0)
    side = min(root.shape)
    guess = _thickness(_rounded(root))
    sample = guess > side / 3.5
    if sample:
        guess = _thickness_of_detail(root, side / 6)
    return 2 ** (round(8 * np.log2(max(guess, 5.0) * block)) / 8), sample


def _shade(image: np.ndarray, blocks: int = 6) -> np.ndarray:
    """Uneven background, coarsely: the dark end of each block and its neighbours, interpolated between the blocks."""
    from scipy import ndimage

    bands = np.array_split(image, blocks, axis=0)
    tiles = [np.array_split(band, blocks, axis=1) for band in bands]
    dark = np.array([[np.sort(tile, axis=None)[tile.size // 10] for tile in row] for row in tiles])
    grid = ndimage.minimum_filter(dark, 3, mode="nearest")
    steps = [blocks / side for side in image.shape]
    return ndimage.affine_transform(
        grid, steps, [step / 2 - 0.5 for step in steps], image.shape, order=1, mode="nearest"
    )


def _thickness_of_detail(root: np.ndarray, reach: float) -> float:
    """The size of what stands out from its surroundings, in a sample that is bright all over.

    The surroundings are looked at ever closer, until what stands out fills them. Haze between crowded nuclei lets that
    be thicker than a nucleus: by two thirds in embryos and tissue.
    """
    from scipy import ndimage

    for _ in range(12):
        detail = _thickness(_rounded(np.maximum(root - ndimage.gaussian_filter(root, reach), 0)))
        if detail >= 0.95 * reach or reach < 4:
            break
        reach = max(detail, 3.0)
    return 0.6 * detail


def _rounded(values: np.ndarray) -> np.ndarray:
    """Non-negative floats as 0..1023 of their largest."""
    return np.rint(values * (1023 / max(float(values.max()), 1e-9))).astype(np.int32)


def _thickness(values: np.ndarray) -> float:
    """Of what lies above Otsu's threshold."""
    from scipy import ndimage

    bright = values > otsu_threshold(values)
    components, n = ndimage.label(bright)
    if not n:
        return 0.0
    area = np.bincount(components.ravel())[1:]
    depth = np.bincount(components.ravel(), ndimage.distance_transform_edt(bright).ravel())[1:]
    return _middle_by_area(6 * depth / area, area)


def _typical_diameter(objects: np.ndarray) -> float:
    area = np.bincount(objects.ravel())[1:]
    return _middle_by_area(2 * np.sqrt(area / np.pi), area) if len(area) else 0.0


def _middle_by_area(values: np.ndarray, area: np.ndarray) -> float:
    """The value below which half of the area lies."""
    order = np.argsort(values, kind="stable")
    grown = np.cumsum(area[order])
    return float(values[order][np.searchsorted(grown, grown[-1] / 2)])


def _block_means(image: np.ndarray, block: int) -> np.ndarray:
    """(H // block, W // block) float64 means of squares of `block` px; what is left at the far edges is dropped."""
    height, width = (side // block * block for side in image.shape)
    if block == 1:
        return image.astype(np.float64)
    wide = np.int64 if image.dtype.kind == "u" else np.float64
    sums = np.add.reduceat(image[:height, :width], np.arange(0, height, block), axis=0, dtype=wide)
    sums = np.add.reduceat(sums, np.arange(0, width, block), axis=1)
    return sums / block**2


def rescale(image: np.ndarray, scale: float) -> np.ndarray:
    """The field at `scale` times its size, both sides at least 16 px: (H', W') float64. Smoothed before it shrinks."""
    from scipy import ndimage

    target = [max(16, round(side * scale)) for side in image.shape]
    block = max(1, int(0.5 / scale))
    small = _block_means(image, block)
    shrink = scale * block
    if shrink < 1:
        small = ndimage.gaussian_filter(small, 0.45 / shrink)
    kept = [side // block * block / side for side in image.shape]
    zoom = [(size * share) / have for size, share, have in zip(target, kept, small.shape, strict=True)]
    return ndimage.affine_transform(
        small, [1 / z for z in zoom], [0.5 / z - 0.5 for z in zoom], tuple(target), order=1, mode="nearest"
    )


def normalise(image: np.ndarray, floor: float = 0.15) -> np.ndarray:
    """Level background and brightness of a rescaled field, so that dim nuclei beside bright ones are seen.

    The background is the lowest smoothed value in about three nuclei's width, the level the highest in four; a level
    below `floor` of the field's highest is raised to that, so that noise is not taken for nuclei.

    Args:
        image: (H, W) float64, linear in light, nuclei about `DIAMETER_PX` wide.

    Returns:
        (H, W) uint8: the square root of the corrected light, 0 background, about 200 the nuclei.
    """
    from scipy import ndimage

    smooth = ndimage.gaussian_filter(image, 1.0)
    below = ndimage.gaussian_filter(ndimage.minimum_filter(smooth, 49, mode="nearest"), 16, mode="nearest")
    smooth -= below
    level = ndimage.gaussian_filter(ndimage.maximum_filter(smooth, 65, mode="nearest"), 16, mode="nearest")
    level = np.maximum(level, floor * level.max()) + 1e-6
    return np.clip(np.rint(200 * np.sqrt(np.maximum(image - below, 0) / level)), 0, 255).astype(np.uint8)


def part(inside: np.ndarray) -> np.ndarray:
    """Objects from the network's output: cores, grown down to their outline by a watershed.

    Args:
        inside: (H, W) int16, as `predict` gives it.

    Returns:
        (H, W) int32 labels, without specks.
    """
    from scipy import ndimage
    from skimage.segmentation import watershed

    cores, n = ndimage.label(inside > SEED)
    faint, _ = ndimage.label(inside > FAINT_SEED)
    taken = np.unique(faint[cores > 0])
    faint[np.isin(faint, taken)] = 0
    seeds = np.where(faint > 0, faint + n, cores)
    objects = watershed(-inside, seeds, mask=inside > EDGE)
    area = np.bincount(objects.ravel())
    kept = area >= np.pi / 4 * (SMALLEST * DIAMETER_PX) ** 2
    kept[0] = False
    return np.where(kept, np.cumsum(kept), 0).astype(np.int32)[objects]


def _restored(objects: np.ndarray, inside: np.ndarray, shape: tuple[int, int], min_area_px: int) -> np.ndarray:
    """Objects at the field's own scale: outlines from the interpolated output, ownership from the nearest object."""
    from scipy import ndimage

    ratio = [small / full for small, full in zip(objects.shape, shape, strict=True)]
    rows, columns = (
        np.minimum(((np.arange(full) + 0.5) * r).astype(int), small - 1)
        for full, r, small in zip(shape, ratio, objects.shape, strict=True)
    )
    grown = objects
    if max(ratio) < 1:
        distance, nearest = ndimage.distance_transform_edt(objects == 0, return_indices=True)
        grown = np.where(distance <= 1.5, objects[tuple(nearest)], 0)
    labels = grown[rows][:, columns]
    if max(ratio) < 1:
        _straighten(labels, grown, rows, columns)
        level = ndimage.affine_transform(
            inside.astype(np.float64), ratio, [r / 2 - 0.5 for r in ratio], shape, order=1, mode="nearest"
        )
        labels = np.where(level > EDGE, labels, 0)
    area = np.bincount(labels.ravel(), minlength=objects.max() + 1)
    kept = area >= min_area_px
    kept[0] = False
    return np.where(kept, np.cumsum(kept), 0).astype(np.int32)[labels]


def _straighten(labels: np.ndarray, objects: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> None:
    """Redraw the borders between touching objects, which are blocks of several px where a field was shrunk.

    Where a pixel belongs to one of two that touch, it goes to the one that has more of its neighbourhood at the
    network's scale, under a Gaussian; other objects and the background count for neither.

    Args:
        labels: (H, W) int32, `objects[rows][:, columns]`; changed in place.
        objects: (h, w) int32, smaller.
        rows, columns: (H,) and (W,), where each row and column of the field lies in `objects`.
    """
    reach = round(3 * SMOOTHING)
    by_row, by_column = (_nearness(at, size) for at, size in zip((rows, columns), objects.shape, strict=True))
    for one, other, top, left, bottom, right in _contacts(objects):
        near = slice(max(top - reach, 0), bottom + reach), slice(max(left - reach, 0), right + reach)
        part = objects[near]
        more = (part == one).astype(np.float64) - (part == other)
        here = tuple(
            slice(*np.searchsorted(at, [first - reach // 2, last + reach // 2]))
            for at, first, last in ((rows, top, bottom), (columns, left, right))
        )
        prevails = np.rint(2**20 * (by_row[here[0], near[0]] @ more @ by_column[here[1], near[1]].T))
        seen = labels[here]
        seen[(seen == other) & (prevails > 0)] = one
        seen[(seen == one) & (prevails < 0)] = other


def _contacts(objects: np.ndarray) -> np.ndarray:
    """int64 (n, 6): for each pair of objects that touch, smaller and larger label, and the box around where they do.

    The box is top, left, bottom, right; half open."""
    found = []
    for axis in (0, 1):
        ahead, behind = (objects[1:], objects[:-1]) if axis == 0 else (objects[:, 1:], objects[:, :-1])
        at = np.nonzero((ahead != behind) & (ahead > 0) & (behind > 0))
        pair = np.sort([ahead[at], behind[at]], axis=0)
        found.append(np.stack([*pair, *at, at[0] + 2 - axis, at[1] + 1 + axis]).astype(np.int64))
    found = np.concatenate(found, axis=1)
    found = found[:, np.lexsort(found[1::-1])]
    new = np.flatnonzero(np.any(np.diff(found[:2], axis=1, prepend=-1), axis=0))
    if not len(new):
        return np.empty((0, 6), np.int64)
    edges = [np.minimum.reduceat(found[2:4], new, axis=1), np.maximum.reduceat(found[4:], new, axis=1)]
    return np.concatenate([found[:2, new], *edges]).T


def _nearness(at: np.ndarray, size: int) -> np.ndarray:
    """float64 (len(at), size): Gaussian weights of `size` pixels around pixels that lie evenly in the places `at`."""
    centre = (np.arange(len(at)) + 0.5) * (size / len(at)) - 0.5
    return np.exp(-0.5 * ((np.arange(size) - centre[:, None]) / SMOOTHING) ** 2)
