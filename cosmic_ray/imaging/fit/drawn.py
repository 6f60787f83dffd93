"""Simulated patches of nuclei with their masks, and what optics, cameras and cells do to an image."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter, rotate


def draw_nuclei(rng: np.random.Generator, side: int, diameter: float) -> tuple[np.ndarray, np.ndarray]:
    """A simulated patch: one kind of cell, sparse to crowded, in clumps, alone or aligned, with specks between.

    Returns:
        image (side, side) float32, background 0, nuclei about 1; labels (side, side) int32.
    """
    kind = {
        "elongation": rng.uniform(0, 0.5),
        "roughness": rng.uniform(0, 0.18),
        "size_spread": rng.uniform(0.05, 0.35),
        "brightness_spread": rng.uniform(0.1, 0.6),
        "texture": rng.uniform(0, 0.45),
        "grain": rng.uniform(0.6, 2.5),
        "direction": rng.uniform(0, np.pi) if rng.random() < 0.4 else None,
        "overlap": rng.uniform(0, 0.3),
    }
    crowding = rng.choice([0.15, 0.5, 1.0, 1.6], p=[0.2, 0.3, 0.3, 0.2])
    clumps = _standard(gaussian_filter(rng.normal(size=(side, side)), 20))
    image, labels = np.zeros((side, side), np.float32), np.zeros((side, side), np.int32)
    for _ in range(int(crowding * (side / diameter) ** 2)):
        centre = rng.uniform(-4, side + 4, 2)
        row, column = np.clip(centre, 0, side - 1).astype(int)
        if rng.random() < 1 / (1 + np.exp(-2 * clumps[row, column] - 1)):
            _draw_one(rng, image, labels, centre, diameter, kind)
    image = gaussian_filter(image, rng.uniform(0.4, 1.3))
    for _ in range(rng.poisson(2)):
        speck = np.zeros_like(image)
        speck[tuple(rng.integers(0, side, 2))] = rng.uniform(1, 6)
        image += gaussian_filter(speck, rng.uniform(0.5, 1.2))
    labels[np.bincount(labels.ravel())[labels] < 10] = 0
    _, labels = np.unique(labels, return_inverse=True)
    return image, labels.reshape(side, side).astype(np.int32)


def _draw_one(rng, image, labels, centre, diameter, kind) -> None:
    """One nucleus: an ellipse with a wavy outline, domed, with chromatin grain; over or under those it overlaps."""
    side = len(image)
    radius = diameter / 2 * np.exp(rng.normal(0, kind["size_spread"]))
    elongation = np.exp(abs(rng.normal(0, kind["elongation"])))
    angle = rng.uniform(0, np.pi) if kind["direction"] is None else kind["direction"] + rng.normal(0, 0.3)
    reach = int(radius * elongation * 1.5) + 3
    top, left = (max(0, int(c) - reach) for c in centre)
    box = (slice(top, min(side, int(centre[0]) + reach)), slice(left, min(side, int(centre[1]) + reach)))
    old, light = labels[box], image[box]
    if min(old.shape) < 3:
        return
    y, x = np.ogrid[box]
    y, x = y - centre[0], x - centre[1]
    along = (np.cos(angle) * x + np.sin(angle) * y) / np.sqrt(elongation)
    across = (np.cos(angle) * y - np.sin(angle) * x) * np.sqrt(elongation)
    turn = np.arctan2(across, along)
    outline = sum(kind["roughness"] * rng.normal() / n * np.cos(n * turn + rng.uniform(0, 6.3)) for n in (2, 3, 4, 5))
    depth = np.hypot(along, across) / np.maximum(radius * (1 + outline), 1)
    mask = depth < 1
    if mask.sum() < 12 or (mask & (old > 0)).sum() > kind["overlap"] * mask.sum():
        return
    grain = np.exp(kind["texture"] * _standard(gaussian_filter(rng.normal(size=old.shape), kind["grain"])))
    value = np.exp(rng.normal(-0.2, kind["brightness_spread"])) * (1 - rng.uniform(0, 0.8) * np.minimum(depth, 1) ** 2)
    value = value * grain * mask
    both = np.maximum(light, value)
    light[...] = np.where(mask & (old > 0), both * rng.uniform(0.9, 1.3), both)
    old[mask if rng.random() < 0.5 else mask & (old == 0)] = labels.max() + 1


def spoil(rng: np.random.Generator, image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Dim nuclei, another camera curve, haze, uneven light, cytoplasm, defocus, noise, saturation; each at times."""
    shape, image = image.shape, np.maximum(image, 0)
    if rng.random() < 0.5:
        gain = np.exp(-rng.exponential(rng.uniform(0.1, 0.7), labels.max() + 1))
        gain[0] = 1
        image = image * gaussian_filter(gain[labels].astype(np.float32), 0.7)
    if rng.random() < 0.5:
        image = image ** rng.uniform(0.6, 1.6)
    if rng.random() < 0.6:
        image = image + gaussian_filter(image, rng.uniform(3, 12)) * rng.uniform(0, 0.7)
    if rng.random() < 0.5:
        light = _standard(gaussian_filter(rng.normal(size=shape), rng.uniform(25, 50)))
        image = image * np.exp(rng.uniform(0, 0.6) * light)
    if rng.random() < 0.5:
        glow = gaussian_filter(np.abs(rng.normal(size=shape)), rng.uniform(8, 40))
        image = image + rng.uniform(0, 0.5) * rng.uniform(0.3, 1.8) * glow
    if rng.random() < 0.3:
        fibres = _standard(gaussian_filter(rng.normal(size=shape), (rng.uniform(1, 3), rng.uniform(3, 14))))
        fibres = rotate(fibres, rng.uniform(0, 180), reshape=False, order=1, mode="reflect")
        image = image + rng.uniform(0, 0.12) * np.maximum(fibres, 0)
    if rng.random() < 0.5:
        image = gaussian_filter(image, rng.uniform(0, 1.4))
    image = image + rng.uniform(0, 0.6) ** 2 * 0.25 * rng.normal(size=shape)
    image = image + np.sqrt(np.maximum(image, 0)) * rng.uniform(0, 0.1) * rng.normal(size=shape)
    if rng.random() < 0.15:
        image = np.minimum(image, rng.uniform(0.5, 0.9))
    return image.astype(np.float32)


def _standard(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / (values.std() + 1e-9)
