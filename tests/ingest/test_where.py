"""`where:` keeps the crops that meet every condition, and says so when a condition cannot be meant."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cosmic_ray.errors import JobError
from cosmic_ray.ingest.plan import Plan
from cosmic_ray.ingest.selection import Selection
from cosmic_ray.ingest.where import Between, matching
from cosmic_ray.stores.crops import CropStore


@pytest.fixture
def store(crop_store: Callable[..., CropStore]) -> CropStore:
    return crop_store(60, columns={"q_focus": np.array([np.nan, 0.2, 0.9] * 20, np.float32)})


def test_all_conditions_must_hold(store: CropStore) -> None:
    table = store.metadata(["cell_line", "area_px", "q_focus"]).to_pandas()
    mask = matching(store, {"cell_line": ["HeLa"], "area_px": Between(min=40, max=90), "q_focus": Between(max=0.5)})
    expected = (table.cell_line == "HeLa") & table.area_px.between(40, 90) & (table.q_focus <= 0.5)
    assert mask.dtype == np.bool_ and 0 < mask.sum() < 60
    assert np.array_equal(mask, expected)
    assert matching(store, {}).all()
    areas = table.area_px[:3].tolist()
    assert np.array_equal(matching(store, {"area_px": areas}), table.area_px.isin(areas))


def test_a_plan_draws_what_is_left(store: CropStore) -> None:
    half = Selection(store.rows_per_group, np.arange(60) < 30)
    mask = matching(store, {"plate": ["plate-0", "plate-2"]})
    selection = half.narrowed(mask)
    assert np.array_equal(selection.mask(), mask & (np.arange(60) < 30))
    plan = Plan.fitted(store.content_hash, selection, 5, 0)
    rows = [store.group_starts[s.row_group] + s.row for s in map(plan.step, range(plan.steps(1)))]
    assert sorted(np.concatenate(rows).tolist()) == np.flatnonzero(selection.mask()).tolist()
    with pytest.raises(JobError, match="no selected crop"):
        half.narrowed(np.arange(60) >= 30)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"cellline": ["HeLa"]}, "did you mean 'cell_line'"),
        ({"image": ["x"]}, "no such column"),
        ({"cell_line": ["Hela"]}, "no crop has this value .did you mean 'HeLa'"),
        ({"cell_line": Between(min=1)}, "a range of string"),
    ],
)
def test_what_cannot_be_meant(store: CropStore, where: dict, message: str) -> None:
    with pytest.raises(JobError, match=message):
        matching(store, where)
