"""How far each lane has been drawn: from a global batch to the draws of every lane, and back.

A run's plan has one era, and one more for each exclusion. An era begins with the rest of an epoch (the first one with
the whole of epoch 0) and goes on with whole epochs. Of a stretch with N rows, of which lane l holds n_l, and
C_l = n_0 + .. + n_(l-1), the first x positions draw R_l(x) = floor(C_(l+1) x / N) - floor(C_l x / N) rows from lane l.
These sum to x, stay within one row of the share x n_l / N, and reach n_l at x = N.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from cosmic_ray.ingest.lanes import lane_rows
from cosmic_ray.ingest.selection import Selection


class Era:
    """From global batch `first_step` until the next era begins.

    `epoch`: the one that it begins in. `drawn`: int64 (lanes,), how much of that epoch was drawn from each lane before.
    `selection`: what every later epoch consists of, and this one, too, where nothing was drawn of it. `excluded`: the
    row groups that the era before did not exclude.
    """

    def __init__(
        self,
        selection: Selection,
        lanes: list[np.ndarray],
        global_batch: int,
        drop: bool,
        first_step: int = 0,
        epoch: int = 0,
        drawn: np.ndarray | None = None,
        excluded: tuple[int, ...] = (),
    ):
        self.selection, self.first_step, self.epoch, self.excluded = selection, first_step, epoch, excluded
        self.drawn = np.zeros(len(lanes), np.int64) if drawn is None else drawn
        self.fresh = not self.drawn.any()
        self._lanes, self._batch, self._drop = lanes, global_batch, drop
        self.counts = lru_cache(maxsize=4)(selection.counts_in)
        self._bounds = lru_cache(maxsize=4)(lambda epoch: _bounds(lane_rows(lanes, self.counts(epoch))))
        self._rest = self._bounds(epoch)

    def set_rest(self, rows: list[int]) -> None:
        """What is left to draw from each lane in the epoch that the era begins in, where something was drawn of it."""
        self._rest = _bounds(rows)

    def bounds(self, epoch: int) -> np.ndarray:
        """C: int64 (lanes + 1,), of what this era may draw from `epoch`."""
        return self._rest if epoch == self.epoch else self._bounds(epoch)

    def parts(self, k: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """(epoch, first draw, end of draws) of each lane: int64 (lanes,), for the one or two epochs of batch `k`."""
        start, rest = (k - self.first_step) * self._batch, self._taken(self._rest[-1])
        epoch, length = self.epoch, rest
        if start >= rest:
            length = self._taken(self.selection.total)
            after, start = divmod(start - rest, length)
            epoch += 1 + after
        stop = min(start + self._batch, length)
        parts = [self._part(epoch, start, stop)]
        if stop - start < self._batch:
            parts.append(self._part(epoch + 1, 0, self._batch - (stop - start)))
        return parts

    def end(self, epoch: int) -> int:
        """The global batch after the last one that draws from `epoch`, if no era follows in it."""
        return self.first_step - (-(self._start(epoch) + self._taken(self.bounds(epoch)[-1])) // self._batch)

    def steps_of(self, lane: int, epoch: int, draws: np.ndarray) -> np.ndarray:
        """The global batch that takes each of a lane's draws of an epoch, int64; draws that this era makes.

        Under `drop`, draws that are left over get the epoch's last global batch plus one.
        """
        bounds, base = self.bounds(epoch), self._start(epoch)
        low, high, total = int(bounds[lane]), int(bounds[lane + 1]), int(bounds[-1])
        if epoch == self.epoch:
            draws = draws - self.drawn[lane]
        # Draw s is made at about position s total / rows of the stretch; a lane's share is kept to within a row.
        steps = (base + draws * total // max(high - low, 1)) // self._batch
        while True:
            ends = np.minimum((steps + 1) * self._batch - base, total)
            late = (high * ends // total) - (low * ends // total) <= draws
            if not late.any():
                return steps + self.first_step
            steps = steps + late

    def largest_slice(self, lanes: range) -> int:
        """`lanes` give no global batch of this era more rows than this."""
        rest = int(self._rest[lanes.stop] - self._rest[lanes.start])
        most = sum(lane_rows(self._lanes[lanes.start : lanes.stop], self.selection.counts))
        shares = [(rest, max(int(self._rest[-1]), 1)), (most, self.selection.total)]
        return min(max(-(-rows * self._batch // total) for rows, total in shares) + 2, self._batch)

    def _taken(self, rows: int) -> int:
        return int(rows) - int(rows) % self._batch if self._drop else int(rows)

    def _start(self, epoch: int) -> int:
        """Samples of this era before the first one of `epoch`."""
        if epoch == self.epoch:
            return 0
        return self._taken(self._rest[-1]) + (epoch - self.epoch - 1) * self._taken(self.selection.total)

    def _part(self, epoch: int, start: int, stop: int) -> tuple[int, np.ndarray, np.ndarray]:
        bounds = self.bounds(epoch)
        low, high = (np.diff(bounds * np.int64(x) // bounds[-1]) for x in (start, stop))
        if epoch == self.epoch:
            low, high = low + self.drawn, high + self.drawn
        return epoch, low, high


def _bounds(rows: list[int]) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(rows, dtype=np.int64)])
