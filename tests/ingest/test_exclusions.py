"""Row groups leave a plan in mid-run: what was drawn stays, and every other row still comes exactly as often as due."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning import contribution, plans, references, shrinking_plans, windows_needed

from cosmic_ray.errors import DataError, JobError
from cosmic_ray.ingest.cursor import Cursor
from cosmic_ray.ingest.plan import Plan
from cosmic_ray.ingest.selection import Selection
from cosmic_ray.ingest.stream import plain_batches
from cosmic_ray.stores.crops import CropStore


def make_plan(**options) -> Plan:
    return Plan.fitted("hash", Selection(np.full(64, 32)), 100, 3, **options)


def groups_of(plan: Plan, steps: range) -> set[int]:
    return {int(group) for k in steps for group in plan.step(k).row_group}


class TestExactlyOnce:
    @settings(max_examples=150, deadline=None)
    @given(shrinking_plans())
    def test_every_row_that_is_left_comes_as_often_as_it_should(self, plan: Plan) -> None:
        """Walk the steps with a list of what each epoch still owes."""
        selection, epoch = plan.selection, 0
        owed, gone = contribution(selection, 0), set()
        to_come, begun = list(plan.spec.exclusions), False
        last = to_come[-1][0] + 2 * plan.steps_per_epoch + 1
        for k in range(last):
            while to_come and to_come[0][0] == k:
                groups = to_come.pop(0)[1]
                gone |= set(groups)
                selection = selection.without(groups)
                owed = Counter({row: times for row, times in owed.items() if row[0] not in gone})
                owed = owed if begun else contribution(selection, epoch)
            samples = plan.step(k)
            assert samples.position.tolist() == list(range(k * len(samples.row), (k + 1) * len(samples.row)))
            assert not gone & set(samples.row_group.tolist())
            for now in sorted(set(samples.epoch.tolist())):
                if now > epoch:
                    assert now == epoch + 1
                    assert owed.total() < (plan.spec.global_batch if plan.spec.remainder == "drop" else 1)
                    epoch, owed = now, contribution(selection, now)
                drawn = Counter(row for row, e in zip(references(samples), samples.epoch, strict=True) if e == now)
                assert drawn <= owed
                owed -= drawn
            begun = True
            if not owed and plan.spec.remainder == "carry":
                epoch, owed, begun = epoch + 1, contribution(selection, epoch + 1), False
            if owed.total() < plan.spec.global_batch and plan.spec.remainder == "drop":
                epoch, owed, begun = epoch + 1, contribution(selection, epoch + 1), False

    @settings(max_examples=60, deadline=None)
    @given(plans(), st.data())
    def test_steps_before_an_exclusion_stay_as_they_were(self, plan: Plan, data: st.DataObject) -> None:
        step = data.draw(st.integers(0, min(plan.steps(2), 40)))
        try:
            less = plan.excluding([data.draw(st.integers(0, len(plan.selection.sizes) - 1))], step)
        except JobError:
            return
        for k in range(step):
            for ours, theirs in zip(plan.step(k), less.step(k), strict=True):
                assert np.array_equal(ours, theirs)

    @settings(max_examples=60, deadline=None)
    @given(shrinking_plans(), st.integers(0, 60))
    def test_any_ranks_together_are_the_global_batch_found_at_once(self, plan: Plan, k: int) -> None:
        whole = pickle.loads(pickle.dumps(plan)).step(k)
        for world in range(1, plan.spec.lanes + 1):
            ranks = [plan.lanes_of(rank, world) for rank in range(world)]
            parts = [plan.rank_step(k, lanes) for lanes in ranks]
            for ours, together in zip(whole, zip(*parts, strict=True), strict=True):
                assert np.array_equal(ours, np.concatenate(together))
            for lanes, part in zip(ranks, parts, strict=True):
                assert part.position.tolist() == list(plan.positions(k, lanes))
                assert len(part.row) <= plan.largest_slice(lanes)

    @settings(max_examples=100, deadline=None)
    @given(shrinking_plans(), st.data())
    def test_reads_hold_what_the_steps_draw_and_nothing_excluded(self, plan: Plan, data: st.DataObject) -> None:
        first = data.draw(st.integers(0, 60))
        last = first + data.draw(st.integers(0, 60))
        lanes = plan.lanes_of(0, data.draw(st.integers(1, plan.spec.lanes)))
        reads = list(plan.reads(lanes, first, last))
        assert [read.first_step for read in reads] == sorted(read.first_step for read in reads)
        opened = {read[:3]: (read.first_step, min(read.last_step, last - 1)) for read in reads}
        assert opened == windows_needed(plan, lanes, first, last) and len(opened) == len(reads)
        drawn_of: dict[tuple, set[int]] = {read[:3]: set() for read in reads}
        for piece in (piece for k in range(first, last) for piece in plan.pieces(k, lanes)):
            drawn_of[piece[:3]] |= set(plan.window_rows(*piece[:3])[0, piece.start : piece.stop].tolist())
        for read in reads:
            assert drawn_of[read[:3]] <= set(read.row_groups)
            assert plan.window_rows(*read[:3]).shape[1] <= plan.largest_window(lanes)
            for step, groups in plan.spec.exclusions:
                assert step > first or not set(groups) & set(read.row_groups)

    def test_what_the_exclusion_does_not_touch_keeps_its_order(self) -> None:
        plan = make_plan(lanes=8)
        less = plan.excluding([5], 7)
        undisturbed = [row for k in range(7, 20) for row in references(plan.step(k))]
        rest = [row for k in range(7, 20) for row in references(less.step(k))]
        for lane in range(8):
            of_lane = set(plan._lanes[lane].tolist())
            ours, theirs = ([row for row in rows if row[0] in of_lane and row[0] != 5] for rows in (rest, undisturbed))
            shorter = min(len(ours), len(theirs))
            assert shorter and ours[:shorter] == theirs[:shorter]


class TestWhatItMeans:
    def test_two_at_one_step_are_one(self) -> None:
        plan = make_plan()
        one, two = plan.excluding([1, 2], 9), plan.excluding([1], 9).excluding([2], 9)
        assert one.digest != two.digest
        for k in (8, 9, 15, 21, 90):
            assert references(one.step(k)) == references(two.step(k))

    def test_a_run_keeps_its_length(self) -> None:
        plan = make_plan()
        less = plan.excluding(range(32), 3)
        assert (less.steps(2), less.steps_per_epoch) == (plan.steps(2), plan.steps_per_epoch)
        assert less.step(plan.steps(2) - 1).epoch.min() > 1

    def test_a_mixing_has_its_shares_again_in_the_next_epoch(self) -> None:
        from cosmic_ray.ingest.mixing import Mixed

        codes = (np.arange(64 * 32) % 5 == 0).astype(np.uint8)
        mixture = Mixed(np.full(64, 32), None, codes, {"a": 1, "b": 1}, 2000, 0)
        plan = Plan.fitted("hash", mixture, 100, 0).excluding(range(10), 7)
        drawn = [plan.step(k) for k in range(60)]
        found = Counter(
            int(codes[32 * group + row])
            for samples in drawn
            for (group, row), epoch in zip(references(samples), samples.epoch, strict=True)
            if epoch == 1
        )
        assert found == {0: 1000, 1: 1000}

    def test_the_digest_tells_exclusions_apart(self) -> None:
        plan = make_plan()
        found = [plan, plan.excluding([1], 9), plan.excluding([1], 10), plan.excluding([2], 9)]
        assert len({plan.digest for plan in found}) == 4

    def test_what_cannot_be_excluded(self) -> None:
        plan = make_plan()
        with pytest.raises(JobError, match="global_batch = 100: not between 1 and the 96 selected crops"):
            plan.excluding(range(61), 4)
        with pytest.raises(JobError, match="exclusions = 3: the plan has an exclusion at step 4"):
            plan.excluding([1], 4).excluding([2], 3)
        with pytest.raises(JobError, match="exclusions = -1"):
            plan.excluding([1], -1)


class TestCursor:
    def test_a_resumed_run_rebuilds_its_plan_from_job_and_cursor(self) -> None:
        plan = make_plan().excluding([3, 4], 7).excluding([9], 12)
        cursor = Cursor.from_json(json.loads(json.dumps(Cursor.at(plan, 20).to_json())))
        again = make_plan().with_exclusions(cursor.exclusions)
        assert again.digest == plan.digest and cursor.step(again) == 20
        assert references(again.step(20)) == references(plan.step(20))
        with pytest.raises(JobError, match="the cursor belongs to plan"):
            cursor.step(make_plan())
        with pytest.raises(JobError, match="the cursor belongs to plan"):
            cursor.step(make_plan(lanes=3).with_exclusions(cursor.exclusions))

    def test_a_run_may_exclude_more_from_where_it_stands(self) -> None:
        plan = make_plan().excluding([3], 7)
        cursor = Cursor.at(plan, 20)
        assert cursor.step(plan.excluding([8], 20)) == 20
        with pytest.raises(JobError, match="the cursor belongs to plan"):
            cursor.step(plan.excluding([8], 19))

    def test_a_cursor_from_before_there_were_exclusions(self) -> None:
        plan = make_plan()
        old = {"plan_digest": plan.digest, "position": 500}
        assert Cursor.from_json(old) == Cursor(plan.digest, 500)
        assert Cursor.from_json(old).step(make_plan()) == 500 // plan.spec.global_batch

    @pytest.mark.parametrize("exclusions", [3, [3], [[3]], [[3, [-1]]], [["a", []]], [[3, ["a"]]]])
    def test_what_is_no_list_of_exclusions(self, exclusions: object) -> None:
        with pytest.raises(JobError, match="not a cursor"):
            Cursor.from_json({"plan_digest": "x", "position": 0, "exclusions": exclusions})


@pytest.mark.parametrize("step", [4, 9])
def test_a_store_with_a_missing_shard_is_read_to_the_end(crop_store: Callable[..., CropStore], step: int) -> None:
    store = crop_store(480)
    plan = Plan.fitted(store.content_hash, Selection.all(store), 32, 0, lanes=4)
    images = store.crops(np.arange(480))
    Path(store.row_groups[len(store.row_groups) // 2].shard).unlink()
    with pytest.raises(DataError) as error:
        list(plain_batches(store.uri, plan, 0, 1, step, 40))
    groups = [group.index for group in store.row_groups if group.shard == error.value.uri]
    less = plan.excluding(groups, step)
    seen = 0
    for rank in (0, 1):
        for batch in plain_batches(store.uri, less, rank, 2, step, 40):
            rows = store.group_starts[batch.samples.row_group] + batch.samples.row
            assert np.array_equal(batch.images.numpy(), images[rows])
            seen += len(rows)
    assert groups and seen == (40 - step) * 32
