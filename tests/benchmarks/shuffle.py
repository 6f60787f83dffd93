"""How well a plan shuffles, beside a full permutation of the same rows.

    python tests/benchmarks/shuffle.py

A million rows of 20 plates in row groups of 512, once stored in hash order (as `build-crops` writes them) and once
sorted by plate (the worst that an import can bring), drawn at the default lanes and window and at others.
"""

from __future__ import annotations

import numpy as np

from cosmic_ray.ingest.lanes import LANES
from cosmic_ray.ingest.plan import WINDOW, Plan
from cosmic_ray.ingest.selection import Selection

ROWS, GROUP, BATCH, PLATES = 2**20, 512, 256, 20


def drawn_by_plan(lanes: int, window: int, epoch: int) -> np.ndarray:
    """The stored positions of an epoch in drawn order: int64 (ROWS,)."""
    selection = Selection(np.full(ROWS // GROUP, GROUP))
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
    counts = np.stack([np.bincount(plates[batch], minlength=PLATES) for batch in drawn.reshape(-1, BATCH)])
    expected = BATCH / PLATES
    return float(((counts - expected) ** 2 / expected).sum(axis=1).mean() / (PLATES - 1))


def again(first: np.ndarray, second: np.ndarray) -> float:
    """Of the pairs that share a batch in one epoch, the share that does so in the next, over that of chance."""
    batch_of = np.empty(len(second), np.int64)
    batch_of[second] = np.arange(len(second)) // BATCH
    found = np.sort(batch_of[first].reshape(-1, BATCH), axis=1)
    same = sum(int((c * (c - 1)).sum()) for c in (np.unique(batch, return_counts=True)[1] for batch in found))
    return same / (len(first) * (BATCH - 1)) / ((BATCH - 1) / (len(first) - 1))


def main() -> None:
    rng = np.random.default_rng(0)
    ordered = np.arange(ROWS) * PLATES // ROWS
    hashed = rng.permutation(ordered)
    print("| order | distance | neighbours | one row group | plates, hash order | plates, sorted | pairs again |")
    print("|---|---|---|---|---|---|---|")
    ways = [(LANES, WINDOW), (LANES, 1), (4, WINDOW), (1, WINDOW), (64, WINDOW)]
    epochs = {
        f"{lanes} lanes, window {window}": [drawn_by_plan(lanes, window, e) for e in (0, 1)] for lanes, window in ways
    }
    epochs = {"full permutation": [rng.permutation(ROWS) for _ in range(2)], **epochs}
    for name, (first, second) in epochs.items():
        figures = [distance(first), correlation(first), mates(first)]
        figures += [composition(first, hashed), composition(first, ordered), again(first, second)]
        print(f"| {name} | {' | '.join(f'{figure:.4f}' for figure in figures)} |", flush=True)


if __name__ == "__main__":
    main()
