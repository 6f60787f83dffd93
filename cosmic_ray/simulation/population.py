"""The cells of a paired simulation before they have image or counts: type, batch, donor, factors and shadows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cosmic_ray.simulation.keys import keyed
from cosmic_ray.simulation.links import draw_factors
from cosmic_ray.simulation.paired_spec import FACTORS, PairedSpec

CHUNK = 64
"""Cells that are drawn together, and written as one part. Fixed: it decides the numbers."""


@dataclass(frozen=True)
class Cells:
    """Some cells; arrays of length n."""

    number: np.ndarray
    """int64: counted from 0 over the simulation."""
    kind: np.ndarray
    """int64: index into the cell types, in the order of the spec."""
    batch: np.ndarray
    """int64."""
    donor: np.ndarray
    """int64."""
    factors: np.ndarray
    """float64 (n, FACTORS): z, within the type."""
    levels: np.ndarray
    """float64 (n, FACTORS): u = the type's mean + z, what the nucleus is drawn from."""
    shadows: np.ndarray
    """float64 (n, FACTORS): what controls follow; no image shows it."""

    @property
    def cell_id(self) -> list[str]:
        """`sim-000000` and so on."""
        return [f"sim-{number:06}" for number in self.number]

    @property
    def group(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Type, batch and donor."""
        return self.kind, self.batch, self.donor


def chunks(spec: PairedSpec) -> int:
    """Number of chunks that the cells are drawn in."""
    return -(-spec.cells // CHUNK)


def draw_cells(spec: PairedSpec, seed: int, chunk: int) -> Cells:
    """The cells of one chunk; the same whatever else is drawn."""
    rng = keyed(seed, "cells", chunk)
    types = list(spec.cell_types.values())
    weights = np.array([one.weight for one in types])
    kind = rng.choice(len(types), CHUNK, p=weights / weights.sum())
    batch, donor = rng.integers(0, spec.batches, CHUNK), rng.integers(0, spec.donors, CHUNK)
    batch = np.where(rng.uniform(0, 1, CHUNK) < spec.confounding, kind % spec.batches, batch)
    factors, shadows = (draw_factors(rng, (CHUNK, len(FACTORS))) for _ in range(2))
    means = np.array([[one.means.get(name, 0.0) for name in FACTORS] for one in types])
    there = min(CHUNK, spec.cells - chunk * CHUNK)
    columns = (np.arange(CHUNK) + chunk * CHUNK, kind, batch, donor, factors, means[kind] + factors, shadows)
    return Cells(*(column[:there] for column in columns))


def all_cells(spec: PairedSpec, seed: int) -> Cells:
    """All cells, in order."""
    parts = [draw_cells(spec, seed, chunk) for chunk in range(chunks(spec))]
    names = ("number", "kind", "batch", "donor", "factors", "levels", "shadows")
    return Cells(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
