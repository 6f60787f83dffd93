"""Which rows of a store a plan draws from: all, one part of a split, or any mask; one bit a row, nothing for all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from cosmic_ray.errors import JobError

if TYPE_CHECKING:
    from cosmic_ray.stores.crops import CropStore
    from cosmic_ray.stores.split import Split


class Selection:
    """The rows that each row group contributes to an epoch: each selected row once; `mixing.Mixed` has it otherwise.

    `sizes`: int64 (G,), rows stored in each row group. `counts`: int64 (G,), the most rows that each contributes to any
    epoch; here, exactly those of every epoch. `selected`: rows selected. `total`: rows of an epoch. `digest`: hex, of
    the sizes and the rows selected, so that equal digests mean equal plans. `mixing`: hex digest of the mixing, empty
    without. Immutable.
    """

    mixing = ""

    def __init__(self, rows_per_group: np.ndarray, mask: np.ndarray | None = None):
        """`rows_per_group`: int (G,). `mask`: bool (N,) in store row order, or None for all rows.

        Raises ValueError where the mask is not bool (N,).
        """
        sizes = np.ascontiguousarray(rows_per_group, dtype=np.int64)
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        self._bits: np.ndarray | None = None
        self.sizes = self.counts = sizes
        if mask is not None:
            if mask.dtype != np.bool_ or mask.shape != (int(self._starts[-1]),):
                raise ValueError(f"mask must be bool ({self._starts[-1]},), not {mask.dtype} {mask.shape}")
            pairs = zip(self._starts[:-1].tolist(), self._starts[1:].tolist(), strict=True)
            self.counts = np.array([np.count_nonzero(mask[a:b]) for a, b in pairs], dtype=np.int64)
            if not np.array_equal(self.counts, sizes):
                self._bits = np.packbits(mask)
        digest = hashlib.sha256(b"rows" + sizes.astype("<i8").tobytes())
        if self._bits is not None:
            digest.update(b"selected" + self._bits.tobytes())
        self.digest = digest.hexdigest()
        self.selected = self.total = int(self.counts.sum())

    @classmethod
    def all(cls, store: CropStore) -> Selection:
        """Every row of the store."""
        return cls(store.rows_per_group)

    @classmethod
    def of(cls, store: CropStore, split: Split, part: str) -> Selection:
        """The rows of one part (`train`, `val`, `test`) of the store's split.

        Raises JobError for another part, and for one that holds no row.
        """
        from cosmic_ray.stores.split import PARTS

        if part not in PARTS:
            raise JobError("part", part, "not a part of a split", f"the parts are {', '.join(PARTS)}")
        mask = split.codes == PARTS.index(part)
        if not mask.any():
            raise JobError("split", part, "this part of the split holds no crop", "choose other fractions or groups")
        return cls(store.rows_per_group, mask)

    def narrowed(self, mask: np.ndarray) -> Selection:
        """The selected rows for which `mask`, bool (N,), holds.

        Raises JobError where that is none.
        """
        both = self.mask() & mask
        if not both.any():
            raise JobError(
                "where", int(mask.sum()), "no selected crop meets the conditions", "look at the split as well"
            )
        return self._with(both)

    def without(self, groups: Iterable[int]) -> Selection:
        """This selection less whole row groups: those of a shard that cannot be read."""
        mask = self.mask()
        for group in groups:
            mask[self._starts[group] : self._starts[group + 1]] = False
        return self._with(mask)

    def mask(self) -> np.ndarray:
        """Bool (N,): whether each row of the store is selected."""
        rows = int(self._starts[-1])
        return np.ones(rows, np.bool_) if self._bits is None else np.unpackbits(self._bits, count=rows).view(np.bool_)

    def counts_in(self, epoch: int) -> np.ndarray:
        """Int64 (G,): how many rows each row group contributes to `epoch`. They sum to `total` in every epoch."""
        return self.counts

    def rows(self, group: int, epoch: int = 0) -> np.ndarray:
        """Int64 (counts_in(epoch)[group],): the rows that row group `group` contributes to `epoch`; here, the same to
        each.

        The one place that decides what a row group gives to an epoch.
        """
        return self._selected(group)

    def _selected(self, group: int) -> np.ndarray:
        start, stop = int(self._starts[group]), int(self._starts[group + 1])
        if self._bits is None:
            return np.arange(stop - start)
        first = start // 8
        bits = np.unpackbits(self._bits[first : (stop + 7) // 8])[start - 8 * first : stop - 8 * first]
        return np.flatnonzero(bits)

    def _with(self, mask: np.ndarray) -> Selection:
        return Selection(self.sizes, mask)
