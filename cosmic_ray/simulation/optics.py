"""From emitted light to grey values: blur, illumination, background, camera."""

from __future__ import annotations

import math

import numpy as np

from cosmic_ray.simulation.keys import keyed
from cosmic_ray.simulation.spec import Camera, FieldSpec, Optics

_WATER = 1.33


def blur_um(optics: Optics, defocus_um: float) -> float:
    """Sigma of the PSF's core for a nucleus `defocus_um` off the focal plane, um."""
    diffraction = 0.21 * optics.wavelength_nm / 1000 / optics.na
    cone = math.tan(math.asin(min(optics.na / _WATER, 0.99))) / 2
    return math.hypot(diffraction, cone * defocus_um, cone * optics.thickness_um)


def blurred(layers: dict[float, np.ndarray], optics: Optics, pixel_um: float) -> np.ndarray:
    """Sum of canvases, each blurred for its own defocus; light is conserved (the canvas is periodic).

    Args:
        layers: defocus in um -> (H, W) float32 photoelectrons.
    """
    from scipy import fft

    shape = next(iter(layers.values())).shape
    squared = (np.fft.fftfreq(shape[0])[:, None] ** 2 + np.fft.rfftfreq(shape[1])[None, :] ** 2) / pixel_um**2
    squared = squared.astype(np.float32)
    halo = optics.halo * np.exp(np.float32(-2 * (math.pi * optics.halo_um) ** 2) * squared)
    total = np.zeros(squared.shape, np.complex64)
    for defocus, layer in layers.items():
        core = np.exp(np.float32(-2 * (math.pi * blur_um(optics, defocus)) ** 2) * squared)
        total += fft.rfft2(layer) * ((1 - optics.halo) * core + halo)
    return np.maximum(fft.irfft2(total, s=shape), 0)


def illumination(spec: FieldSpec, seed: int, plate: str) -> np.ndarray:
    """The plate's illumination, (height, width) float32 with mean 1: a vignette around an own centre, and a tilt."""
    rng = keyed(seed, plate, "illumination")
    y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in (spec.height, spec.width))
    centre, loss = rng.uniform(-0.3, 0.3, 2), spec.optics.vignetting * rng.uniform(0.6, 1)
    slope, angle = spec.optics.tilt * rng.uniform(0.3, 1) / 2, rng.uniform(0, 2 * np.pi)
    squared = (y[:, None] - centre[0]) ** 2 + (x[None, :] - centre[1]) ** 2
    vignette = 1 - loss * squared / squared.max()
    field = vignette * (1 + slope * (math.sin(angle) * y[:, None] + math.cos(angle) * x[None, :]))
    return (field / field.mean()).astype(np.float32)


def plate_brightness(camera: Camera, seed: int, plate: str) -> float:
    """The plate's staining relative to the mean of all plates."""
    return float(np.exp(keyed(seed, plate, "stain").normal() * math.sqrt(math.log1p(camera.stain_cv**2))))


def background(spec: FieldSpec, rng: np.random.Generator) -> np.ndarray:
    """A field's background before illumination, (height, width) float32 photoelectrons: a level with a slope."""
    y, x = (np.linspace(-0.5, 0.5, n, dtype=np.float32) for n in (spec.height, spec.width))
    slope, angle = spec.optics.background_gradient * rng.uniform(0, 1), rng.uniform(0, 2 * np.pi)
    level = spec.optics.background_per_um2 * spec.pixel_size_um**2 * math.exp(0.1 * rng.normal())
    return level * (1 + slope * (math.sin(angle) * y[:, None] + math.cos(angle) * x[None, :]))


def expose(electrons: np.ndarray, camera: Camera, rng: np.random.Generator) -> np.ndarray:
    """Grey values, uint16, of expected photoelectrons."""
    caught = rng.poisson(electrons) + camera.read_noise * rng.standard_normal(electrons.shape, dtype=np.float32)
    grey = np.rint(camera.offset + camera.gain * caught)
    return np.clip(grey, 0, 2**camera.bit_depth - 1).astype(np.uint16)
