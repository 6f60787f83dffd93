"""Crops at a model's door: those that it takes, and none other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import model_validator

from cosmic_ray.stores.manifest import CropSpec

if TYPE_CHECKING:
    import numpy as np


class InputSpec(CropSpec):
    """The crops that a model takes: a crop store's spec. Those of another shape are refused, never resized silently."""

    @model_validator(mode="after")
    def _square(self) -> InputSpec:
        if self.height != self.width:
            raise ValueError(f"crops must be square, not {self.height}x{self.width}")
        return self


def checked_crops(crops: np.ndarray, spec: CropSpec) -> np.ndarray:
    """uint8 (N, C, H, W) of what a user gave; one channel may go without its axis.

    Raises:
        TypeError: for another dtype than uint8.
        ValueError: for another shape than `spec`'s.
    """
    import numpy as np

    crops = np.asarray(crops)
    if crops.dtype != np.uint8:
        raise TypeError(f"crops must be uint8 with background 0, as in a crop store; these are {crops.dtype}")
    channels, height, width = spec.shape
    if crops.ndim == 3 and channels == 1:
        crops = crops[:, None]
    if crops.ndim != 4 or crops.shape[1:] != spec.shape:
        wanted = f"(N, {channels}, {height}, {width})" + (f" or (N, {height}, {width})" if channels == 1 else "")
        names = ", ".join(spec.channels)
        raise ValueError(f"crops are {crops.shape}; this model takes {wanted}, with channels {names}")
    return crops


def served_shape(spec: CropSpec) -> tuple[int, ...]:
    """(-1, H, W), or (-1, C, H, W) for several channels."""
    channels, height, width = spec.shape
    return (-1, height, width) if channels == 1 else (-1, channels, height, width)


def drawn_crops(shape: tuple[int, ...]) -> np.ndarray:
    """Two crops of a `served_shape`: a small and a large disc."""
    import numpy as np

    *channels, height, width = shape[1:]
    y, x = np.ogrid[:height, :width]
    distance = np.hypot(y - (height - 1) / 2, x - (width - 1) / 2)
    discs = np.stack([np.where(distance <= radius * height, 128, 0) for radius in (0.2, 0.4)]).astype(np.uint8)
    return np.broadcast_to(discs[:, None], (2, *channels, height, width)).copy() if channels else discs
