"""Outlines of nuclei: Fourier-deformed, bent superellipses of an exact area, as polygons and as pixels.

A point of the unit frame (u, v) lies at relative radius rho = |(u, v - bend u^2)| / R(angle), where R is a superellipse
of exponent 2.3 times 1 + sum Re(h_k exp(i k angle)); rho < 1 is inside. Stretching by the axes' ratio (at constant
area), scaling and rotating brings the unit frame to micrometres. Bending is a shear, so it keeps the area too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cosmic_ray.simulation.cells import HARMONICS, Nuclei

_STEPS = 720
_ANGLES = np.arange(_STEPS) * (2 * np.pi / _STEPS)
_SUPERELLIPSE = (np.abs(np.cos(_ANGLES)) ** 2.3 + np.abs(np.sin(_ANGLES)) ** 2.3) ** (-1 / 2.3)
"""Rounder ends than an ellipse's: those of a long nucleus are no points."""
_BASIS = np.exp(1j * np.outer(HARMONICS, _ANGLES))


@dataclass(frozen=True)
class Outline:
    """One nucleus' outline around its own origin, in um."""

    radii: np.ndarray
    """(720,) R at equal steps of the angle."""
    long_um: float
    """Micrometres of one unit along the long axis."""
    short_um: float
    """Micrometres of one unit along the short axis."""
    angle: float
    bend: float

    def points(self, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Map unit-frame points to (x, y) in um."""
        along, across = u * self.long_um, (v + self.bend * u**2) * self.short_um
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        return along * cos - across * sin, along * sin + across * cos

    def inside(self, rho: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Points (x, y) in um at relative radius `rho` and unit-frame angle `theta` in [0, 2 pi)."""
        radius = rho * np.interp(theta, _ANGLES, self.radii, period=2 * np.pi)
        u, v = radius * np.cos(theta), radius * np.sin(theta)
        return self.points(u, v)

    def polygon(self) -> tuple[np.ndarray, np.ndarray]:
        """The outline as 720 vertices (x, y) in um, counter-clockwise in x-right, y-up axes."""
        return self.points(self.radii * np.cos(_ANGLES), self.radii * np.sin(_ANGLES))


@dataclass(frozen=True)
class Patch:
    """One nucleus' outline on a square of pixels, (2 half + 1) a side, whose middle pixel is its place."""

    half: int
    rho: np.ndarray
    """(S, S) float32 relative radius; below 1 is inside."""
    depth_um: np.ndarray
    """(S, S) float32: distance to the outline along the radius, positive inside, um."""
    mask: np.ndarray
    """(S, S) bool: pixel centres inside."""


@dataclass(frozen=True)
class Moments:
    """Size and shape of an outline, as of a filled polygon."""

    area: float
    """um^2."""
    x: float
    y: float
    """Centroid relative to the origin, um."""
    major: float
    minor: float
    """Axes of the ellipse of the same second moments, um (as `skimage.measure.regionprops` defines them)."""
    angle: float
    """Direction of the major axis, radians in [0, pi), from x towards y."""
    perimeter: float
    """um."""

    @property
    def eccentricity(self) -> float:
        return float(np.sqrt(1 - (self.minor / self.major) ** 2))


def outline(nuclei: Nuclei, row: int) -> Outline:
    """The outline of one nucleus, scaled to its `area_um2` exactly."""
    radii = _SUPERELLIPSE * np.maximum(1 + (nuclei.harmonics[row] @ _BASIS).real, 0.35)
    unit_area = 0.5 * np.sin(2 * np.pi / _STEPS) * float(radii @ np.roll(radii, -1))
    scale = float(np.sqrt(nuclei.area_um2[row] / unit_area))
    stretch = float(np.sqrt(nuclei.aspect[row]))
    return Outline(radii, scale * stretch, scale / stretch, float(nuclei.angle[row]), float(nuclei.bend[row]))


def rasterise(shape: Outline, pixel_um: float, shift: tuple[float, float]) -> Patch:
    """Draw an outline on pixels; `shift` (y, x) moves it off the middle pixel's centre, in pixels."""
    x, y = shape.polygon()
    half = int(np.ceil(max(np.abs(x).max(), np.abs(y).max()) / pixel_um + 1.5))
    axis = np.arange(-half, half + 1, dtype=np.float32)
    x, y = (axis - shift[1])[None, :] * pixel_um, (axis - shift[0])[:, None] * pixel_um
    cos, sin = np.cos(shape.angle), np.sin(shape.angle)
    u = ((x * cos + y * sin) / shape.long_um).astype(np.float32)
    v = ((y * cos - x * sin) / shape.short_um).astype(np.float32) - np.float32(shape.bend) * u**2
    index = np.rint(np.arctan2(v, u) * (_STEPS / (2 * np.pi))).astype(np.int32) % _STEPS
    rho = np.hypot(u, v) / shape.radii.astype(np.float32)[index]
    distance = np.hypot(x, y).astype(np.float32)
    depth = distance * (1 / np.maximum(rho, 1e-3) - 1)
    return Patch(half, rho, depth, rho < 1)


def moments(shape: Outline) -> Moments:
    """Area, centroid and second moments of the outline's polygon (Green's theorem)."""
    x, y = shape.polygon()
    xn, yn = np.roll(x, -1), np.roll(y, -1)
    cross = x * yn - xn * y
    area = cross.sum() / 2
    cx, cy = ((x + xn) * cross).sum() / (6 * area), ((y + yn) * cross).sum() / (6 * area)
    xx = ((x * x + x * xn + xn * xn) * cross).sum() / (12 * area) - cx**2
    yy = ((y * y + y * yn + yn * yn) * cross).sum() / (12 * area) - cy**2
    xy = ((x * yn + 2 * x * y + 2 * xn * yn + xn * y) * cross).sum() / (24 * area) - cx * cy
    root = np.hypot((xx - yy) / 2, xy)
    major, minor = 4 * np.sqrt((xx + yy) / 2 + root), 4 * np.sqrt(max((xx + yy) / 2 - root, 1e-12))
    angle = (0.5 * np.arctan2(2 * xy, xx - yy)) % np.pi
    perimeter = float(np.hypot(xn - x, yn - y).sum())
    return Moments(*map(float, (area, cx, cy, major, minor, angle)), perimeter)
