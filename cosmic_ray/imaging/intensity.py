"""Raw intensities to uint8 and back: 0 is background, a nucleus pixel is at least 1."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from cosmic_ray.config import Config
from cosmic_ray.imaging.histogram import Histogram

Percent = Annotated[float, Field(ge=0, le=100)]


class Intensity(Config):
    """How raw intensities become uint8."""

    mapping: Literal["plate", "patch"] = "plate"
    """`plate`: one line for all nuclei of a plate (and channel), so that brightness can be compared between them.
    `patch`: each nucleus by its own maximum, as the paper does; this destroys the DNA content."""

    low: Percent = 0.1
    """`plate` only: this percentile of the plate's nucleus pixels becomes 1; darker ones too."""

    high: Percent = 99.9
    """`plate` only: this percentile of the plate's nucleus pixels becomes 255; brighter ones too."""

    @model_validator(mode="after")
    def _ordered(self) -> Intensity:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        return self


Line = tuple[np.float32, np.float32]
"""(scale, offset): raw = offset + scale * stored, for stored >= 1. Scale is 0 where all pixels are equal, else more."""


def plate_line(pixels: Histogram, settings: Intensity) -> Line:
    """The line through (low percentile, 1) and (high percentile, 255) of a plate's nucleus pixels in one channel."""
    low, high = pixels.percentile(settings.low), pixels.percentile(settings.high)
    scale = np.float32((high - low) / 254)
    return scale, np.float32(low - scale)


def patch_line(pixels: np.ndarray) -> Line:
    """COSMIC App. B: each patch to [0, 1]. Background is 0 in a masked patch, so that its maximum alone decides.

    Args:
        pixels: (n,) raw intensities of the nucleus, n >= 1.
    """
    return np.float32(pixels.max() / 255), np.float32(0)


def quantise(pixels: np.ndarray, line: Line) -> np.ndarray:
    """Raw intensities to uint8 in 1..255: rounded to the nearest step, ends clipped; all 1 where scale is 0.

    Between the ends, offset + scale * stored is the raw value within half a step. With `patch_line`, pixels below half
    a step become 1, since 0 is background.
    """
    scale, offset = (float(part) for part in line)
    if scale == 0:
        return np.ones(pixels.shape, np.uint8)
    return np.clip(np.rint((pixels - offset) / scale), 1, 255).astype(np.uint8)
