"""How well found objects agree with hand-made masks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Counts:
    """Of one field or, added up, of many (micro-averaging)."""

    hits: int = 0
    """Pairs of one found and one true object."""

    found: int = 0
    true: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.hits + other.hits, self.found + other.found, self.true + other.true)

    @property
    def precision(self) -> float:
        return self.hits / self.found if self.found else float("nan")

    @property
    def recall(self) -> float:
        return self.hits / self.true if self.true else float("nan")

    @property
    def f1(self) -> float:
        return 2 * self.hits / (self.found + self.true) if self.found + self.true else float("nan")


def match_objects(found: np.ndarray, true: np.ndarray, iou: float = 0.5) -> Counts:
    """Count the objects of two label images that overlap with an intersection over union above `iou`.

    Args:
        found, true: (H, W) integers, 0 background.
        iou: at least 0.5, so that an object has at most one partner and the matching is one to one without a search.

    Raises:
        ValueError: if `iou` is below 0.5 or the shapes differ.
    """
    if iou < 0.5 or found.shape != true.shape:
        raise ValueError(f"need iou >= 0.5 and equal shapes, got {iou}, {found.shape} and {true.shape}")
    columns = int(true.max(initial=0)) + 1
    pairs, both = np.unique(found.astype(np.int64) * columns + true, return_counts=True)
    a, b = np.divmod(pairs, columns)
    area_found = np.bincount(a, both)
    area_true = np.bincount(b, both)
    objects = (a > 0) & (b > 0)
    a, b, both = a[objects], b[objects], both[objects]
    hits = int((both > iou * (area_found[a] + area_true[b] - both)).sum())
    return Counts(hits, int((area_found[1:] > 0).sum()), int((area_true[1:] > 0).sum()))


def match_centres(centre_y: np.ndarray, centre_x: np.ndarray, true: np.ndarray) -> Counts:
    """Count the true objects that hold a centre, each at most once: further centres in it, or outside all, are errors.

    Args:
        centre_y, centre_x: (n,) px, (0, 0) the centre of the first pixel.
        true: (H, W) integers, 0 background.
    """
    row = np.clip(np.rint(centre_y).astype(int), 0, true.shape[0] - 1)
    column = np.clip(np.rint(centre_x).astype(int), 0, true.shape[1] - 1)
    held = true[row, column]
    hits = len(np.unique(held[held > 0]))
    return Counts(hits, len(held), len(np.unique(true[true > 0])))
