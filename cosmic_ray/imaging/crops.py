"""A nucleus cut from its field: which window, which pixels, and the uint8 crop they become."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cosmic_ray.imaging.intensity import Line, quantise

_HEADER = struct.Struct("<4HB")


@dataclass(frozen=True)
class Patch:
    """The raw pixels of one nucleus, and where they go in its crop."""

    top: int
    """Row of the crop that holds the first row of `mask`."""
    left: int
    mask: np.ndarray
    """(h, w) bool: the nucleus, in its bounding box."""
    pixels: np.ndarray
    """(C, n) uint8 or uint16: raw intensities where `mask` is set, in C order."""

    def pack(self) -> bytes:
        """As bytes: a header, the mask's bits, the pixels of the nucleus and nothing of its neighbours."""
        height, width = self.mask.shape
        header = _HEADER.pack(self.top, self.left, height, width, self.pixels.dtype.itemsize)
        little = np.ascontiguousarray(self.pixels, self.pixels.dtype.newbyteorder("<"))
        return header + np.packbits(self.mask).tobytes() + little.tobytes()

    @classmethod
    def unpack(cls, data: bytes, channels: int) -> Patch:
        """The inverse of `pack`."""
        top, left, height, width, itemsize = _HEADER.unpack_from(data)
        bits = np.frombuffer(data, np.uint8, (height * width + 7) // 8, _HEADER.size)
        mask = np.unpackbits(bits, count=height * width).view(bool).reshape(height, width)
        pixels = np.frombuffer(data, f"<u{itemsize}", offset=_HEADER.size + len(bits))
        return cls(top, left, mask, pixels.reshape(channels, -1))


def window_start(centroid: np.ndarray, size: int) -> np.ndarray:
    """First row (or column) of the window of `size` px whose centre lies within half a pixel of `centroid`: int64 (n,).

    Args:
        centroid: (n,) px, pixel centres at integers.
        size: of the crop along this axis.
    """
    return np.floor(centroid - (size - 1) / 2 + 0.5).astype(np.int64)


def fits(columns: dict[str, np.ndarray], size: int) -> np.ndarray:
    """Which objects lie wholly inside the crop centred on them: bool (n,).

    Args:
        columns: of `segment.measure`.
        size: height and width of the crop in px.
    """
    top = window_start(columns["centroid_y"], size)
    left = window_start(columns["centroid_x"], size)
    down = (columns["bbox_top"] >= top) & (columns["bbox_bottom"] <= top + size)
    across = (columns["bbox_left"] >= left) & (columns["bbox_right"] <= left + size)
    return down & across


def cut(field: np.ndarray, labels: np.ndarray, columns: dict[str, np.ndarray], row: int, size: int) -> Patch:
    """The pixels of the object in `row` of `columns`, of all channels, neighbours and background left out.

    Args:
        field: (C, H, W) uint8 or uint16.
        labels: (H, W) integers.
        columns: of `segment.measure`; the object fits (`fits`).
        size: height and width of the crop in px.
    """
    top, bottom = int(columns["bbox_top"][row]), int(columns["bbox_bottom"][row])
    left, right = int(columns["bbox_left"][row]), int(columns["bbox_right"][row])
    mask = labels[top:bottom, left:right] == columns["label"][row]
    first_row = int(window_start(columns["centroid_y"][row], size))
    first_column = int(window_start(columns["centroid_x"][row], size))
    return Patch(top - first_row, left - first_column, mask, field[:, top:bottom, left:right][:, mask])


def render(patch: Patch, lines: Sequence[Line] | None, out: np.ndarray) -> None:
    """Write a patch as a crop: 0 outside the nucleus, 1..255 on it.

    Args:
        lines: one (scale, offset) a channel; None takes uint8 pixels over as they are.
        out: (C, S, S) uint8, all 0.
    """
    height, width = patch.mask.shape
    box = out[:, patch.top : patch.top + height, patch.left : patch.left + width]
    for channel, pixels in enumerate(patch.pixels):
        box[channel][patch.mask] = pixels if lines is None else quantise(pixels, lines[channel])
