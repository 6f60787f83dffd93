"""Which row groups belong to which lane, and how many lanes a selection allows."""

from __future__ import annotations

import heapq

import numpy as np

from cosmic_ray.errors import JobError
from cosmic_ray.ingest.permutation import DEAL, permutation

LANES = 16


def deal(counts: np.ndarray, lanes: int, seed: int) -> list[np.ndarray]:
    """Deal the row groups that hold selected rows to lanes: int32 row groups of each lane, ascending.

    In a keyed order, largest first, each goes to the lane that holds the fewest rows so far.
    """
    held = np.flatnonzero(counts)
    order = held[permutation(len(held), seed, DEAL, (0, 0, 0))]
    order = order[np.argsort(-counts[order], kind="stable")]
    heap = [(0, lane) for lane in range(lanes)]
    dealt: list[list[int]] = [[] for _ in range(lanes)]
    for group, rows in zip(order.tolist(), counts[order].tolist(), strict=True):
        total, lane = heap[0]
        dealt[lane].append(group)
        heapq.heapreplace(heap, (total + rows, lane))
    return [np.sort(np.array(groups, dtype=np.int32)) for groups in dealt]


def fit_lanes(counts: np.ndarray, global_batch: int, seed: int, lanes: int = LANES) -> int:
    """The most lanes, at most `lanes`, that these row groups and this global batch allow.

    A lane needs a row group, and at least one row of every global batch. `counts`: int (G,), selected rows of each row
    group.

    Raises:
        JobError: where nothing is selected, or the global batch is larger than that.
    """
    total, held = require_batch(counts, global_batch), int(np.count_nonzero(counts))
    if lanes < 1:
        raise JobError("lanes", lanes, "at least one lane is needed")
    for fitted in range(min(lanes, held, global_batch), 1, -1):
        if min(lane_rows(deal(counts, fitted, seed), counts)) * global_batch >= total:
            return fitted
    return 1


def require_batch(counts: np.ndarray, global_batch: int) -> int:
    """The selected rows, if a plan can order them and the global batch fits among them; else JobError."""
    total = int(counts.sum())
    if total == 0:
        raise JobError("crops", 0, "no crop is selected", "look at the split and the filter")
    if total >= 2**31:
        raise JobError("crops", total, "a plan orders fewer than 2**31 crops", "select a part of them")
    if not 1 <= global_batch <= total:
        remedy = f"choose 1 to {total}"
        raise JobError("global_batch", global_batch, f"not between 1 and the {total} selected crops", remedy)
    return total


def lane_rows(dealt: list[np.ndarray], counts: np.ndarray) -> list[int]:
    """The selected rows of each lane."""
    return [int(counts[groups].sum()) for groups in dealt]
