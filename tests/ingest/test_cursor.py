"""Where a run stands: a position that survives a checkpoint and refuses another plan."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cosmic_ray.errors import JobError
from cosmic_ray.ingest.cursor import Cursor
from cosmic_ray.ingest.plan import Plan
from cosmic_ray.ingest.selection import Selection


def make_plan(seed: int = 0) -> Plan:
    return Plan.fitted("hash", Selection(np.full(8, 10)), 12, seed)


def test_a_cursor_survives_a_checkpoint() -> None:
    plan = make_plan()
    cursor = Cursor.at(plan, 17)
    assert cursor.position == 17 * 12
    again = Cursor.from_json(json.loads(json.dumps(cursor.to_json())))
    assert again == cursor and again.step(plan) == 17
    assert plan.step(again.step(plan)).position[0] == cursor.position


def test_a_cursor_of_another_plan_is_refused() -> None:
    with pytest.raises(JobError, match="the cursor belongs to plan"):
        Cursor.at(make_plan(seed=0), 3).step(make_plan(seed=1))


@pytest.mark.parametrize("value", [None, {}, {"plan_digest": "x"}, {"plan_digest": "x", "position": -1}])
def test_what_is_no_cursor_is_refused(value: object) -> None:
    with pytest.raises(JobError, match="not a cursor"):
        Cursor.from_json(value)
