"""What shines and is no nucleus: specks, clouds far out of focus, and the fragments of dead cells."""

from __future__ import annotations

import math

import numpy as np

from cosmic_ray.simulation.spec import FieldSpec


def draw_debris(spec: FieldSpec, canvas: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Debris of one canvas before optics.

    Light is relative to a G1 nucleus (2 N): a speck has 0.05 to 2 %, a cloud 10 to 60 %, a corpse 40 to 160 %.

    Returns:
        (H, W) float32 photoelectrons, and how many things there are.
    """
    light = np.zeros(canvas, np.float32)
    pixel = spec.pixel_size_um
    mm2 = canvas[0] * canvas[1] * pixel**2 / 1e6
    nucleus = 2 * spec.camera.photons_per_n
    kinds = (
        (rng.poisson(spec.debris.specks_per_mm2 * mm2), (0.1, 0.5), (5e-4, 0.02)),
        (rng.poisson(spec.debris.clouds_per_mm2 * mm2), (4.0, 10.0), (0.1, 0.6)),
    )
    for count, sigmas, amounts in kinds:
        for _ in range(count):
            centre = rng.uniform(0, canvas[0]), rng.uniform(0, canvas[1])
            amount = math.exp(rng.uniform(math.log(amounts[0]), math.log(amounts[1])))
            _add_blob(light, centre, rng.uniform(*sigmas) / pixel, amount * nucleus)
    corpses = rng.poisson(spec.debris.corpses_per_mm2 * mm2)
    for _ in range(corpses):
        _add_corpse(light, nucleus * rng.uniform(0.4, 1.6), pixel, rng)
    return light, int(sum(count for count, *_ in kinds) + corpses)


def _add_blob(light: np.ndarray, centre: tuple[float, float], sigma_px: float, amount: float) -> None:
    """A Gaussian of the given total, cut by the canvas."""
    sigma = max(sigma_px, 0.3)
    axes = [np.arange(max(int(c - 4 * sigma), 0), min(int(c + 4 * sigma) + 2, n)) for c, n in
            zip(centre, light.shape, strict=True)]  # fmt: skip
    y, x = (np.exp(-0.5 * ((axis - c) / sigma) ** 2) for axis, c in zip(axes, centre, strict=True))
    light[np.ix_(*axes)] += (np.outer(y, x) * (amount / (2 * math.pi * sigma**2))).astype(np.float32)


def _add_corpse(light: np.ndarray, amount: float, pixel: float, rng: np.random.Generator) -> None:
    """A cluster of round, smooth balls: karyorrhexis, or one pyknotic ball."""
    count = int(rng.integers(1, 6))
    radii = rng.uniform(0.8, 2.2, count) * (1.3 if count == 1 else 1.0)
    centre = np.array([rng.uniform(0, n) for n in light.shape])
    weights = radii**3 / (radii**3).sum()
    for radius, weight in zip(radii, weights, strict=True):
        place = centre + rng.normal(0, 1.2 * math.sqrt(count - 1) / pixel, 2)
        reach = radius / pixel
        axes = [np.arange(max(int(c - reach), 0), min(int(c + reach) + 2, n)) for c, n in
                zip(place, light.shape, strict=True)]  # fmt: skip
        squared = ((axes[0] - place[0])[:, None] ** 2 + (axes[1] - place[1])[None, :] ** 2) / reach**2
        ball = np.sqrt(np.maximum(1 - squared, 0))
        light[np.ix_(*axes)] += (ball * (amount * weight / (2 / 3 * math.pi * reach**2))).astype(np.float32)
