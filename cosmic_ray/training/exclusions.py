"""Shards that turned out to be damaged in the middle of a run and are left out of the rest of it, on the job's word.

What is left out, from which step on and why lies beside the run; the plan is made with it, and every checkpoint's
cursor holds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

from cosmic_ray import storage
from cosmic_ray.config import Config
from cosmic_ray.errors import DamagedError, NotFoundError
from cosmic_ray.output import Output, encode
from cosmic_ray.progress import say
from cosmic_ray.training import checkpoint

if TYPE_CHECKING:
    import numpy as np

    from cosmic_ray.ingest.plan import Plan
    from cosmic_ray.stores.crops import CropStore

FILE = "exclusions.json"


class Exclusion(Config):
    """One shard that was left out."""

    step: int
    """From this global batch on."""
    shard: str
    problem: str
    row_groups: list[int]
    crops: int
    """Stored in these row groups, whatever part of the split they belong to."""


def read(out: str) -> list[Exclusion]:
    """What the run at `out` leaves out so far, in ascending order of the steps."""
    try:
        found = storage.read_json(storage.join(out, FILE))["exclusions"]
    except NotFoundError:
        return []
    return [Exclusion.model_validate(each) for each in found]


def applied(left_out: list[Exclusion], plan: Plan) -> Plan:
    """`plan`, made without exclusions, with these.

    Raises:
        JobError: where too few crops are left.
    """
    by_step = groupby(left_out, lambda each: each.step)
    return plan.with_exclusions(
        (step, tuple(sorted(group for each in some for group in each.row_groups))) for step, some in by_step
    )


def kept(left_out: list[Exclusion], store: CropStore, rows: np.ndarray) -> np.ndarray:
    """Those of `rows` (int64, of the store) that lie in no row group that was left out."""
    import numpy as np

    groups = np.searchsorted(store.group_starts, rows, side="right") - 1
    return rows[~np.isin(groups, [group for each in left_out for group in each.row_groups])]


def add(output: Output, store: CropStore, failure: Mapping[str, Any]) -> bool:
    """Leave out the shard that an attempt failed on, from the newest checkpoint on; False where it was no damaged
    shard of `store` that the attempt failed on: one that cannot be reached is not damaged.

    Args:
        failure: what a worker told: `type`, and of a DataError `uri` and `problem`.
    """
    known = read(output.uri)
    groups = [group for group in store.row_groups if group.shard == failure.get("uri")]
    damaged = failure["type"] in (DamagedError.__name__, NotFoundError.__name__)
    if not damaged or not groups or any(each.shard == groups[0].shard for each in known):
        return False
    newest = checkpoint.newest(checkpoint.within(output.uri))
    found = Exclusion(
        step=checkpoint.read_state(newest)["step"] if newest else 0,
        shard=groups[0].shard,
        problem=failure["problem"],
        row_groups=[group.index for group in groups],
        crops=sum(group.rows for group in groups),
    )
    output.write(FILE, encode({"exclusions": [each.model_dump() for each in [*known, found]]}))
    say(f"{found.shard}: {found.problem}; its {found.crops} crops are left out from step {found.step} on")
    return True
