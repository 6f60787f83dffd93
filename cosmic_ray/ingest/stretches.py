"""How the positions of an epoch, or of the rest of one, are shared among the lanes, and where a lane's draws lie.

Of N rows, of which lane l holds n_l, and C_l = n_0 + .. + n_(l-1), the first x positions draw
R_l(x) = floor(C_(l+1) x / N) - floor(C_l x / N) rows from lane l. These sum to x, stay within one row of the share
x n_l / N, and reach n_l at x = N. From one global batch to the next they never fall, as long as every lane holds at
least one row for every global batch.

Where a lane holds less (what exclusions leave of it, or an epoch of a mixing), draw s of lane l has its place at
(2 s + 1) / (2 n_l) of the stretch, and the positions take the draws in the order of their places, equal ones in the
order of the lanes (Webster's method of apportionment). Between two positions a lane then gives its share to within one
row more or less, and as much of the share as the other lanes' rows more or less make out.
"""

from __future__ import annotations

import numpy as np


class Stretch:
    """`rows` of each lane, drawn evenly."""

    def __init__(self, rows: list[int], global_batch: int):
        self.rows = np.array(rows, np.int64)
        self.total = int(self.rows.sum())
        self._batch = global_batch
        self._bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.rows)])
        # Whether every lane holds at least one row for every global batch.
        self.even = int(self.rows.min()) * global_batch >= self.total

    def drawn(self, x: int) -> np.ndarray:
        """The rows drawn from each lane by the first `x` positions, where a global batch ends: int64 (lanes,)."""
        if self.even:
            return np.diff(self._bounds * np.int64(x) // max(self.total, 1))
        low, high, lanes = np.zeros_like(self.rows), self.rows.copy(), np.arange(len(self.rows))
        while (searched := low < high).any():
            middle = (low + high) // 2
            before = self._positions(lanes, middle) < x
            low, high = np.where(searched & before, middle + 1, low), np.where(searched & ~before, middle, high)
        return low

    def batches_of(self, lane: int, draws: np.ndarray, base: int) -> np.ndarray:
        """Which global batch takes each of a lane's draws, int64, where `base` samples lie before the stretch."""
        if not self.even:
            return (base + self._positions(np.full(len(draws), lane), draws)) // self._batch
        low, high = int(self._bounds[lane]), int(self._bounds[lane + 1])
        batches = (base + draws * self.total // (high - low)) // self._batch
        while True:
            ends = np.minimum((batches + 1) * self._batch - base, self.total)
            late = (high * ends // self.total) - (low * ends // self.total) <= draws
            if not late.any():
                return batches
            batches = batches + late

    def _positions(self, lanes: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """The position that takes draw `draws[i]` of lane `lanes[i]`: how many draws have their place before it."""
        own = np.maximum(self.rows[lanes], 1)[:, None]
        ahead = (2 * draws + 1)[:, None] * self.rows - own
        earlier_lane = np.arange(len(self.rows)) < lanes[:, None]
        counts = np.where(earlier_lane, ahead // (2 * own) + 1, -(-ahead // (2 * own)))
        return np.where(self.rows > 0, np.maximum(counts, 0), 0).sum(axis=1)
