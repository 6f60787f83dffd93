"""Exact histograms of integers: merging them gives the same counts in any order, so percentiles do not depend on it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Histogram:
    """How often each integer occurs: `values` int64 ascending and distinct, `counts` int64, both of shape (k,)."""

    values: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, data: np.ndarray) -> Histogram:
        """Count non-negative integers of any shape."""
        data = np.asarray(data).ravel()
        if data.dtype.itemsize <= 2:
            counts = np.bincount(data)
            values = np.flatnonzero(counts)
            return cls(values, counts[values])
        return cls(*(part.astype(np.int64) for part in np.unique(data, return_counts=True)))

    @classmethod
    def merged(cls, parts: Iterable[Histogram]) -> Histogram:
        """The histogram of all the data that the parts counted."""
        parts = list(parts)
        if len(parts) == 1:
            return parts[0]
        every = np.concatenate([part.values for part in parts] or [np.empty(0, np.int64)])
        counts = np.concatenate([part.counts for part in parts] or [np.empty(0, np.int64)])
        values, slot = np.unique(every, return_inverse=True)
        total = np.zeros(len(values), np.int64)
        np.add.at(total, slot, counts)
        return cls(values, total)

    @property
    def total(self) -> int:
        """Number of data counted."""
        return int(self.counts.sum())

    def percentile(self, percent: float) -> float:
        """What `numpy.percentile` gives of the counted data: linear between the two nearest ranks.

        Args:
            percent: 0 to 100.

        Raises:
            ValueError: where nothing was counted.
        """
        if not len(self.values):
            raise ValueError("no data")
        up_to = np.cumsum(self.counts)
        rank = percent / 100 * (int(up_to[-1]) - 1)
        below = int(rank)
        low, high = (int(self.values[np.searchsorted(up_to, k, side="right")]) for k in self._ranks(below, up_to))
        return low + (rank - below) * (high - low)

    @staticmethod
    def _ranks(below: int, up_to: np.ndarray) -> tuple[int, int]:
        return below, min(below + 1, int(up_to[-1]) - 1)

    def to_json(self) -> dict[str, list[int]]:
        """Plain lists; values as differences, which are short numbers."""
        return {"steps": np.diff(self.values, prepend=0).tolist(), "counts": self.counts.tolist()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Histogram:
        """The inverse of `to_json`."""
        return cls(np.cumsum(np.array(data["steps"], np.int64)), np.array(data["counts"], np.int64))
