"""How generated images compare with real ones: distances in an embedding space, copies of train cells, accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cosmic_ray.evaluation.metrics.neighbours import coverage, knn_accuracy, nearest_distances
from cosmic_ray.evaluation.metrics.sliced import sliced_wasserstein
from cosmic_ray.evaluation.scores import over_rounds

RATIO = 10
"""Generated images for each real one in COV (App. C)."""
FEWEST = 2 * (RATIO + 1)
"""Cells that a group needs: for fewer there is no COV of real cells beside it."""
NEAR = 0.01
"""Share of held-out cells that count as near a train cell: what an ideal generator gets, too."""
METRICS = ("cov", "swd", "knna")
KINDS = ("value", "matched", "real")


@dataclass(frozen=True)
class Embedded:
    """Embeddings of the same N cells."""

    real: np.ndarray
    """float32 (N, D)."""
    rounds: Sequence[np.ndarray]
    """R of float32 (N, S, D)."""


def distances(embedded: Embedded, groups: Mapping[str, np.ndarray], seed: int) -> dict[str, dict[str, Any]]:
    """COV, SWD and k-NNA of each group of cells, over the rounds.

    Each has three figures, since none of the three is 0 or 1 for an ideal generator. `value` is the paper's (App. C):
    COV with 10 generated images for each real one (of fewer samples a cell, for fewer real cells), SWD and k-NNA with
    one a cell. `real` puts other real cells in the place of the generated ones, at the sizes that the held-out cells
    allow: half against half, for COV an eleventh against the rest. `matched` is the generated images of those other
    cells against the same real ones: an ideal generator's `matched` is `real`, but for the rounds' scatter.

    Args:
        embedded: of all cells.
        groups: name -> places of its cells, at least `FEWEST`.
        seed: of directions and of who is drawn; each round draws its own halves.

    Returns:
        group -> {"cells", and for each metric {kind: mean, low, high, rounds}}.
    """
    found = {}
    for name, cells in groups.items():
        rounds = [_one_round(embedded.real[cells], each[cells], seed + r) for r, each in enumerate(embedded.rounds)]
        found[name] = {"cells": len(cells)} | {
            metric: {kind: over_rounds([each[metric, kind] for each in rounds]) for kind in KINDS} for metric in METRICS
        }
    return found


def _one_round(real: np.ndarray, generated: np.ndarray, seed: int) -> dict[tuple[str, str], float]:
    random = np.random.default_rng([seed, len(real)])
    one = generated[:, 0]
    found = {
        ("cov", "value"): _paper_coverage(real, generated, random),
        ("swd", "value"): sliced_wasserstein(real, one, seed=seed).normalised,
        ("knna", "value"): knn_accuracy(real, one).score,
    }
    order, half, few = random.permutation(len(real)), len(real) // 2, len(real) // (RATIO + 1)
    some, others = order[:half], order[half : 2 * half]
    for kind, source in (("matched", one), ("real", real)):
        found["cov", kind] = coverage(real[order[:few]], source[order[few : (RATIO + 1) * few]], RATIO)
        found["swd", kind] = sliced_wasserstein(real[some], source[others], seed=seed).normalised
        found["knna", kind] = knn_accuracy(real[some], source[others]).score
    return found


def _paper_coverage(real: np.ndarray, generated: np.ndarray, random: np.random.Generator) -> float:
    cells, samples, width = generated.shape
    covered = min(cells, cells * samples // RATIO)
    if covered < 2:
        return float("nan")
    pooled = generated[:, :RATIO].reshape(-1, width)
    chosen = pooled if len(pooled) == RATIO * covered else pooled[random.permutation(len(pooled))[: RATIO * covered]]
    return coverage(real[np.sort(random.permutation(cells)[:covered])], chosen, RATIO)


def near_train(embedded: Embedded, train: np.ndarray) -> dict[str, Any]:
    """The share of generated images that lie nearer to some train cell than 1 % of real held-out cells do.

    A generator that gives train cells back gets 1; an ideal one 0.01; so does a bad one that is far from everything:
    it is a test for copies, not a score of quality.
    """
    own = np.quantile(nearest_distances(embedded.real, train), NEAR)
    return over_rounds([float((nearest_distances(each[:, 0], train) <= own).mean()) for each in embedded.rounds])


def groups_of(labels: np.ndarray) -> dict[str, np.ndarray]:
    """`all`, and each cell type of at least `FEWEST` cells: places of its cells."""
    names = [name for name in np.unique(labels) if name and name != "all"]
    types = {str(name): np.flatnonzero(labels == name) for name in names}
    return {"all": np.arange(len(labels)), **{name: cells for name, cells in types.items() if len(cells) >= FEWEST}}
