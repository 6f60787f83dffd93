"""What was in a global batch: its crop ids, found without reading an image."""

from __future__ import annotations

from typing import Any

from cosmic_ray.errors import JobError
from cosmic_ray.ingest.lanes import LANES
from cosmic_ray.ingest.plan import WINDOW, Plan, Remainder, Samples
from cosmic_ray.ingest.selection import Selection
from cosmic_ray.stores.crops import CropStore


def plan_step(
    store_uri: str,
    *,
    step: int,
    seed: int,
    global_batch: int,
    split: str | None = None,
    part: str = "train",
    lanes: int = LANES,
    window: int = WINDOW,
    remainder: Remainder = "carry",
) -> dict[str, Any]:
    """The crops of global batch `step`, counted across epochs from 0, of a job with these settings.

    `split`: URI of the job's split, of which `part` is drawn; all crops without one.

    Returns:
        `step`; `epoch`, that of the first crop drawn; `crop_ids` in the batch's order; `plan`, the plan's digest.

    Raises:
        JobError: for a negative step, or settings that allow no plan.
        DataError: where the store or the split cannot be read.
    """
    store = CropStore.open(store_uri)
    if split is None:
        selection = Selection.all(store)
    else:
        from cosmic_ray.stores.split import Split

        selection = Selection.of(store, Split.open(split, store), part)
    plan = Plan.fitted(
        store.content_hash, selection, global_batch, seed, lanes=lanes, window=window, remainder=remainder
    )
    return crops_of_step(store, plan, step)


def crops_of_step(store: CropStore, plan: Plan, step: int) -> dict[str, Any]:
    """As `plan_step`, of a plan at hand.

    Raises:
        JobError: for a negative step.
        DataError: where the store cannot be read.
    """
    if step < 0:
        raise JobError("step", step, "steps are counted from 0")
    samples = plan.step(step)
    found = crop_ids(store, samples)
    return {"step": step, "epoch": int(samples.epoch.min()), "crop_ids": found, "plan": plan.digest}


def crop_ids(store: CropStore, samples: Samples) -> list[str]:
    """The ids of `samples`, in order; only the row groups that hold them are read, and no image.

    Raises DataError where one cannot be read.
    """
    rows = store.group_starts[samples.row_group] + samples.row
    return store.metadata(["crop_id"], rows)["crop_id"].to_pylist()
