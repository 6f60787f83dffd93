"""The ids of a global batch are those of the crops that the stream hands out for it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cosmic_ray.errors import JobError
from cosmic_ray.ingest.plan import Plan
from cosmic_ray.ingest.selection import Selection
from cosmic_ray.ingest.show import plan_step
from cosmic_ray.ingest.stream import plain_batches
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.split import MakeSplit, Split


@pytest.fixture
def store(crop_store: Callable[..., CropStore]) -> CropStore:
    return crop_store(120)


def test_ids_are_those_of_the_streamed_crops(store: CropStore) -> None:
    plan = Plan.fitted(store.content_hash, Selection.all(store), 16, 3)
    ids = store.metadata(["crop_id"])["crop_id"].to_pylist()
    images = {crop_id: image.tobytes() for crop_id, image in zip(ids, store.crops(np.arange(120)), strict=True)}
    for batch in plain_batches(store.uri, plan, 0, 1, 6, 10):
        found = plan_step(store.uri, step=batch.step, seed=3, global_batch=16)
        assert [images[crop_id] for crop_id in found["crop_ids"]] == [image.numpy().tobytes() for image in batch.images]
        assert (found["step"], found["epoch"]) == (batch.step, batch.step * 16 // 120)
        assert found["plan"] == plan.digest


def test_only_crops_of_the_part_are_drawn(store: CropStore, tmp_path) -> None:
    MakeSplit(store=store.uri, out=str(tmp_path / "split")).run()
    split = Split.open(str(tmp_path / "split"), store)
    ids = np.array(store.metadata(["crop_id"])["crop_id"].to_pylist())
    for part in ("train", "val"):
        rows = split.rows(part)
        found = plan_step(store.uri, step=0, seed=1, global_batch=len(rows), split=split.uri, part=part)
        assert sorted(found["crop_ids"]) == sorted(ids[rows].tolist())
    with pytest.raises(JobError, match="part = 'valid'"):
        plan_step(store.uri, step=0, seed=1, global_batch=1, split=split.uri, part="valid")


def test_steps_are_counted_from_zero(store: CropStore) -> None:
    with pytest.raises(JobError, match="counted from 0"):
        plan_step(store.uri, step=-1, seed=1, global_batch=16)
