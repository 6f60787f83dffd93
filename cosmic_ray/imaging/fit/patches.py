"""Training patches for the nucleus network: cut from fields with masks, crowded with pasted nuclei, or drawn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from cosmic_ray.imaging.fit.drawn import draw_nuclei, spoil
from cosmic_ray.imaging.nucleus_net import DIAMETER_PX
from cosmic_ray.imaging.read import read_field
from cosmic_ray.imaging.segment_better import normalise, rescale

SIDE = 128
MASTER_PX = 24.0
"""Diameter of a nucleus in the copies that patches are cut from: finer than the network's, so that scaling is free."""

DEPTH_PX = 4.0


@dataclass(frozen=True)
class MaskedField:
    """A field at the master scale with its hand-made masks."""

    image: np.ndarray
    """(H, W) float32."""

    labels: np.ndarray
    """(H, W) int32."""

    diameter: float
    """Of its nuclei, px; half of the area belongs to smaller ones."""


def read_set(folder: Path) -> list[MaskedField]:
    """The fields of `folder`: `images/*.png`, and `labels/` with the same names."""
    return [_masked(image, folder / "labels" / image.name) for image in sorted((folder / "images").glob("*.png"))]


def _masked(image_path: Path, labels_path: Path) -> MaskedField:
    from PIL import Image

    image = read_field(image_path.read_bytes(), str(image_path))
    labels = np.asarray(Image.open(labels_path)).astype(np.int32)
    area = np.sort(np.bincount(labels.ravel())[1:])
    diameter = 2 * float(np.sqrt(area[np.searchsorted(np.cumsum(area), area.sum() / 2)] / np.pi))
    scale = min(MASTER_PX / diameter, 2.5)
    small = rescale(image, scale).astype(np.float32)
    rows, columns = (
        np.minimum(((np.arange(to) + 0.5) * have / to).astype(int), have - 1)
        for to, have in zip(small.shape, labels.shape, strict=True)
    )
    return MaskedField(small, labels[rows][:, columns], diameter * scale)


def target(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the network is to say, and how much each pixel counts.

    Inside a nucleus the distance to its outline over `DEPTH_PX` (or four fifths of its own depth where that is less),
    at most 1; outside minus the distance over `DEPTH_PX`, at least -1; 0 where two nuclei touch. Pixels near such a
    contact count three times.
    """
    inside = labels > 0
    contact = np.zeros_like(inside)
    for axis in (0, 1):
        one, other = np.moveaxis(labels, axis, 0)[1:], np.moveaxis(labels, axis, 0)[:-1]
        touching = (one != other) & (one > 0) & (other > 0)
        np.moveaxis(contact, axis, 0)[1:] |= touching
        np.moveaxis(contact, axis, 0)[:-1] |= touching
    depth = ndimage.distance_transform_edt(inside & ~contact)
    deepest = np.asarray(ndimage.maximum(depth, labels, np.arange(labels.max() + 1)))
    cap = np.clip(0.8 * deepest, 1.0, DEPTH_PX)
    value = np.where(inside, np.minimum(1, depth / cap[labels]), 0.0)
    value -= np.where(inside, 0.0, np.minimum(1, ndimage.distance_transform_edt(~inside) / DEPTH_PX))
    return value.astype(np.float32), (1 + 2 * ndimage.maximum_filter(contact, 5)).astype(np.float32)


class PatchSource:
    """An endless source of (image uint8, target float32, weight float32), each (SIDE, SIDE)."""

    def __init__(self, fields: list[MaskedField], simulated_share: float, rng: np.random.Generator):
        self.fields, self.simulated_share, self.rng = fields, simulated_share, rng
        weights = np.sqrt([field.labels.max() + 3 for field in fields])
        self.weights = weights / weights.sum()
        self.cuttings = [
            cutting for field in fields for cutting in self._cut_out(field, 40 if len(fields) < 100 else 5)
        ]

    def draw(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = self.rng
        diameter = DIAMETER_PX * np.exp(rng.normal(-0.03, 0.25))
        kind = rng.random()
        if kind < 0.03:
            image, labels = np.zeros((SIDE, SIDE), np.float32), np.zeros((SIDE, SIDE), np.int32)
        elif kind < 0.03 + 0.97 * self.simulated_share:
            image, labels = draw_nuclei(rng, SIDE, diameter)
        else:
            image, labels = self._cut(diameter)
            if rng.random() < 0.45:
                self._crowd(image, labels, diameter)
        seen = normalise(spoil(rng, image, labels), rng.choice([0.1, 0.15, 0.3]))
        if rng.random() < 0.3:
            seen = np.clip(np.rint(seen * np.exp(rng.uniform(-0.35, 0.15))), 0, 255).astype(np.uint8)
        return seen, *target(labels)

    def _cut(self, diameter: float) -> tuple[np.ndarray, np.ndarray]:
        """A turned and scaled piece of a field, background about 0 and nuclei about 1."""
        rng = self.rng
        field = self.fields[rng.choice(len(self.fields), p=self.weights)]
        zoom = diameter / field.diameter
        reach = SIDE / 2 / zoom
        centre = [np.clip(rng.uniform(0, n), min(n / 2, reach), max(n / 2, n - reach)) for n in field.labels.shape]
        first = [max(0, int(c) - int(1.5 * reach) - 2) for c in centre]
        part = tuple(slice(f, int(c) + int(1.5 * reach) + 2) for f, c in zip(first, centre, strict=True))
        image = field.image[part]
        if zoom < 0.9:
            image = ndimage.gaussian_filter(image, 0.4 / zoom)
        at = [c - f for c, f in zip(centre, first, strict=True)]
        image, labels = self._turn(image, field.labels[part], zoom, (SIDE, SIDE), at, "reflect")
        low, high = np.percentile(image, 2), np.percentile(image, 99)
        if (labels > 0).mean() > 0.01:
            high = np.percentile(image[labels > 0], 80)
        _, labels = np.unique(labels, return_inverse=True)
        return (image - low) / max(high - low, 1.0), labels.reshape(SIDE, SIDE).astype(np.int32)

    def _turn(self, image, labels, zoom, shape, centre, beyond) -> tuple[np.ndarray, np.ndarray]:
        """Rotate, mirror, stretch a little and scale both about `centre` into `shape`."""
        angle, stretch, mirror = (
            self.rng.uniform(0, 2 * np.pi),
            np.exp(self.rng.normal(0, 0.08)),
            self.rng.choice([-1, 1]),
        )
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        matrix = turn @ np.diag([stretch, mirror / stretch]) / zoom
        offset = np.asarray(centre) - matrix @ ((np.array(shape) - 1) / 2)
        turned = ndimage.affine_transform(image, matrix, offset, shape, order=1, mode="reflect")
        return turned, ndimage.affine_transform(labels, matrix, offset, shape, order=0, mode=beyond)

    def _cut_out(self, field: MaskedField, most: int) -> list[tuple[np.ndarray, np.ndarray, float]]:
        """Up to `most` whole nuclei of a field: (image, mask, diameter of the field's nuclei)."""
        boxes = [(number, box) for number, box in enumerate(ndimage.find_objects(field.labels), start=1) if box]
        self.rng.shuffle(boxes)
        low = np.percentile(field.image, 5)
        found = []
        for number, box in boxes[:most]:
            mask, image = field.labels[box] == number, field.image[box] - low
            inside = all(s.start > 0 and s.stop < n for s, n in zip(box, field.labels.shape, strict=True))
            if inside and mask.sum() >= 40:
                found.append((image / max(np.percentile(image[mask], 90), 1.0), mask, field.diameter))
        return found

    def _crowd(self, image: np.ndarray, labels: np.ndarray, diameter: float) -> None:
        """Paste up to nine nuclei into the patch, most of them against one that is there."""
        rng = self.rng
        for _ in range(rng.integers(1, 10)):
            cutting, mask, own = self.cuttings[rng.integers(len(self.cuttings))]
            zoom = diameter / own * np.exp(rng.normal(0, 0.2))
            side = int(np.ceil(max(mask.shape) * zoom * 1.5)) + 2
            if not 4 <= side <= SIDE - 2:
                continue
            middle = [(n - 1) / 2 for n in mask.shape]
            piece, shape = self._turn(cutting, mask.astype(np.int32), zoom, (side, side), middle, "constant")
            top, left = self._place(labels, side, diameter)
            here = (slice(max(top, 0), top + side), slice(max(left, 0), left + side))
            old = labels[here]
            cut = (slice(max(-top, 0), max(-top, 0) + old.shape[0]), slice(max(-left, 0), max(-left, 0) + old.shape[1]))
            piece, shape = piece[cut] * np.exp(rng.normal(-0.2, 0.4)), shape[cut] > 0
            if shape.sum() < 8 or (shape & (old > 0)).sum() > 0.35 * shape.sum():
                continue
            soft = ndimage.gaussian_filter(shape.astype(np.float32), 0.7)
            over = rng.random() < 0.5
            image[here] = (
                np.maximum(image[here], piece * soft) if over else image[here] * (1 - 0.7 * soft) + piece * soft
            )
            old[shape] = labels.max() + 1

    def _place(self, labels: np.ndarray, side: int, diameter: float) -> tuple[int, int]:
        rows, columns = np.nonzero(labels)
        if len(rows) and self.rng.random() < 0.7:
            beside, angle = self.rng.integers(len(rows)), self.rng.uniform(0, 2 * np.pi)
            row, column = (
                rows[beside] + 0.7 * diameter * np.sin(angle),
                columns[beside] + 0.7 * diameter * np.cos(angle),
            )
        else:
            row, column = self.rng.uniform(0, SIDE, 2)
        return int(np.clip(row - side / 2, -side / 2, SIDE - side / 2)), int(
            np.clip(column - side / 2, -side / 2, SIDE - side / 2)
        )
