"""The plan as a function: exactly once, for any ranks, from any step, with the reads that its steps need."""

from __future__ import annotations

import hashlib
import pickle
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning import contribution, plans, references, selections, windows_needed

from cosmic_ray.errors import JobError
from cosmic_ray.ingest.lanes import deal, fit_lanes, lane_rows
from cosmic_ray.ingest.permutation import permutation
from cosmic_ray.ingest.plan import Plan, PlanSpec, Samples
from cosmic_ray.ingest.selection import Selection


def digest(samples: list[Samples]) -> str:
    total = hashlib.sha256()
    for arrays in samples:
        for array in arrays:
            total.update(array.astype("<i8").tobytes())
    return total.hexdigest()


def make_plan(batch: int = 100, groups: int = 64, rows: int = 32, **options) -> Plan:
    return Plan.fitted("hash", Selection(np.full(groups, rows)), batch, options.pop("seed", 3), **options)


class TestExactlyOnce:
    @settings(max_examples=150, deadline=None)
    @given(plans())
    def test_an_epoch_holds_what_the_selection_gives_to_it(self, plan: Plan) -> None:
        steps = [plan.step(k) for k in range(plan.steps(3))]
        assert all(len(samples.row) == plan.spec.global_batch for samples in steps)
        together = Samples(*(np.concatenate(arrays) for arrays in zip(*steps, strict=True)))
        assert together.position.tolist() == list(range(len(steps) * plan.spec.global_batch))
        for epoch in range(3):
            everything = contribution(plan.selection, epoch)
            drawn = Counter(references(Samples(*(array[together.epoch == epoch] for array in together))))
            if plan.spec.remainder == "carry":
                assert drawn == everything
            else:
                assert drawn.total() == plan.steps_per_epoch * plan.spec.global_batch
                assert drawn <= everything

    @settings(max_examples=30, deadline=None)
    @given(selections())
    def test_without_a_mixing_that_is_every_selected_row_once(self, selection: Selection) -> None:
        mask, starts = selection.mask(), np.cumsum([0, *selection.sizes])
        for epoch in (0, 7):
            drawn = contribution(selection, epoch)
            assert set(drawn.values()) == {1}
            assert sorted(starts[g] + row for g, row in drawn) == np.flatnonzero(mask).tolist()

    @settings(max_examples=100, deadline=None)
    @given(plans(), st.integers(0, 50))
    def test_any_ranks_together_are_the_global_batch(self, plan: Plan, k: int) -> None:
        whole = plan.step(k)
        for world in range(1, plan.spec.lanes + 1):
            parts = [plan.rank_step(k, plan.lanes_of(rank, world)) for rank in range(world)]
            for ours, together in zip(whole, zip(*parts, strict=True), strict=True):
                assert np.array_equal(ours, np.concatenate(together))
            for rank, part in enumerate(parts):
                lanes = plan.lanes_of(rank, world)
                assert part.position.tolist() == list(plan.positions(k, lanes))
                assert len(part.row) <= plan.largest_slice(lanes)

    @settings(max_examples=60, deadline=None)
    @given(plans(), st.integers(0, 40))
    def test_any_step_is_found_without_the_steps_before(self, plan: Plan, k: int) -> None:
        walked = [plan.step(step) for step in range(k + 3)][k:]
        copy = pickle.loads(pickle.dumps(plan))
        assert copy.digest == plan.digest
        assert digest([copy.step(step) for step in (k, k + 1, k + 2)]) == digest(walked)

    @settings(max_examples=100, deadline=None)
    @given(plans())
    def test_a_lane_keeps_to_its_share(self, plan: Plan) -> None:
        drawn = np.zeros(plan.spec.lanes)
        share = np.array(lane_rows(plan._lanes, plan.selection.counts_in(0))) / plan.epoch_samples
        # With a mixing, a lane may have less than one row for every batch of some epoch.
        most = 1 if share.min() * plan.spec.global_batch >= 1 else plan.spec.lanes
        for k in range(plan.steps_per_epoch):
            samples = plan.step(k)
            drawn += np.bincount(samples.lane[samples.epoch == 0], minlength=plan.spec.lanes)
            count = min((k + 1) * plan.spec.global_batch, plan.epoch_samples)
            assert np.abs(drawn - count * share).max() < most
            assert np.all(np.diff(samples.lane) >= 0)


class TestReads:
    @settings(max_examples=150, deadline=None)
    @given(plans(), st.data())
    def test_reads_are_what_the_steps_need_in_that_order(self, plan: Plan, data: st.DataObject) -> None:
        world = data.draw(st.integers(1, plan.spec.lanes))
        lanes = plan.lanes_of(data.draw(st.integers(0, world - 1)), world)
        first = data.draw(st.integers(0, plan.steps(2)))
        last = first + data.draw(st.integers(0, plan.steps(2)))
        reads = list(plan.reads(lanes, first, last))
        assert [read.first_step for read in reads] == sorted(read.first_step for read in reads)
        opened = {read[:3]: (read.first_step, min(read.last_step, last - 1)) for read in reads}
        assert opened == windows_needed(plan, lanes, first, last) and len(opened) == len(reads)
        for read in reads:
            rows = plan.window_rows(*read[:3])
            assert set(rows[0].tolist()) == set(read.row_groups)
            assert rows.shape[1] <= plan.largest_window(lanes)
            assert rows.shape[1] == plan.selection.counts_in(read.epoch)[list(read.row_groups)].sum()

    @pytest.mark.parametrize("world", [1, 4, 8])
    def test_bytes_read_are_bytes_used(self, world: int) -> None:
        """Over two epochs of a store of 320 row groups the ranks together read 1.1 times what they use, or less."""
        plan = make_plan(batch=256, groups=320, rows=512)
        steps = plan.steps(2)
        read = 0
        for rank in range(world):
            lanes = plan.lanes_of(rank, world)
            read += sum(512 * len(window.row_groups) for window in plan.reads(lanes, 0, steps))
        assert read <= 1.1 * steps * 256

    def test_open_windows_are_bounded_and_stated(self) -> None:
        plan = make_plan(batch=64, groups=256, rows=32, lanes=8, window=4)
        lanes, steps = range(8), plan.steps(3)
        reads = list(plan.reads(lanes, 0, steps))
        most = max(
            sum(32 * len(read.row_groups) for read in reads if read.first_step <= k <= read.last_step)
            for k in range(steps)
        )
        assert most == plan.open_rows(lanes) <= 8 * 2 * 4 * 32

    def test_lanes_do_not_all_turn_to_their_next_window_at_once(self) -> None:
        plan = make_plan(batch=64, groups=256, rows=32, lanes=8, window=4)
        steps = [read.first_step for read in plan.reads(range(8), 1, plan.steps_per_epoch)]
        inner = np.bincount(steps)[2:]
        assert inner.max() <= 3


class TestLanes:
    @settings(max_examples=100, deadline=None)
    @given(selections(), st.data())
    def test_fitted_lanes_work_and_one_more_does_not(self, selection: Selection, data: st.DataObject) -> None:
        total = int(selection.counts.sum())
        batch = data.draw(st.integers(1, total))
        fitted = fit_lanes(selection.counts, batch, 5)
        assert fitted == Plan.fitted("hash", selection, batch, 5).spec.lanes
        if fitted < 16:
            spec = PlanSpec("hash", selection.digest, fitted + 1, 4, batch, 5)
            with pytest.raises(JobError, match="lanes"):
                Plan(spec, selection)

    @settings(max_examples=50, deadline=None)
    @given(selections(), st.integers(1, 6))
    def test_dealing_leaves_no_group_out_and_balances(self, selection: Selection, lanes: int) -> None:
        dealt = deal(selection.counts, lanes, 1)
        assert sorted(np.concatenate(dealt).tolist()) == np.flatnonzero(selection.counts).tolist()
        rows = lane_rows(dealt, selection.counts)
        assert max(rows) - min(rows) <= selection.counts.max()

    def test_ranks_hold_whole_lanes(self) -> None:
        plan = make_plan(lanes=7)
        for world in range(1, 8):
            owned = [plan.lanes_of(rank, world) for rank in range(world)]
            assert [lane for lanes in owned for lane in lanes] == list(range(7))
            assert {len(lanes) for lanes in owned} <= {7 // world, -(-7 // world)}
        with pytest.raises(JobError, match=r"scaling\.workers = 8: the plan has 7 lanes"):
            plan.lanes_of(0, 8)


class TestSelection:
    @settings(max_examples=60, deadline=None)
    @given(selections())
    def test_mask_and_rows_agree(self, selection: Selection) -> None:
        mask, starts = selection.mask(), np.cumsum([0, *selection.sizes])
        rows = [starts[g] + row for g, row in contribution(selection, 0)]
        assert np.flatnonzero(mask).tolist() == rows
        assert [len(selection.rows(g)) for g in range(len(selection.sizes))] == selection.counts.tolist()
        assert Selection(selection.sizes, mask).digest == selection.digest

    def test_digest_tells_rows_and_row_groups_apart(self) -> None:
        mask = np.ones(12, bool)
        whole = Selection(np.array([6, 6]))
        assert Selection(np.array([6, 6]), mask).digest == whole.digest  # all, said in two ways
        assert Selection(np.array([4, 8])).digest != whole.digest
        mask[3] = False
        assert Selection(np.array([6, 6]), mask).digest != whole.digest

    def test_a_row_group_can_be_left_out(self) -> None:
        less = Selection(np.array([5, 6, 7])).without([1])
        assert less.counts.tolist() == [5, 0, 7]
        assert {g for g, _ in contribution(less, 0)} == {0, 2}
        assert {int(g) for k in range(4) for g in Plan.fitted("hash", less, 3, 0).step(k).row_group} == {0, 2}


class TestRefusals:
    def test_what_cannot_be_planned(self) -> None:
        selection = Selection(np.array([4, 4]))
        with pytest.raises(JobError, match="global_batch = 9: not between 1 and the 8 selected crops"):
            Plan.fitted("hash", selection, 9, 0)
        with pytest.raises(JobError, match="no crop is selected"):
            Plan.fitted("hash", Selection(np.array([4, 4]), np.zeros(8, bool)), 1, 0)
        for change in ({"lanes": 0}, {"lanes": 3}, {"window": 0}, {"remainder": "pad"}, {"version": 2}):
            fields = {"lanes": 2, "window": 4, "global_batch": 4, "seed": 0, **change}
            with pytest.raises(JobError, match=next(iter(change)).replace("version", "plan")):
                Plan(PlanSpec("hash", selection.digest, **fields), selection)

    def test_a_spec_of_other_rows(self) -> None:
        spec = make_plan().spec
        with pytest.raises(JobError, match="rows selected"):
            Plan(spec, Selection(np.array([100, 100])))


class TestOrder:
    def test_the_order_of_version_1_does_not_change(self) -> None:
        """These digests hold for ever; another order is another version."""
        mask = np.arange(64 * 32) % 7 != 0
        selection = Selection(np.full(64, 32), mask)
        carry = Plan.fitted("hash", selection, 100, 3, lanes=8, window=3)
        drop = Plan.fitted("hash", selection, 100, 3, lanes=8, window=3, remainder="drop")
        assert digest([carry.step(k) for k in range(40)]) == CARRY
        assert digest([drop.step(k) for k in range(40)]) == DROP

    def test_the_digest_of_a_spec_does_not_change(self) -> None:
        assert PlanSpec("hash", "rows", 16, 4, 256, 1).digest == SPEC

    def test_permutations(self) -> None:
        for size in (0, 1, 2, 3, 64, 1000):
            order = permutation(size, -5, 1, (1, 2, 3))
            assert order.dtype == np.int64 and sorted(order.tolist()) == list(range(size))
        drawn = {
            tuple(permutation(12, seed, purpose, (w, 0, 2**40)))
            for seed in (-1, 1)
            for purpose in (0, 1)
            for w in (0, 1)
        }
        assert len(drawn) == 8
        counts = np.zeros((5, 5))
        for where in range(5000):
            counts[np.arange(5), permutation(5, 0, 0, (where, 0, 0))] += 1
        assert ((counts - 1000) ** 2 / 1000).sum() < 16 + 5 * np.sqrt(2 * 16)  # chi squared with 16 degrees of freedom

    def test_epochs_and_seeds_differ(self) -> None:
        plan, other = make_plan(batch=64), make_plan(batch=64, seed=4)
        first, second = plan.step(0), plan.step(plan.steps_per_epoch)
        assert set(second.epoch.tolist()) == {1}
        expected = 64 * 64 / plan.total_rows  # rows that two random batches share
        for drawn in (second, other.step(0)):
            assert len(set(references(first)) & set(references(drawn))) < 5 * expected + 5


def test_full_scale_opens_in_little_memory() -> None:
    """21.8 M rows, four fifths of them selected: 100 MB to open the plan and answer any step."""
    counts = np.full(21_300, 1024)
    mask = np.random.default_rng(0).integers(0, 5, counts.sum(), dtype=np.uint8) > 0
    tracemalloc.start()
    plan = Plan.fitted("hash", Selection(counts, mask), 256, 1)
    samples = [plan.step(k) for k in (0, 17, 68_000, 68_161, 10_000_000)]
    reads = [next(plan.reads(range(16), k, 20_000_000)) for k in (0, 68_161, 10_000_000)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6
    assert all(len(batch.row) == 256 for batch in samples) and all(read.row_groups for read in reads)


CARRY = "5332c27a4002d72262300b12661529abd18d43fedf997abd31a4075c36323cbf"
DROP = "8d905022159729c705e416744433bd1d5236235b851292c8d60507dc7c9b5b1f"
SPEC = "7ee1e82f01922be3d89f4710d7d8af0d0b9e8b47568200d49194ee6c73577bf3"
