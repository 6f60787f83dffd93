"""The order of the data as a pure function: global batch k -> the rows of the store that it holds.

A row group belongs to one lane. Of every global batch each lane gives its share, and a rank owns whole lanes, so no
rank reads what another uses, and the batch does not depend on how many ranks there are. In each epoch a lane draws
its row groups in a keyed order, window after window, and permutes the rows inside a window. Every step of every epoch
is found without the steps before it.

With N selected rows, of which lane l holds n_l, and C_l = n_0 + .. + n_(l-1), the first x positions of an epoch draw
R_l(x) = floor(C_(l+1) x / N) - floor(C_l x / N) rows from lane l. These sum to x, stay within one row of the share
x n_l / N, and reach n_l at x = N: every epoch holds every selected row exactly once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import numpy as np

from cosmic_ray.errors import JobError
from cosmic_ray.ingest.lanes import LANES, deal, fit_lanes, lane_rows, require_batch
from cosmic_ray.ingest.permutation import GROUPS, ROWS, permutation
from cosmic_ray.ingest.selection import Selection

VERSION = 1
WINDOW = 4
Remainder = Literal["carry", "drop"]


@dataclass(frozen=True)
class PlanSpec:
    """All that an order depends on. Equal specs give the same samples on every machine."""

    store_hash: str
    """Content hash of the store."""
    selection_digest: str
    """Digest of the selected rows and of the store's row-group sizes."""
    lanes: int
    window: int
    """Row groups whose rows are permuted together."""
    global_batch: int
    seed: int
    remainder: Remainder = "carry"
    """What an epoch leaves over of its last global batch goes on into the next epoch, or is dropped."""
    version: int = VERSION

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of the canonical JSON."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


class Samples(NamedTuple):
    """The samples of a global batch or of a rank's slice, in order: arrays of one length."""

    row_group: np.ndarray
    """int32: index of the row group in the store."""
    row: np.ndarray
    """int32: row in the row group."""
    epoch: np.ndarray
    """int32, from 0."""
    position: np.ndarray
    """int64: global sample position, from 0 across epochs, never the same twice: the key of a sample's randomness."""
    lane: np.ndarray
    """int32, ascending."""


class Piece(NamedTuple):
    """Draws `start` .. `stop`-1 of one window: what a lane gives to a global batch, unless it runs over a window."""

    lane: int
    epoch: int
    window: int
    start: int
    stop: int


class WindowRead(NamedTuple):
    """One window to read: needed from global batch `first_step` to `last_step` inclusive."""

    lane: int
    epoch: int
    window: int
    row_groups: tuple[int, ...]
    first_step: int
    last_step: int


class _Order(NamedTuple):
    """A lane's epoch: `groups` int32 in drawn order; window w holds groups[cuts[w]:cuts[w+1]] and the lane's draws
    starts[w] .. starts[w+1]-1."""

    groups: np.ndarray
    cuts: np.ndarray
    starts: np.ndarray


class Plan:
    """The samples of every global batch of a run without end, epoch after epoch."""

    def __init__(self, spec: PlanSpec, selection: Selection):
        """Raises JobError where `spec` was made for other rows or another version, or cannot be kept."""
        self.spec, self.selection = spec, selection
        self._check()
        self._lanes = deal(selection.counts, spec.lanes, spec.seed)
        sizes = lane_rows(self._lanes, selection.counts)
        if min(sizes) * spec.global_batch < self.total_rows:
            remedy = f"lanes={fit_lanes(selection.counts, spec.global_batch, spec.seed, spec.lanes)} works"
            raise JobError("lanes", spec.lanes, "a lane has less than one row for every global batch", remedy)
        self._bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        self._order = lru_cache(maxsize=2 * spec.lanes)(self._make_order)
        self._window_rows = lru_cache(maxsize=3 * spec.lanes)(self._make_window_rows)

    @classmethod
    def fitted(
        cls,
        store_hash: str,
        selection: Selection,
        global_batch: int,
        seed: int,
        *,
        lanes: int = LANES,
        window: int = WINDOW,
        remainder: Remainder = "carry",
    ) -> Plan:
        """A plan with as many of the wanted lanes as the selection allows; `spec.lanes` says how many.

        Raises JobError as `fit_lanes` and `Plan` do.
        """
        fit = fit_lanes(selection.counts, global_batch, seed, lanes)
        return cls(PlanSpec(store_hash, selection.digest, fit, window, global_batch, seed, remainder), selection)

    def __reduce__(self) -> tuple:
        return Plan, (self.spec, self.selection)

    def _check(self) -> None:
        spec, counts = self.spec, self.selection.counts
        if spec.version != VERSION:
            raise JobError(
                "plan", spec.version, f"this code makes plans of version {VERSION}", "use the run's own code"
            )
        if spec.selection_digest != self.selection.digest:
            raise JobError("plan", spec.selection_digest[:16], f"the rows selected are {self.selection.digest[:16]}")
        if spec.window < 1:
            raise JobError("window", spec.window, "at least one row group is needed")
        if spec.remainder not in ("carry", "drop"):
            raise JobError("remainder", spec.remainder, "neither 'carry' nor 'drop'")
        require_batch(counts, spec.global_batch)
        held = int(np.count_nonzero(counts))
        if not 1 <= spec.lanes <= held:
            remedy = f"choose 1 to {held}"
            raise JobError("lanes", spec.lanes, f"not between 1 and the {held} row groups with selected crops", remedy)

    @property
    def digest(self) -> str:
        """Hex digest of the spec: equal digests, equal samples."""
        return self.spec.digest

    @cached_property
    def total_rows(self) -> int:
        """Selected rows: the samples of an epoch."""
        return int(self.selection.counts.sum())

    @property
    def steps_per_epoch(self) -> int:
        """Global batches after which an epoch has ended: of `drop`, exactly; of `carry`, rounded up."""
        full, rest = divmod(self.total_rows, self.spec.global_batch)
        return full + (1 if rest and self.spec.remainder == "carry" else 0)

    def steps(self, epochs: float) -> int:
        """Global batches in a run of so many epochs; under `carry` the last one may reach into the next epoch."""
        if self.spec.remainder == "drop":
            return round(epochs * self.steps_per_epoch)
        return -(-round(epochs * self.total_rows) // self.spec.global_batch)

    def lanes_of(self, rank: int, world: int) -> range:
        """The lanes of one rank: contiguous and whole, so ranks differ by at most one lane.

        Raises:
            JobError: for more ranks than lanes.
        """
        if world > self.spec.lanes:
            remedy = f"use at most {self.spec.lanes} workers, a larger global batch or smaller row groups"
            raise JobError(
                "scaling.workers", world, f"the plan has {self.spec.lanes} lanes, and a rank needs one", remedy
            )
        return range(rank * self.spec.lanes // world, (rank + 1) * self.spec.lanes // world)

    def step(self, k: int) -> Samples:
        """Global batch `k`, counted from 0 across epochs: `global_batch` samples, lane after lane."""
        return self.rank_step(k, range(self.spec.lanes))

    def rank_step(self, k: int, lanes: range) -> Samples:
        """What `lanes` give to global batch `k`: a contiguous part of `step(k)`."""
        pieces = self.pieces(k, lanes)
        drawn = [self.window_rows(piece.lane, piece.epoch, piece.window) for piece in pieces]
        parts = [rows[:, piece.start : piece.stop] for rows, piece in zip(drawn, pieces, strict=True)]
        group, row = np.concatenate(parts, axis=1) if parts else np.empty((2, 0), np.int32)
        sizes = [piece.stop - piece.start for piece in pieces]
        epoch = np.repeat(np.array([piece.epoch for piece in pieces], np.int32), sizes)
        lane = np.repeat(np.array([piece.lane for piece in pieces], np.int32), sizes)
        positions = self.positions(k, lanes)
        position = np.arange(positions.start, positions.stop, dtype=np.int64)
        return Samples(group, row, epoch, position, lane)

    def positions(self, k: int, lanes: range) -> range:
        """The global sample positions of the samples that `lanes` give to global batch `k`."""
        shares = sum(high - low for _, low, high in self._parts(k))
        start = k * self.spec.global_batch + int(shares[: lanes.start].sum())
        return range(start, start + int(shares[lanes.start : lanes.stop].sum()))

    def pieces(self, k: int, lanes: range) -> list[Piece]:
        """`rank_step` as runs of draws from windows, in its order: what has to be open for it, and where it starts."""
        parts, pieces = self._parts(k), []
        for lane in lanes:
            for epoch, low, high in parts:
                start, stop = int(low[lane]), int(high[lane])
                starts = self._order(lane, epoch).starts
                while start < stop:
                    window = int(np.searchsorted(starts, start, side="right")) - 1
                    first, end = int(starts[window]), min(stop, int(starts[window + 1]))
                    pieces.append(Piece(lane, epoch, window, start - first, end - first))
                    start = end
        return pieces

    def reads(self, lanes: range, first_step: int, last_step: int) -> Iterator[WindowRead]:
        """The windows that the global batches `first_step` .. `last_step`-1 draw from, in the order of first need.

        A window that is already partly drawn at `first_step` is among them.
        """
        if first_step >= last_step:
            return
        first_epoch, last_epoch = self._parts(first_step)[0][0], self._parts(last_step - 1)[-1][0]
        for epoch in range(first_epoch, last_epoch + 1):
            yield from self._epoch_reads(lanes, epoch, first_step, last_step)

    def window_groups(self, lane: int, epoch: int, window: int) -> tuple[int, ...]:
        """The row groups of a window."""
        order = self._order(lane, epoch)
        return tuple(order.groups[order.cuts[window] : order.cuts[window + 1]].tolist())

    def window_rows(self, lane: int, epoch: int, window: int) -> np.ndarray:
        """The rows of a window in drawn order: int32 (2, n), row group and row in it. Do not write to it."""
        return self._window_rows(lane, epoch, window)

    def open_rows(self, lanes: range) -> int:
        """The most rows in windows that `lanes` hold open in one step of the first two epochs."""
        changes: dict[int, int] = {}
        for read in self.reads(lanes, 0, self.steps(2)):
            rows = int(self.selection.counts[list(read.row_groups)].sum())
            changes[read.first_step] = changes.get(read.first_step, 0) + rows
            changes[read.last_step + 1] = changes.get(read.last_step + 1, 0) - rows
        return int(np.cumsum([changes[step] for step in sorted(changes)]).max())

    def largest_slice(self, lanes: range) -> int:
        """`lanes` give no global batch more rows than this."""
        rows = int(self._bounds[lanes.stop] - self._bounds[lanes.start])
        return min(-(-rows * self.spec.global_batch // self.total_rows) + 2, self.spec.global_batch)

    def largest_window(self, lanes: range) -> int:
        """No window of `lanes` has more rows than this in any epoch."""
        counts = [np.sort(self.selection.counts[self._lanes[lane]]) for lane in lanes]
        return max(int(rows[-self.spec.window :].sum()) for rows in counts)

    def _parts(self, k: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """(epoch, first draw, end of draws) of each lane: int64 (lanes,), for the one or two epochs of batch `k`."""
        size, total = self.spec.global_batch, self.total_rows
        if self.spec.remainder == "drop":
            epoch, index = divmod(k, self.steps_per_epoch)
            spans = [(epoch, index * size, (index + 1) * size)]
        else:
            epoch, start = divmod(k * size, total)
            spans = [(epoch, start, min(start + size, total))]
            if start + size > total:
                spans.append((epoch + 1, 0, start + size - total))
        return [(epoch, self._drawn(np.int64(a)), self._drawn(np.int64(b))) for epoch, a, b in spans]

    def _drawn(self, positions: np.ndarray | np.int64) -> np.ndarray:
        """R_l(x): the rows drawn from each lane by the first x positions of an epoch; int64 (..., lanes)."""
        return np.diff(np.multiply.outer(positions, self._bounds) // self.total_rows)

    def _make_order(self, lane: int, epoch: int) -> _Order:
        groups = self._lanes[lane]
        groups = groups[permutation(len(groups), self.spec.seed, GROUPS, (0, lane, epoch))]
        # The first windows differ in size, so that the lanes do not all ask for their next window at the same step.
        window, end = self.spec.window, len(groups)
        cuts = np.concatenate([[0], np.arange(1 + lane % window, end, window), [end]])
        drawn = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.selection.counts[groups])])
        return _Order(groups, cuts, drawn[cuts])

    def _make_window_rows(self, lane: int, epoch: int, window: int) -> np.ndarray:
        groups = self.window_groups(lane, epoch, window)
        rows = [self.selection.rows(group, epoch) for group in groups]
        both = np.array([np.repeat(groups, [len(part) for part in rows]), np.concatenate(rows)], dtype=np.int32)
        return both[:, permutation(both.shape[1], self.spec.seed, ROWS, (window, lane, epoch))]

    def _epoch_reads(self, lanes: range, epoch: int, first_step: int, last_step: int) -> list[WindowRead]:
        end = self._epoch_end(epoch)
        found = []
        for lane in lanes:
            starts = self._order(lane, epoch).starts
            first, last = self._steps_of(lane, epoch, starts[:-1]), self._steps_of(lane, epoch, starts[1:] - 1)
            needed = np.flatnonzero((last >= first_step) & (first < min(last_step, end)))
            found += [(int(first[w]), lane, int(w), min(int(last[w]), end - 1)) for w in needed]
        return [
            WindowRead(lane, epoch, window, self.window_groups(lane, epoch, window), max(first, first_step), last)
            for first, lane, window, last in sorted(found)
        ]

    def _epoch_end(self, epoch: int) -> int:
        """The global batch after the last one that draws from `epoch`."""
        if self.spec.remainder == "drop":
            return (epoch + 1) * self.steps_per_epoch
        return -(-(epoch + 1) * self.total_rows // self.spec.global_batch)

    def _steps_of(self, lane: int, epoch: int, draws: np.ndarray) -> np.ndarray:
        """The global batch that takes each of a lane's draws of an epoch, int64.

        Under `drop`, draws that are left over get the epoch's last global batch plus one.
        """
        total, size = self.total_rows, self.spec.global_batch
        rows = int(self._bounds[lane + 1] - self._bounds[lane])
        base = epoch * (self.steps_per_epoch * size if self.spec.remainder == "drop" else total)
        # Draw s lies beyond position s total / rows and not beyond (s + 1) total / rows: at most two batches on.
        steps = (base + draws * total // rows) // size
        for _ in range(2):
            ends = np.minimum((steps + 1) * size - base, total)
            steps = steps + (self._drawn(ends)[:, lane] <= draws)
        return steps
