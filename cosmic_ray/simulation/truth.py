"""The truth of a field's nuclei: what was drawn, and what of it shows, as label image and columns."""

from __future__ import annotations

import numpy as np

from cosmic_ray.simulation.placing import Placed
from cosmic_ray.simulation.shapes import moments
from cosmic_ray.simulation.spec import FieldSpec

_DRAWN = (
    "cell", "cell_type", "state", "mitosis", "phase", "dna", "stain", "area_um2", "grain_um", "contrast", "nucleoli",
    "nucleolus_um", "nucleolus_depth", "foci", "focus_um", "focus_gain", "rim", "flatness", "bend",
)  # fmt: skip


def truth_columns(
    placed: Placed, spec: FieldSpec, seen: tuple[slice, slice], dirty: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The label image of the visible part, and one row for every nucleus that has a pixel in it.

    Columns: those of `Nuclei` that describe it, and `label`; `area_px`, `perimeter_um`, `major_um`, `minor_um`,
    `eccentricity`, `orientation`, `irregularity` of the whole outline; `centroid_x`, `centroid_y` (px, pixel centres at
    integers, outside the field for some); `visible_px` (pixels with its label); `covered` (share hidden by others);
    `touches_border`, `touching` (8-neighbour of another label); `in_debris` (share of its pixels where debris is
    brighter than a fifth of the nuclei).

    Args:
        dirty: (H, W) bool, where debris shows.
    """
    owner = placed.owner[seen]
    count = len(placed.nuclei)
    visible = np.bincount(owner.ravel(), minlength=count + 1)[1:]
    row = np.flatnonzero(visible)
    number = np.zeros(count + 1, np.uint16)
    number[row + 1] = np.arange(1, len(row) + 1)
    labels = number[owner]
    edge = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    dirt = np.bincount(labels[dirty], minlength=len(row) + 1)[1:]
    label = np.arange(1, len(row) + 1, dtype=np.int32)
    columns = {"row": row, "label": label}
    columns |= {name: getattr(placed.nuclei, name)[row] for name in _DRAWN}
    columns |= _outlines(placed, spec, row, seen)
    columns |= {
        "visible_px": visible[row],
        "covered": placed.covered[row] / np.array([placed.patches[i].mask.sum() for i in row], float),
        "touches_border": np.isin(label, edge),
        "touching": np.isin(label, _touching(labels)),
        "in_debris": dirt / visible[row],
    }
    return labels, columns


def _outlines(placed: Placed, spec: FieldSpec, row: np.ndarray, seen: tuple[slice, slice]) -> dict[str, np.ndarray]:
    shapes = [moments(placed.outlines[i]) for i in row]
    pixel = spec.pixel_size_um

    def each(name: str) -> np.ndarray:
        return np.array([getattr(one, name) for one in shapes], float)

    power = (np.abs(placed.nuclei.harmonics[row]) ** 2).sum(axis=1) / 2
    return {
        "area_px": each("area") / pixel**2,
        "perimeter_um": each("perimeter"),
        "major_um": each("major"),
        "minor_um": each("minor"),
        "eccentricity": each("eccentricity"),
        "orientation": each("angle"),
        "irregularity": np.sqrt(power),
        "centroid_y": placed.rows[row] + placed.shifts[row, 0] + each("y") / pixel - seen[0].start,
        "centroid_x": placed.columns[row] + placed.shifts[row, 1] + each("x") / pixel - seen[1].start,
    }


def _touching(labels: np.ndarray) -> np.ndarray:
    """Labels that have another label among their 8 neighbours."""
    found = []
    for a, b in (
        (labels[:, 1:], labels[:, :-1]),
        (labels[1:], labels[:-1]),
        (labels[1:, 1:], labels[:-1, :-1]),
        (labels[1:, :-1], labels[:-1, 1:]),
    ):
        pair = (a != b) & (a > 0) & (b > 0)
        found += [a[pair], b[pair]]
    return np.unique(np.concatenate(found))
