"""What each lane draws in an epoch: its row groups in a keyed order, window after window, the rows of each permuted.

An exclusion in mid-epoch leaves what was drawn where it is, and takes the excluded rows out of all that follows; the
rest keeps its order, and a window its number.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cosmic_ray.ingest.eras import Era
from cosmic_ray.ingest.permutation import GROUPS, ROWS, permutation


class Order(NamedTuple):
    """A lane's epoch: `groups` int32 in drawn order; window w holds groups[cuts[w]:cuts[w+1]] and the lane's draws
    starts[w] .. starts[w+1]-1. `exclusions` in mid-epoch have shortened it.
    """

    groups: np.ndarray
    cuts: np.ndarray
    starts: np.ndarray
    exclusions: tuple[Exclusion, ...] = ()

    def window_of(self, draw: int) -> int:
        """The window that holds a draw; the number of windows for one after the last."""
        return int(self.starts.searchsorted(draw, side="right")) - 1

    def window_groups(self, window: int) -> np.ndarray:
        """Int32: the row groups of a window."""
        return self.groups[self.cuts[window] : self.cuts[window + 1]]


class Exclusion(NamedTuple):
    """`groups` leave a lane's epoch after draw `drawn` of window `window`."""

    window: int
    drawn: int
    groups: tuple[int, ...]

    def applied(self, window: int, rows: np.ndarray) -> np.ndarray:
        """The rows of a window, int32 (2, n), less the excluded ones that were not drawn before."""
        if window < self.window:
            return rows
        keep = np.isin(rows[0], self.groups, invert=True)
        if window == self.window:
            keep[: self.drawn] = True
        return rows[:, keep]


class Orders:
    """The orders of all lanes in all epochs, under the exclusions of `eras`; the latest ones are kept."""

    def __init__(self, lanes: list[np.ndarray], window: int, seed: int, eras: list[Era]):
        self._lanes, self._window, self._seed, self._eras = lanes, window, seed, eras
        self.order = lru_cache(maxsize=2 * len(lanes))(self._order)
        self.rows = lru_cache(maxsize=3 * len(lanes))(self._rows)

    def _order(self, lane: int, epoch: int) -> Order:
        era, cutting = self.lineage(epoch)
        groups, counts = self._lanes[lane], era.counts(epoch)
        groups = groups[permutation(len(groups), self._seed, GROUPS, (0, lane, epoch))]
        groups = groups[counts[groups] > 0]
        # The first windows differ in size, so that the lanes do not all ask for their next window at the same step.
        window, end = self._window, len(groups)
        cuts = np.array([0, *range(1 + lane % window, end, window), end] if end else [0])
        drawn = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts[groups])])
        order = Order(groups, cuts, drawn[cuts])
        for exclusion in cutting:
            order = self._shortened(order, lane, epoch, exclusion)
        return order

    def _shortened(self, order: Order, lane: int, epoch: int, era: Era) -> Order:
        window = order.window_of(int(era.drawn[lane]))
        sizes = np.diff(order.starts)
        if window == len(sizes):
            return order
        found = Exclusion(window, int(era.drawn[lane] - order.starts[window]), era.excluded)
        order = order._replace(exclusions=(*order.exclusions, found))
        for later in range(window, len(sizes)):
            if np.isin(order.window_groups(later), era.excluded).any():
                sizes[later] = self._window_rows(order, lane, epoch, later).shape[1]
        return order._replace(starts=np.concatenate([[0], np.cumsum(sizes)]))

    def _rows(self, lane: int, epoch: int, window: int) -> np.ndarray:
        """The rows of a window in drawn order: int32 (2, n), row group and row in it."""
        return self._window_rows(self.order(lane, epoch), lane, epoch, window)

    def _window_rows(self, order: Order, lane: int, epoch: int, window: int) -> np.ndarray:
        selection = self.lineage(epoch)[0].selection
        groups = order.window_groups(window).tolist()
        rows = [selection.rows(group, epoch) for group in groups]
        both = np.array([np.repeat(groups, [len(part) for part in rows]), np.concatenate(rows)], dtype=np.int32)
        both = both[:, permutation(both.shape[1], self._seed, ROWS, (window, lane, epoch))]
        for exclusion in order.exclusions:
            both = exclusion.applied(window, both)
        return both

    def lineage(self, epoch: int) -> tuple[Era, list[Era]]:
        """The era whose selection `epoch` consists of, and the later ones that begin in its middle."""
        began = [era for era in self._eras if era.epoch < epoch or (era.epoch == epoch and era.fresh)]
        return began[-1], [era for era in self._eras if era.epoch == epoch and not era.fresh]
