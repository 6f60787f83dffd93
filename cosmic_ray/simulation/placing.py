"""Where nuclei lie: scattered with a gap, or pushed against another one until they touch or overlap a little."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cosmic_ray.simulation.cells import Nuclei
from cosmic_ray.simulation.shapes import Outline, Patch, outline, rasterise
from cosmic_ray.simulation.spec import FieldSpec

_SISTERS = 0.45
"""Distance of the two plates of an anaphase, in diameters of a G1 nucleus of the type (their area is 16 % of it)."""


@dataclass(frozen=True)
class Placed:
    """The nuclei of a canvas that found a place, in the order in which they were placed."""

    nuclei: Nuclei
    outlines: list[Outline]
    patches: list[Patch]
    rows: np.ndarray
    """int: canvas row of each patch's middle pixel."""
    columns: np.ndarray
    shifts: np.ndarray
    """(n, 2) float: what each origin lies off its middle pixel's centre (y, x), px."""
    owner: np.ndarray
    """(H, W) int32: 1 + index of the nucleus that a canvas pixel belongs to; the first one placed keeps it."""
    covered: np.ndarray
    """(n,) int: pixels of each nucleus that belong to another."""


def window(shape: tuple[int, int], row: int, column: int, half: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """The part of a canvas under a patch, and the part of the patch that lies on the canvas."""
    top, left = row - half, column - half
    bottom, right = min(row + half + 1, shape[0]), min(column + half + 1, shape[1])
    y, x = max(top, 0), max(left, 0)
    return (slice(y, bottom), slice(x, right)), (slice(y - top, bottom - top), slice(x - left, right - left))


def place(nuclei: Nuclei, spec: FieldSpec, canvas: tuple[int, int], rng: np.random.Generator) -> Placed:
    """Place cells one after another; those that find no room after 40 tries are left out."""
    shifts = rng.uniform(-0.5, 0.5, (len(nuclei), 2))
    outlines = [outline(nuclei, i) for i in range(len(nuclei))]
    patches = [rasterise(o, spec.pixel_size_um, tuple(s)) for o, s in zip(outlines, shifts, strict=True)]
    board = _Board(canvas, spec, rng)
    _, firsts, sizes = np.unique(nuclei.cell, return_index=True, return_counts=True)
    for first, size in zip(firsts, sizes, strict=True):
        parts = [(i, patches[i]) for i in range(first, first + size)]
        offsets = _sister_offsets(nuclei, first, size, spec.pixel_size_um)
        if rng.uniform() >= spec.clustering or not board.push(parts, offsets):
            board.scatter(parts, offsets)
    kept = np.array(board.kept, int)
    return Placed(
        nuclei=nuclei.take(kept),
        outlines=[outlines[i] for i in kept],
        patches=[patches[i] for i in kept],
        rows=np.array(board.rows, int),
        columns=np.array(board.columns, int),
        shifts=shifts[kept],
        owner=board.owner,
        covered=np.array(board.covered, int),
    )


def _sister_offsets(nuclei: Nuclei, first: int, size: int, pixel_um: float) -> list[tuple[int, int]]:
    """Offsets (y, x) in px of a cell's nuclei from its place: none, or the two plates of an anaphase."""
    if size == 1:
        return [(0, 0)]
    diameter = 2 * np.sqrt(nuclei.area_um2[first] / 0.16 / np.pi)
    reach = _SISTERS * diameter / 2 / pixel_um
    normal = nuclei.angle[first] + np.pi / 2
    y, x = round(reach * np.sin(normal)), round(reach * np.cos(normal))
    return [(y, x), (-y, -x)]


class _Board:
    """What is taken on the canvas."""

    def __init__(self, canvas: tuple[int, int], spec: FieldSpec, rng: np.random.Generator):
        self._spec, self._rng = spec, rng
        self.owner = np.zeros(canvas, np.int32)
        self._near = np.zeros(canvas, bool)
        self._patches: list[Patch] = []
        self.kept: list[int] = []
        self.rows: list[int] = []
        self.columns: list[int] = []
        self.covered: list[int] = []

    def scatter(self, parts: list[tuple[int, Patch]], offsets: list[tuple[int, int]]) -> bool:
        """Put a cell where it keeps the gap to all others."""
        height, width = self.owner.shape
        for _ in range(40):
            row, column = int(self._rng.integers(0, height)), int(self._rng.integers(0, width))
            if not any(self._hits(self._near, patch.mask, row + y, column + x) for (_, patch), (y, x) in
                       zip(parts, offsets, strict=True)):  # fmt: skip
                self._keep(parts, offsets, row, column)
                return True
        return False

    def push(self, parts: list[tuple[int, Patch]], offsets: list[tuple[int, int]]) -> bool:
        """Push a cell towards one that lies already until they touch, or overlap by a share drawn up to the limit."""
        if not self.kept:
            return False
        (_, patch), target = parts[0], self._rng.uniform(0, self._spec.max_overlap)
        for _ in range(8):
            partner, angle = int(self._rng.integers(len(self.kept))), self._rng.uniform(0, 2 * np.pi)
            far = patch.half + self._patches[partner].half
            for distance in range(far, 0, -1):
                row = self.rows[partner] + round(distance * np.sin(angle))
                column = self.columns[partner] + round(distance * np.cos(angle))
                met = self._met(parts, offsets, row, column)
                if met >= target:
                    break
            inside = 0 <= row < self.owner.shape[0] and 0 <= column < self.owner.shape[1]
            if inside and target <= met <= self._spec.max_overlap:
                self._keep(parts, offsets, row, column)
                return True
        return False

    def _met(self, parts: list[tuple[int, Patch]], offsets: list[tuple[int, int]], row: int, column: int) -> float:
        """The largest share of any nucleus, new or old, that would be covered; -1 where nothing touches."""
        worst = -1.0
        for (_, patch), (y, x) in zip(parts, offsets, strict=True):
            on, of = window(self.owner.shape, row + y, column + x, patch.half)
            below = self.owner[on]
            if below.size == 0 or not below[patch.depth_um[of] > -1.2 * self._spec.pixel_size_um].any():
                continue
            under = np.bincount(below[patch.mask[of]])
            worst = max(worst, 0.0)
            for other in np.flatnonzero(under[1:]) + 1:
                smaller = min(patch.mask.sum(), self._patches[other - 1].mask.sum())
                worst = max(worst, under[other] / smaller)
        return worst

    def _hits(self, taken: np.ndarray, mask: np.ndarray, row: int, column: int) -> bool:
        on, of = window(taken.shape, row, column, mask.shape[0] // 2)
        return bool((taken[on] & mask[of]).any())

    def _keep(self, parts: list[tuple[int, Patch]], offsets: list[tuple[int, int]], row: int, column: int) -> None:
        for (index, patch), (y, x) in zip(parts, offsets, strict=True):
            on, of = window(self.owner.shape, row + y, column + x, patch.half)
            mine, below = patch.mask[of], self.owner[on]
            self.kept.append(index)
            self._patches.append(patch)
            self.rows.append(row + y)
            self.columns.append(column + x)
            self.covered.append(int(np.count_nonzero(below[mine])))
            below[mine & (below == 0)] = len(self.kept)
            self._near[on] |= patch.depth_um[of] > -self._spec.gap_um
