"""The order of the data as a pure function: global batch k -> the rows of the store that it holds.

A row group belongs to one lane. Of every global batch each lane gives its share, and a rank owns whole lanes, so no
rank reads what another uses, and the batch does not depend on how many ranks there are. In each epoch a lane draws
its row groups in a keyed order, window after window, and permutes the rows inside a window (`orders`); what each lane
has given by any step follows from its share (`eras`). Every step of every epoch is found without the steps before it.
An epoch holds every selected row exactly once; or, with a mixing, as often as `mixing` says.

**Exclusions.** Row groups that cannot be read leave the plan at a global batch k. All batches before k stay as they
were. The epoch that k lies in goes on in its order without the excluded rows: with its batches before k it still holds
every other row exactly once (as often as before, with a mixing), none twice and none left out; excluded rows that were
drawn before k count as drawn. It is shorter by those that were not, and until it ends the lanes' shares are those of
what is left. Later epochs are made of the rows that remain, in the lanes they always had; with a mixing they have
their full length and exact shares again. Exclusions add up, in the order of their steps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import numpy as np

from cosmic_ray.errors import JobError
from cosmic_ray.ingest.eras import Era
from cosmic_ray.ingest.lanes import LANES, deal, fit_lanes, lane_rows, require_batch
from cosmic_ray.ingest.orders import Orders
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
    mixing: str = ""
    """Digest of the mixing; empty without one."""
    exclusions: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """(global batch, row groups that leave the plan from it on), in ascending order of the batches."""

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of the canonical JSON, without a mixing and exclusions that there are not."""
        fields = {key: value for key, value in asdict(self).items() if value not in ("", ())}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


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


class Plan:
    """The samples of every global batch of a run without end, epoch after epoch."""

    def __init__(self, spec: PlanSpec, selection: Selection):
        """Raises JobError where `spec` was made for other rows or another version, or cannot be kept."""
        self.spec, self.selection = spec, selection
        self._check()
        self._lanes = deal(selection.counts, spec.lanes, spec.seed)
        sizes = lane_rows(self._lanes, selection.counts)
        if min(sizes) * spec.global_batch < sum(sizes):
            remedy = f"lanes={fit_lanes(selection.counts, spec.global_batch, spec.seed, spec.lanes)} works"
            raise JobError("lanes", spec.lanes, "a lane has less than one row for every global batch", remedy)
        self._eras = [Era(selection, self._lanes, spec.global_batch, spec.remainder == "drop")]
        for step, groups in spec.exclusions:
            self._eras.append(self._next_era(step, groups))
        self._orders = Orders(self._lanes, spec.window, spec.seed, self._eras)
        self._parts = lru_cache(maxsize=4)(self._find_parts)

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
        spec = PlanSpec(store_hash, selection.digest, fit, window, global_batch, seed, remainder)
        return cls(replace(spec, mixing=selection.mixing), selection)

    def excluding(self, groups: Iterable[int], at_step: int) -> Plan:
        """This plan without these row groups from global batch `at_step` on; see the module's text.

        Raises:
            JobError: where too few rows are left, or the plan has an exclusion at a later step.
        """
        return self.with_exclusions([*self.spec.exclusions, (at_step, tuple(sorted(set(groups))))])

    def with_exclusions(self, exclusions: Iterable[tuple[int, tuple[int, ...]]]) -> Plan:
        """This plan with these exclusions in place of its own, as `PlanSpec` has them. Raises as `excluding`."""
        return Plan(replace(self.spec, exclusions=tuple(exclusions)), self.selection)

    @property
    def excluded_rows(self) -> int:
        """Selected rows in the row groups that are excluded: what an epoch lacks of them."""
        groups = sorted({group for _, some in self.spec.exclusions for group in some})
        return int(self.selection.counts[groups].sum())

    def __reduce__(self) -> tuple:
        return Plan, (self.spec, self.selection)

    def _check(self) -> None:
        spec, counts = self.spec, self.selection.counts
        if spec.version != VERSION:
            raise JobError("plan", spec.version, f"this code makes version {VERSION}", "use the run's own code")
        if spec.selection_digest != self.selection.digest:
            raise JobError("plan", spec.selection_digest[:16], f"the rows selected are {self.selection.digest[:16]}")
        if spec.mixing != self.selection.mixing:
            raise JobError("mixing", spec.mixing[:16], f"the mixing of the rows is {self.selection.mixing[:16]!r}")
        if spec.window < 1:
            raise JobError("window", spec.window, "at least one row group is needed")
        if spec.remainder not in ("carry", "drop"):
            raise JobError("remainder", spec.remainder, "neither 'carry' nor 'drop'")
        require_batch(counts, spec.global_batch)
        if self.selection.total < spec.global_batch:
            problem = f"less than a global batch of {spec.global_batch}"
            raise JobError("mixing.epoch", self.selection.total, problem, "choose a longer one")
        held = int(np.count_nonzero(counts))
        if not 1 <= spec.lanes <= held:
            remedy = f"choose 1 to {held}"
            raise JobError("lanes", spec.lanes, f"not between 1 and the {held} row groups with selected crops", remedy)

    @property
    def digest(self) -> str:
        """Hex digest of the spec: equal digests, equal samples."""
        return self.spec.digest

    @property
    def total_rows(self) -> int:
        """Selected rows, exclusions apart."""
        return self.selection.selected

    @property
    def epoch_samples(self) -> int:
        """Samples of an epoch, exclusions apart: the selected rows, or the length that the mixing gives."""
        return self.selection.total

    @property
    def steps_per_epoch(self) -> int:
        """Global batches after which epoch 0 has ended: of `drop`, exactly; of `carry`, rounded up. No exclusion
        changes this.
        """
        full, rest = divmod(self.epoch_samples, self.spec.global_batch)
        return full + (1 if rest and self.spec.remainder == "carry" else 0)

    def steps(self, epochs: float) -> int:
        """Global batches in a run of so many epochs; under `carry` the last one may reach into the next epoch.

        A run keeps its length when row groups are excluded: what is left is then seen a little more often.
        """
        if self.spec.remainder == "drop":
            return round(epochs * self.steps_per_epoch)
        return -(-round(epochs * self.epoch_samples) // self.spec.global_batch)

    def lanes_of(self, rank: int, world: int) -> range:
        """The lanes of one rank: contiguous and whole, so ranks differ by at most one lane.

        Raises:
            JobError: for more ranks than lanes.
        """
        if world > self.spec.lanes:
            remedy = f"use at most {self.spec.lanes} workers, a larger global batch or smaller row groups"
            problem = f"the plan has {self.spec.lanes} lanes, and a rank needs one"
            raise JobError("scaling.workers", world, problem, remedy)
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
                order = self._orders.order(lane, epoch)
                while start < stop:
                    window = order.window_of(start)
                    first, end = int(order.starts[window]), min(stop, int(order.starts[window + 1]))
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
        return tuple(self._orders.order(lane, epoch).window_groups(window).tolist())

    def window_rows(self, lane: int, epoch: int, window: int) -> np.ndarray:
        """The rows of a window in drawn order: int32 (2, n), row group and row in it. Do not write to it."""
        return self._orders.rows(lane, epoch, window)

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
        return max(era.largest_slice(lanes) for era in self._eras)

    def largest_window(self, lanes: range) -> int:
        """No window of `lanes` has more rows than this in any epoch."""
        counts = [np.sort(era.selection.counts[self._lanes[lane]]) for era in self._eras for lane in lanes]
        return max(int(rows[-self.spec.window :].sum()) for rows in counts)

    def _find_parts(self, k: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """(epoch, first draw, end of draws) of each lane: int64 (lanes,), for the one or two epochs of batch `k`."""
        era = next(era for era in reversed(self._eras) if era.first_step <= k)
        return era.parts(k)

    def _next_era(self, first_step: int, excluded: tuple[int, ...]) -> Era:
        if first_step < self._eras[-1].first_step:
            problem = f"the plan has an exclusion at step {self._eras[-1].first_step}"
            raise JobError("exclusions", first_step, problem, "exclude in the order of the steps")
        selection = self._eras[-1].selection.without(excluded)
        require_batch(selection.counts, self.spec.global_batch)
        epoch, drawn, _ = self._find_parts(first_step)[0]
        drop = self.spec.remainder == "drop"
        era = Era(selection, self._lanes, self.spec.global_batch, drop, first_step, epoch, drawn, excluded)
        if not era.fresh:
            orders = Orders(self._lanes, self.spec.window, self.spec.seed, [*self._eras, era])
            rows = [int(orders.order(lane, epoch).starts[-1]) for lane in range(self.spec.lanes)]
            era.set_rest((np.array(rows) - drawn).tolist())
        return era

    def _epoch_reads(self, lanes: range, epoch: int, first_step: int, last_step: int) -> list[WindowRead]:
        end = [era for era in self._eras if era.epoch <= epoch][-1].end(epoch)
        made = next(high for drawn, _, high in self._parts(end - 1) if drawn == epoch)  # `drop` leaves the rest
        found = []
        for lane in lanes:
            starts = np.minimum(self._orders.order(lane, epoch).starts, made[lane])
            windows = np.flatnonzero(np.diff(starts))
            first = self._steps_of(lane, epoch, starts[windows])
            last = self._steps_of(lane, epoch, starts[windows + 1] - 1)
            needed = np.flatnonzero((last >= first_step) & (first < last_step))
            found += [(int(first[i]), lane, int(windows[i]), int(last[i])) for i in needed]
        return [
            WindowRead(
                lane, epoch, window, self._groups_left(lane, epoch, window, first_step), max(first, first_step), last
            )
            for first, lane, window, last in sorted(found)
        ]

    def _groups_left(self, lane: int, epoch: int, window: int, first_step: int) -> tuple[int, ...]:
        """The row groups of a window; of one that an exclusion shortened, those drawn from at `first_step` or later."""
        order = self._orders.order(lane, epoch)
        groups = order.window_groups(window)
        if np.isin(groups, [group for exclusion in order.exclusions for group in exclusion.groups]).any():
            rows = self.window_rows(lane, epoch, window)
            steps = self._steps_of(lane, epoch, np.arange(order.starts[window], order.starts[window + 1]))
            groups = groups[np.isin(groups, rows[0, steps >= first_step])]
        return tuple(groups.tolist())

    def _steps_of(self, lane: int, epoch: int, draws: np.ndarray) -> np.ndarray:
        """The global batch that takes each of a lane's draws of an epoch, int64."""
        base, cutting = self._orders.lineage(epoch)
        steps = base.steps_of(lane, epoch, draws)
        for era in cutting:
            later = draws >= era.drawn[lane]
            steps[later] = era.steps_of(lane, epoch, draws[later])
        return steps
