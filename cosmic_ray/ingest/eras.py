"""Which draws of the lanes a global batch takes, and back: one era, and one more for each exclusion.

An era begins with the rest of an epoch (the first one with the whole of epoch 0) and goes on with whole epochs.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from cosmic_ray.ingest.lanes import lane_rows
from cosmic_ray.ingest.selection import Selection
from cosmic_ray.ingest.stretches import Stretch


class Era:
    """From global batch `first_step` until the next era begins.

    `epoch`: the one that it begins in. `drawn`: int64 (lanes,), how much of that epoch was drawn from each lane before.
    `selection`: what every later epoch consists of, and this one, too, where it is `fresh`: nothing was drawn of it.
    `excluded`: the row groups that leave with this era.
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
        self._whole = lru_cache(maxsize=4)(self._make_whole)
        self._rest = self._whole(epoch)

    def set_rest(self, rows: list[int]) -> None:
        """What is left to draw from each lane in the epoch that the era begins in, where it is not fresh."""
        self._rest = Stretch(rows, self._batch)

    def parts(self, k: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """(epoch, first draw, end of draws) of each lane: int64 (lanes,), for the one or two epochs of batch `k`."""
        start, length = (k - self.first_step) * self._batch, self._taken(self._rest.total)
        epoch = self.epoch
        if start >= length:
            start, length = start - length, self._taken(self.selection.total)
            epoch, start = epoch + 1 + start // length, start % length
        stop = min(start + self._batch, length)
        parts = [self._part(epoch, start, stop)]
        if stop - start < self._batch:
            parts.append(self._part(epoch + 1, 0, self._batch - (stop - start)))
        return parts

    def end(self, epoch: int) -> int:
        """The global batch after the last one that draws from `epoch`, if no era follows in it."""
        return self.first_step - (-(self._start(epoch) + self._taken(self._stretch(epoch).total)) // self._batch)

    def steps_of(self, lane: int, epoch: int, draws: np.ndarray) -> np.ndarray:
        """The global batch that takes each of a lane's draws of an epoch, int64; draws that this era makes."""
        if not len(draws):
            return draws
        before = self.drawn[lane] if epoch == self.epoch else 0
        return self.first_step + self._stretch(epoch).batches_of(lane, draws - before, self._start(epoch))

    def largest_slice(self, lanes: range) -> int:
        """`lanes` give no global batch of this era more rows than this."""
        rest = int(self._rest.rows[lanes.start : lanes.stop].sum())
        most = sum(lane_rows(self._lanes[lanes.start : lanes.stop], self.selection.counts))
        even = self._rest.even and self._whole(self.epoch + 1).even and not self.selection.mixing
        beyond, more = (0, 2) if even else (2 * len(self._lanes), 2 * len(lanes) + 2)
        shares = [(rest, max(self._rest.total, 1)), (most, self.selection.total)]
        return min(max(-(-rows * (self._batch + beyond) // total) for rows, total in shares) + more, self._batch)

    def _taken(self, rows: int) -> int:
        return rows - rows % self._batch if self._drop else rows

    def _start(self, epoch: int) -> int:
        """Samples of this era before the first one of `epoch`."""
        if epoch == self.epoch:
            return 0
        return self._taken(self._rest.total) + (epoch - self.epoch - 1) * self._taken(self.selection.total)

    def _stretch(self, epoch: int) -> Stretch:
        return self._rest if epoch == self.epoch else self._whole(epoch)

    def _make_whole(self, epoch: int) -> Stretch:
        return Stretch(lane_rows(self._lanes, self.counts(epoch)), self._batch)

    def _part(self, epoch: int, start: int, stop: int) -> tuple[int, np.ndarray, np.ndarray]:
        stretch = self._stretch(epoch)
        before = self.drawn if epoch == self.epoch else 0
        return epoch, stretch.drawn(start) + before, stretch.drawn(stop) + before
