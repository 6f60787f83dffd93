"""Selections and plans for property tests, plain, mixed and with exclusions, and what they should hold."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from cosmic_ray.errors import JobError
from cosmic_ray.ingest.mixing import Mixed
from cosmic_ray.ingest.plan import Plan, Samples
from cosmic_ray.ingest.selection import Selection


@st.composite
def selections(draw: st.DrawFn) -> Selection:
    """Up to 14 row groups of 0 to 40 rows, all selected or some; at least one row is."""
    counts = np.array(draw(st.lists(st.integers(0, 40), min_size=1, max_size=14)))
    counts[draw(st.integers(0, len(counts) - 1))] += 1
    if draw(st.booleans()):
        return Selection(counts)
    mask = np.random.default_rng(draw(st.integers(0, 99))).random(counts.sum()) < draw(st.sampled_from([0.1, 0.5, 0.9]))
    mask[draw(st.integers(0, len(mask) - 1))] = True
    return Selection(counts, mask)


@st.composite
def mixtures(draw: st.DrawFn, seed: int | None = None) -> Mixed:
    """The same rows, of one to four values in uneven numbers, some rare; a value's share is far above or below 1."""
    plain = draw(selections())
    weights = dict(zip("abcd", draw(st.lists(st.sampled_from([0.1, 1, 1.5, 7]), min_size=1, max_size=4)), strict=False))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    codes = rng.choice(len(weights), int(plain.sizes.sum()), p=rng.dirichlet(np.ones(len(weights)))).astype(np.uint8)
    total = draw(st.integers(1, 3 * plain.selected))
    seed = draw(st.integers(-(2**63), 2**63 - 1)) if seed is None else seed
    try:
        return Mixed(plain.sizes, plain.mask(), codes, weights, total, seed)
    except JobError:  # a value without a row or a sample
        assume(False)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    selection = draw(st.one_of(selections(), mixtures()))
    batch = draw(st.integers(1, min(selection.total, selection.selected)))
    window, seed = draw(st.integers(1, 5)), draw(st.integers(-(2**63), 2**63 - 1))
    remainder = draw(st.sampled_from(["carry", "drop"]))
    return Plan.fitted(
        "hash", selection, batch, seed, lanes=draw(st.integers(1, 8)), window=window, remainder=remainder
    )


@st.composite
def shrinking_plans(draw: st.DrawFn) -> Plan:
    """A plan from which up to three times some row groups leave, at the same or at later steps."""
    plan = draw(plans())
    steps = draw(st.lists(st.integers(0, min(plan.steps(3), 60)), min_size=1, max_size=3))
    for step in sorted(steps):
        groups = draw(st.sets(st.integers(0, len(plan.selection.sizes) - 1), min_size=1, max_size=5))
        try:
            plan = plan.excluding(groups, step)
        except JobError:  # too little would be left
            continue
    assume(plan.spec.exclusions)
    return plan


def contribution(selection: Selection, epoch: int) -> Counter[tuple[int, int]]:
    """How often each row, (row group, row), comes in an epoch."""
    return Counter((g, row) for g in range(len(selection.sizes)) for row in selection.rows(g, epoch).tolist())


def references(samples: Samples) -> list[tuple[int, int]]:
    return list(zip(samples.row_group.tolist(), samples.row.tolist(), strict=True))


def windows_needed(plan: Plan, lanes: range, first: int, last: int) -> dict[tuple[int, int, int], tuple[int, int]]:
    """(lane, epoch, window) -> the first and the last of the steps `first` .. `last`-1 at which the window is open:
    between two of its draws it stays open, also where a step takes nothing from it.
    """
    steps: dict[tuple[int, int, int], list[int]] = {}
    for k in range(last + plan.steps_per_epoch + 1):
        for piece in plan.pieces(k, lanes):
            steps.setdefault(piece[:3], []).append(k)
    spans = {key: (max(found[0], first), min(found[-1], last - 1)) for key, found in steps.items()}
    return {key: span for key, span in spans.items() if span[0] <= span[1]}
