"""Fields that show the same cells twice: another z-plane, time point, cycle, or the same file under another name.

Their nuclei lie in the same places up to one translation, whatever the pixels say. Each field's nuclei are counted on a
coarse periodic grid, less their local mean; fields whose counts correlate are candidates, and the share of nuclei that
one translation brings together decides. All pairs of fields are compared, by random projections to 256 numbers a field:
seconds for 50,000 fields, about an hour for a million.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

LEAST_NUCLEI = 12
"""Fewer lie in the same places by chance."""
_CELL_PX, _CELLS, _NUMBERS = 32.0, 64, 256
_LEAST_CORRELATION = 0.55
_REACH_PX, _TOLERANCE_PX = 24, 4
_FIELDS_AT_ONCE = 2048


def same_layouts(fields: np.ndarray, y: np.ndarray, x: np.ndarray, least: float) -> np.ndarray:
    """Pairs of fields of whose nuclei at least the share `least` (of the smaller field's) coincide: int64 (P, 2).

    Args:
        fields: int (N,), the field of each nucleus, 0..F-1.
        y, x: float (N,), its centre in px of the field; nuclei with NaN are left out.
    """
    placed = np.isfinite(y) & np.isfinite(x)
    order = np.argsort(fields[placed], kind="stable")
    owner, y, x = fields[placed][order], y[placed][order], x[placed][order]
    ends = np.searchsorted(owner, np.arange(owner.max(initial=-1) + 2))
    large = np.flatnonzero(np.diff(ends) >= LEAST_NUCLEI)
    points = [np.stack([y[ends[f] : ends[f + 1]], x[ends[f] : ends[f + 1]]], axis=1) for f in large]
    same = [
        (large[one], large[other]) for one, other in _candidates(points) if shared(points[one], points[other]) >= least
    ]
    return np.array(same, np.int64).reshape(-1, 2)


def _candidates(points: list[np.ndarray]) -> Iterator[tuple[int, int]]:
    projection = np.random.default_rng(0).standard_normal((_CELLS**2, _NUMBERS)).astype(np.float32)
    chunks = [slice(start, start + _FIELDS_AT_ONCE) for start in range(0, len(points), _FIELDS_AT_ONCE)]
    vectors = [_counts(points[chunk]) @ projection for chunk in chunks]
    vectors = [part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-9) for part in vectors]
    for number, (chunk, part) in enumerate(zip(chunks, vectors, strict=True)):
        for other, against in zip(chunks[number:], vectors[number:], strict=True):
            near = np.argwhere(part @ against.T >= _LEAST_CORRELATION)
            pairs = (near + np.array([chunk.start, other.start])).tolist()
            yield from ((one, two) for one, two in pairs if one < two)


def shared(one: np.ndarray, other: np.ndarray) -> float:
    """The share of the smaller set of points (n, 2) that the best translation, of up to 24 px, brings within 4 px."""
    apart = (one[:, None] - other[None]).reshape(-1, 2)
    apart = apart[(np.abs(apart) < _REACH_PX + _TOLERANCE_PX).all(axis=1)]
    edges = np.arange(-_REACH_PX - _TOLERANCE_PX, _REACH_PX + _TOLERANCE_PX + 1, _TOLERANCE_PX)
    seen = np.histogram2d(*apart.T, bins=[edges, edges])[0]
    windows = seen[1:, 1:] + seen[1:, :-1] + seen[:-1, 1:] + seen[:-1, :-1]
    return min(float(windows.max()) / min(len(one), len(other)), 1.0)


def _counts(fields: list[np.ndarray]) -> np.ndarray:
    """Nuclei on the grid, spread over 2 x 2 cells, less the mean of the 5 x 5 around: float32 (F, _CELLS**2)."""
    grid = np.zeros((len(fields), _CELLS, _CELLS), np.float32)
    for field, points in enumerate(fields):
        place = points / _CELL_PX
        low = np.floor(place).astype(np.int64)
        part = place - low
        for dy in (0, 1):
            for dx in (0, 1):
                weight = np.abs(1 - dy - part[:, 0]) * np.abs(1 - dx - part[:, 1])
                np.add.at(grid[field], ((low[:, 0] + dy) % _CELLS, (low[:, 1] + dx) % _CELLS), weight)
    around = sum(np.roll(grid, (dy, dx), axis=(1, 2)) for dy in range(-2, 3) for dx in range(-2, 3)) / 25
    return (grid - around).reshape(len(fields), -1)
