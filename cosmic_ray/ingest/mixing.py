"""`mixing:` - the share that each value of a column has in an epoch; an epoch is then a length, and a crop may recur.

Of value v, with n selected rows in stored order, an epoch holds Q rows: the job's share of the epoch's length, exact to
one sample. Row j of the n occurs floor(Q (j + e + 1) / n) - floor(Q (j + e) / n) times in epoch e. Summed over the rows
that makes Q in every epoch, and summed over epochs it leaves no row behind: of T epochs in a row, each row of v is
drawn floor(T Q / n) or ceil(T Q / n) times. Where v has fewer rows than its share, they recur, Q / n times on average;
where it has more, epochs take turns with them.

All of a row's recurrences in an epoch lie in the one window that holds its row group, so a rare value with a large
share comes back within that window's steps, and then not before the next epoch. A shorter `epoch`, of about as many
samples as make Q = n for the rarest value, spreads its recurrences evenly over the run; the other values' rows then
take turns, and a row group is read in each epoch for a part of its rows.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from cosmic_ray.config import Config
from cosmic_ray.errors import JobError
from cosmic_ray.ingest.permutation import PHASE, RECUR, permutation, words
from cosmic_ray.ingest.selection import Selection
from cosmic_ray.ingest.where import MOST_VALUES, column_codes

if TYPE_CHECKING:
    from cosmic_ray.stores.crops import CropStore

_NONE = 255


class Mixing(Config):
    """Which share of an epoch each value of a column has; without it, each crop comes once an epoch."""

    column: str
    """A column of text, as `source` or `cell_line`."""

    weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(min_length=1, max_length=MOST_VALUES)
    """For every value among the selected crops its weight: {U2OS: 2, HeLa: 1} makes two thirds of an epoch U2OS,
    however many there are of each."""

    epoch: int | None = Field(None, ge=1, lt=2**31)
    """Samples of an epoch; null for as many as crops are selected."""


class Mixed(Selection):
    """A selection of which each value has its share of `total` samples; a row may come several times or not at all."""

    def __init__(
        self,
        rows_per_group: np.ndarray,
        mask: np.ndarray | None,
        codes: np.ndarray,
        weights: dict[str, float],
        total: int,
        seed: int,
    ):
        """`codes`: uint8 (N,), the number of each row's value among the sorted keys of `weights`; of rows that are not
        selected, anything. `total`: samples of an epoch. `seed`: decides which rows recur when.

        Raises JobError where a value has no selected row, or no sample of an epoch.
        """
        super().__init__(rows_per_group, mask)
        self._codes = codes if mask is None else np.where(mask, codes, np.uint8(_NONE))
        self._weights, self._seed = dict(sorted(weights.items())), seed
        values, groups = len(weights), len(self.sizes)
        # Rows of each value in the row groups before this one.
        self._before = np.zeros((values, groups + 1), np.int32)
        for group in range(groups):
            found = np.bincount(self._codes_of(group), minlength=_NONE + 1)
            self._before[:, group + 1] = found[:values]
        np.cumsum(self._before, axis=1, out=self._before)
        self._rows, self._quotas = self._before[:, -1].tolist(), quotas(self._weights, total)
        self._require_samples(total)
        self._phases = [int(words(1, seed, PHASE, (value, 0, 0))[0]) for value in range(values)]
        self.total = total
        self.counts = self._summed(lambda before, rows, quota, _: -(-quota * np.diff(before) // rows))
        facts = [self._quotas, seed, hashlib.sha256(self._codes).hexdigest()]
        self.mixing = hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def counts_in(self, epoch: int) -> np.ndarray:
        """Int64 (G,): how many rows each row group contributes to `epoch`. They sum to `total` in every epoch."""
        return self._summed(
            lambda before, rows, quota, phase: np.diff(quota * (before + (epoch + phase) % rows) // rows)
        )

    def rows(self, group: int, epoch: int = 0) -> np.ndarray:
        """Int64 (counts_in(epoch)[group],): the rows that row group `group` contributes to `epoch`, ascending; a row
        that comes more than once is repeated.
        """
        codes = self._codes_of(group)
        selected = np.flatnonzero(codes != _NONE)
        # A keyed order inside the row group: rows that lie side by side do not take turns.
        selected = selected[permutation(len(selected), self._seed, RECUR, (group, 0, 0))]
        times = np.zeros(len(codes), np.int64)
        for value in np.unique(codes[selected]).tolist():
            here = selected[codes[selected] == value]
            rows, quota = self._rows[value], self._quotas[value]
            first = int(self._before[value, group]) + (epoch + self._phases[value]) % rows
            places = first + np.arange(len(here) + 1)
            whole, rest = divmod(quota, rows)
            times[here] = whole + np.diff(rest * places // rows)
        return np.repeat(np.arange(len(codes)), times)

    def _codes_of(self, group: int) -> np.ndarray:
        return self._codes[self._starts[group] : self._starts[group + 1]]

    def _summed(self, term: Callable[[np.ndarray, int, int, int], np.ndarray]) -> np.ndarray:
        """The sum over the values of `term(rows before each group, rows, rest of the quota, phase)`, and of the whole
        number of times that every row comes: int64 (G,).
        """
        found = np.zeros(len(self.sizes), np.int64)
        for before, rows, quota, phase in zip(self._before, self._rows, self._quotas, self._phases, strict=True):
            whole, rest = divmod(quota, rows)
            before = before.astype(np.int64)
            found += whole * np.diff(before) + term(before, rows, rest, phase)
        return found

    def _require_samples(self, total: int) -> None:
        for value, rows, quota in zip(self._weights, self._rows, self._quotas, strict=True):
            key, weight = f"mixing.weights.{value}", self._weights[value]
            if not rows:
                raise JobError(key, weight, "no selected crop has this value", "leave it out, or look at the filter")
            if not quota:
                raise JobError(key, weight, f"less than one sample of an epoch of {total}", "raise it, or mixing.epoch")

    def _with(self, mask: np.ndarray) -> Selection:
        return Mixed(self.sizes, mask, self._codes, self._weights, self.total, self._seed)


def quotas(weights: dict[str, float], total: int) -> list[int]:
    """Each value's samples of an epoch of `total`, in the order of `weights`: their shares, rounded down, and one more
    for those with the largest remainders (the first ones among equals), so that they sum to `total`.
    """
    exact = [total * Fraction(weight) / sum(map(Fraction, weights.values())) for weight in weights.values()]
    whole = [int(share) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda index: whole[index] - exact[index])
    for index in by_rest[: total - sum(whole)]:
        whole[index] += 1
    return whole


def mixed(store: CropStore, selection: Selection, mixing: Mixing, seed: int) -> Mixed:
    """`selection` with the shares of `mixing`. Reads that column of all rows, no image.

    Raises:
        JobError: for a column that the store lacks or that is no text, a value without weight, a weight without crops.
    """
    names, codes = column_codes(store, mixing.column, "mixing.column")
    mask = selection.mask()
    there = np.bincount(codes[mask], minlength=len(names)) > 0
    found = [name for name, some in zip(names, there, strict=True) if some]
    for name, weight in mixing.weights.items():
        if name not in found:
            near = difflib.get_close_matches(name, found, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(found[:10])}"
            raise JobError(f"mixing.weights.{name}", weight, "no selected crop has this value", remedy)
    if missing := [name for name in found if name not in mixing.weights]:
        problem = f"no weight for {', '.join(missing[:10])}, of which crops are selected"
        raise JobError("mixing.weights", mixing.weights, problem, "give each a weight, or leave it out with where")
    order = {name: number for number, name in enumerate(sorted(mixing.weights))}
    codes = np.array([order.get(name, _NONE) for name in names], np.uint8)[codes]
    total = mixing.epoch or selection.selected
    return Mixed(selection.sizes, mask, codes, mixing.weights, total, seed)
