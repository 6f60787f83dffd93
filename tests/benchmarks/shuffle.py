"""How well a plan shuffles, beside a full permutation of the same rows.

    python tests/benchmarks/shuffle.py

Row groups of 1,024 of 20 plates, once stored in hash order (as `build-crops` writes them) and once sorted by plate (the
worst that an import can bring): a small store at the default lanes and window and at others, and one of 21.8 M rows at
the defaults. `tests/benchmarks/plan.py` measures what a plan of that size costs.
"""

from __future__ import annotations

import numpy as np

from cosmic_ray.ingest.lanes import LANES
from cosmic_ray.ingest.plan import WINDOW, Plan
from cosmic_ray.ingest.selection import Selection

GROUP, BATCH, PLATES = 1024, 256, 20
SMALL, WHOLE = 64, 21_300
"""Row groups."""


def drawn_by_plan(groups: int, lanes: int, window: int, epoch: int) -> np.ndarray:
    """The stored positions of an epoch in drawn order: int64 (groups * GROUP,)."""
    selection = Selection(np.full(groups, GROUP))
    plan = Plan.fitted("benchmark", selection, BATCH, 1, lanes=lanes, window=window)
    steps = plan.steps_per_epoch
    samples = [plan.step(k) for k in range(epoch * steps, (epoch + 1) * steps)]
    return np.concatenate([batch.row_group.astype(np.int64) * GROUP + batch.row for batch in samples])


def distance(drawn: np.ndarray) -> float:
    """Mean of |stored position - drawn position|, in epochs; 1/3 for a full permutation."""
    return float(np.abs(drawn - np.arange(len(drawn))).mean() / len(drawn))


def correlation(drawn: np.ndarray) -> float:
    """Correlation of the stored positions of two samples of a batch, whose own order (it means nothing) is mixed."""
    batches = np.random.default_rng(0).permuted(drawn.reshape(-1, BATCH), axis=1)
    return float(np.corrcoef(batches[:, :-1].ravel(), batches[:, 1:].ravel())[0, 1])


def mates(drawn: np.ndarray) -> float:
    """Of all pairs in a batch, the share that comes from one row group."""
    groups = np.sort(drawn.reshape(-1, BATCH) // GROUP, axis=1)
    same = 0
    for batch in groups:
        counts = np.unique(batch, return_counts=True)[1]
        same += int((counts * (counts - 1)).sum())
    return same / (len(groups) * BATCH * (BATCH - 1))


def composition(drawn: np.ndarray, plates: np.ndarray) -> float:
    """Chi squared of a batch's plates over its degrees of freedom: 1 for a full permutation, 0 where all are alike."""
    rows = np.arange(len(drawn)) // BATCH * PLATES + plates[drawn]
    counts = np.bincount(rows, minlength=len(drawn) // BATCH * PLATES).reshape(-1, PLATES)
    expected = BATCH / PLATES
    return float(((counts - expected) ** 2 / expected).sum(axis=1).mean() / (PLATES - 1))


def again(first: np.ndarray, second: np.ndarray) -> float:
    """Of the pairs that share a batch in one epoch, the share that does so in the next, over that of chance."""
    batch_of = np.empty(len(second), np.int64)
    batch_of[second] = np.arange(len(second)) // BATCH
    found = np.sort(batch_of[first].reshape(-1, BATCH), axis=1)
    same = sum(int((c * (c - 1)).sum()) for c in (np.unique(batch, return_counts=True)[1] for batch in found))
    return same / (len(first) * (BATCH - 1)) / ((BATCH - 1) / (len(first) - 1))


def table(groups: int, ways: list[tuple[int, int]]) -> None:
    """Print the figures of a store of so many row groups."""
    rng, rows = np.random.default_rng(0), groups * GROUP
    ordered = (np.arange(rows) * PLATES // rows).astype(np.uint8)
    hashed = rng.permutation(ordered)
    print(f"\n{rows:,} rows in {groups:,} row groups, batch {BATCH}, {PLATES} plates\n")
    print("| order | distance | neighbours | one row group | plates, hash order | plates, sorted | pairs again |")
    print("|---|---|---|---|---|---|---|")
    permuted = ("full permutation", lambda epoch: rng.permutation(rows))
    planned = [
        (f"{lanes} lanes, window {window}", lambda epoch, way=(lanes, window): drawn_by_plan(groups, *way, epoch))
        for lanes, window in ways
    ]
    for name, drawn in [permuted, *planned]:
        first, second = drawn(0), drawn(1)
        figures = [distance(first), correlation(first), mates(first)]
        figures += [composition(first, hashed), composition(first, ordered), again(first, second)]
        print(f"| {name} | {' | '.join(f'{figure:.4f}' for figure in figures)} |", flush=True)


def main() -> None:
    table(SMALL, [(LANES, WINDOW), (LANES, 1), (4, WINDOW), (1, WINDOW), (64, WINDOW)])
    table(WHOLE, [(LANES, WINDOW)])


if __name__ == "__main__":
    main()
