"""Is an object a whole nucleus, in focus, alone? Measured in columns, judged by stated thresholds; no I/O."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import numpy as np
from pydantic import Field

from cosmic_ray.config import Config

QualityReason = Literal["touches the border", "saturated", "debris", "low contrast", "blurred", "not convex", "crowded"]
QUALITY_REASONS: tuple[str, ...] = get_args(QualityReason)
"""In the order in which they are asked: an object with several faults is told the first."""

WHITE_LEVELS = tuple(2**bits - 1 for bits in (8, 10, 12, 14, 16))


class Quality(Config):
    """Which objects are left out. A threshold of null is not asked."""

    enabled: bool = True
    """False: nothing is measured and nothing left out."""

    max_saturated: Annotated[float, Field(ge=0, le=1)] | None = 0.01
    """Largest share of an object's pixels at the camera's white level (`q_saturated`)."""

    max_debris: float | None = 2.5
    """Largest debris score (`q_debris`): doublings of brightness above, plus halvings of area below, the field's usual.
    A metaphase plate, half the area and twice as bright, has 2; an apoptotic body, a quarter and twice, has 3."""

    min_contrast: float | None = 0.25
    """Least (inside - around) / (inside + around) over the field's background (`q_contrast`)."""

    max_edge_width: float | None = 0.4
    """Widest outline, as a share of the diameter (`q_edge_width`): brightness inside over slope at the outline."""

    min_solidity: Annotated[float, Field(ge=0, le=1)] | None = 0.85
    """Least area over the area of the convex hull (`q_solidity`): less is several nuclei, or a broken one."""

    max_touching: Annotated[float, Field(ge=0, le=1)] | None = 0.5
    """Largest share of the outline that lies against another object (`q_touching`)."""


def white_pixels(image: np.ndarray) -> np.ndarray:
    """Where an image as the camera gave it lies at the white level: (H, W) bool.

    That level is the largest value of a camera of 8 to 16 bits, and only if the field's maximum is just that.
    """
    white = image.max()
    if image.dtype.kind != "u" or white not in WHITE_LEVELS:
        return np.zeros(image.shape, bool)
    return image == white


def check_objects(
    labels: np.ndarray,
    image: np.ndarray,
    columns: dict[str, np.ndarray],
    settings: Quality,
    white: np.ndarray | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Measure the quality of every object and say why it should be left out, if so.

    Args:
        labels: (H, W) integers, 0 background.
        image: (H, W), what was segmented.
        columns: `segment.measure(labels, image)`.
        settings: the thresholds.
        white: (H, W) bool, `white_pixels` of what the camera gave, where `image` has been corrected or rescaled since:
            that moves saturated pixels off the white level.

    Returns:
        Columns of shape (n,), float32, in the order of `columns`:
        `q_saturated`, 0..1, share of pixels at the white level;
        `q_debris`, -inf..inf, max(0, log2 of the mean above background over the field's median) - log2 of the area over
        the field's median, the medians over objects off the border;
        `q_contrast`, -1..1, (a - b) / (a + b) for the means above the field's background of the object (a) and of the
        ring around it (b);
        `q_edge_width`, 0..1, a over the mean slope at the free outline (px), over the diameter of a disc of that area;
        1 where there is no slope;
        `q_solidity`, 0..1;
        `q_touching`, 0..1, share of the object's outline that lies against another object.
        And (n,) str: the first of `QUALITY_REASONS` that holds, or "". Where the checks are not enabled, no columns and
        only "".
    """
    n = len(columns["label"])
    if not settings.enabled:
        return {}, np.zeros(n, "U1")
    if not n:
        names = ("saturated", "debris", "contrast", "edge_width", "solidity", "touching")
        return {f"q_{name}": np.zeros(0, np.float32) for name in names}, np.zeros(0, "U1")
    row = np.full(int(columns["label"].max()) + 1, -1)
    row[columns["label"]] = np.arange(n)
    background = float(np.median(image[labels == 0])) if (labels == 0).any() else float(image.min())
    above = columns["mean_intensity"] - background
    checks = _edges(labels, image, row, columns, background)
    white = white_pixels(image) if white is None else white
    checks["q_saturated"] = _share_of(labels, white, row, columns["area_px"])
    checks["q_debris"] = _debris(above, columns["area_px"], ~columns["touches_border"])
    checks["q_solidity"] = columns["solidity"]
    checks = {name: values.astype(np.float32) for name, values in checks.items()}
    return checks, _reasons(checks, columns["touches_border"], settings)


def _share_of(labels: np.ndarray, mask: np.ndarray, row: np.ndarray, area: np.ndarray) -> np.ndarray:
    return np.bincount(row[labels[mask & (labels > 0)]], minlength=len(area)) / area


def _debris(above: np.ndarray, area: np.ndarray, whole: np.ndarray) -> np.ndarray:
    usual = whole if whole.any() else np.ones_like(whole)
    brightness = above / max(float(np.median(above[usual])), 1e-9)
    return np.maximum(0, np.log2(np.maximum(brightness, 1e-9))) - np.log2(area / np.median(area[usual]))


def _edges(
    labels: np.ndarray, image: np.ndarray, row: np.ndarray, columns: dict[str, np.ndarray], background: float
) -> dict[str, np.ndarray]:
    from scipy import ndimage

    n, area = len(columns["label"]), columns["area_px"]
    diameter = 2 * np.sqrt(area / np.pi)
    lowest, highest = ndimage.minimum_filter(labels, 3), ndimage.maximum_filter(labels, 3)
    outline = (labels > 0) & (lowest != highest)
    owner = row[labels[outline]]
    length = np.maximum(np.bincount(owner, minlength=n), 1)
    free = lowest[outline] == 0
    beside = (highest[outline] != labels[outline]) | (~free & (lowest[outline] != labels[outline]))

    smooth = ndimage.gaussian_filter(image.astype(np.float32), 1.0)
    down, right = np.gradient(smooth)
    slope = np.hypot(down[outline], right[outline])[free]
    steep = np.bincount(owner[free], slope, minlength=n) / np.maximum(np.bincount(owner[free], minlength=n), 1)

    reach = max(2, round(float(np.median(diameter)) / 4))
    near = _around(labels, reach)
    ring = near > 0
    pixels = np.bincount(row[near[ring]], minlength=n)
    around = np.bincount(row[near[ring]], smooth[ring], minlength=n) / np.maximum(pixels, 1) - background
    inside = columns["mean_intensity"] - background
    around = np.where(pixels > 0, np.maximum(around, 0), 0)
    rise = inside - around
    return {
        "q_contrast": rise / np.maximum(np.abs(inside) + around, 1e-9),
        "q_edge_width": np.clip(np.where(inside > 0, inside / np.maximum(steep, 1e-9) / diameter, 1), 0, 1),
        "q_touching": np.bincount(owner[beside], minlength=n) / length,
    }


def _around(labels: np.ndarray, reach: int) -> np.ndarray:
    """(H, W) labels of the background pixels within `reach` px (along the axes and diagonals) of one object alone."""
    from scipy import ndimage

    size = 2 * reach + 1
    highest = ndimage.maximum_filter(labels, size)
    shifted = np.where(labels > 0, labels, highest.max() + 1)
    lowest = ndimage.minimum_filter(shifted, size)
    return np.where((labels == 0) & (highest == lowest), highest, 0)


def _reasons(checks: dict[str, np.ndarray], touches_border: np.ndarray, settings: Quality) -> np.ndarray:
    def beyond(name: str, limit: float | None, sign: int = 1) -> np.ndarray:
        values = checks[name]
        return np.zeros(len(values), bool) if limit is None else sign * values > sign * limit

    faults = {
        "touches the border": touches_border,
        "saturated": beyond("q_saturated", settings.max_saturated),
        "debris": beyond("q_debris", settings.max_debris),
        "low contrast": beyond("q_contrast", settings.min_contrast, -1),
        "blurred": beyond("q_edge_width", settings.max_edge_width),
        "not convex": beyond("q_solidity", settings.min_solidity, -1),
        "crowded": beyond("q_touching", settings.max_touching),
    }
    return np.select([faults[reason] for reason in QUALITY_REASONS], QUALITY_REASONS, default="")
