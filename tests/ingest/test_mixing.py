"""Mixing: each value has its share of every epoch to one sample, and no row waits longer than its turn."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning import contribution, mixtures, references

from cosmic_ray.config import validate
from cosmic_ray.errors import JobError
from cosmic_ray.ingest.mixing import Mixed, Mixing, mixed, quotas
from cosmic_ray.ingest.plan import Plan
from cosmic_ray.ingest.selection import Selection
from cosmic_ray.ingest.stream import plain_batches
from cosmic_ray.stores.crops import CropStore


def of_values(mixture: Mixed) -> tuple[dict[tuple[int, int], int], dict[int, int], list[int]]:
    """The value of each selected row; the rows of each value; the samples of each value in an epoch."""
    starts, mask = np.cumsum([0, *mixture.sizes]), mixture.mask()
    value = {
        (g, row): int(mixture._codes[starts[g] + row])
        for g in range(len(mixture.sizes))
        for row in range(mixture.sizes[g])
        if mask[starts[g] + row]
    }
    return value, Counter(value.values()), quotas(mixture._weights, mixture.total)


class TestShares:
    @given(st.dictionaries(st.text(), st.floats(1e-6, 1e6), min_size=1, max_size=20), st.integers(1, 2**31 - 1))
    def test_quotas_are_the_shares_to_one_sample(self, weights: dict[str, float], total: int) -> None:
        found = quotas(weights, total)
        exact = total * np.array(list(weights.values())) / sum(weights.values())
        assert sum(found) == total
        assert np.abs(np.array(found) - exact).max() < 1 + 1e-6

    def test_known_quotas(self) -> None:
        assert quotas({"HeLa": 1, "U2OS": 2}, 300) == [100, 200]
        assert quotas({"a": 1, "b": 1, "c": 1}, 100) == [34, 33, 33]
        assert quotas({"a": 0.25, "b": 0.5}, 10) == [3, 7]

    @settings(max_examples=150, deadline=None)
    @given(mixtures(), st.integers(0, 2**40))
    def test_every_epoch_holds_exactly_each_values_share(self, mixture: Mixed, epoch: int) -> None:
        value, rows, samples = of_values(mixture)
        drawn = contribution(mixture, epoch)
        found = Counter()
        for row, times in drawn.items():
            found[value[row]] += times
        assert [found[v] for v in range(len(samples))] == samples and drawn.total() == mixture.total
        for row, v in value.items():
            assert samples[v] // rows[v] <= drawn[row] <= -(-samples[v] // rows[v])
        counts = [sum(times for (g, _), times in drawn.items() if g == group) for group in range(len(mixture.sizes))]
        assert mixture.counts_in(epoch).tolist() == counts
        assert (mixture.counts >= counts).all()
        assert np.flatnonzero(mixture.counts).tolist() == sorted({g for g, _ in value})

    @settings(max_examples=80, deadline=None)
    @given(mixtures(), st.integers(0, 1000), st.integers(1, 12))
    def test_over_epochs_every_row_has_its_turn(self, mixture: Mixed, first: int, epochs: int) -> None:
        value, rows, samples = of_values(mixture)
        drawn = sum((contribution(mixture, epoch) for epoch in range(first, first + epochs)), Counter())
        for row, v in value.items():
            assert epochs * samples[v] // rows[v] <= drawn[row] <= -(-epochs * samples[v] // rows[v])

    def test_all_rows_of_a_down_weighted_value_come_before_one_comes_again(self) -> None:
        codes = (np.arange(2000) % 4 == 0).astype(np.uint8)
        mixture = Mixed(np.full(40, 50), None, codes, {"many": 1, "few": 4}, 750, 3)  # "few" < "many"
        few = [row for row, v in of_values(mixture)[0].items() if v == 0]
        assert len(few) == 1500 and quotas(mixture._weights, 750) == [600, 150]
        epochs = [contribution(mixture, epoch) for epoch in range(5)]
        assert {max(epoch[row] for row in few) for epoch in epochs} == {1}
        assert all(sum(epoch[row] for epoch in epochs) == 2 for row in few)
        early = Counter(sum(epoch[row] for epoch in epochs[:3]) for row in few)
        assert set(early) == {1, 2}

    def test_seeds_choose_other_rows(self) -> None:
        codes = np.zeros(400, np.uint8)
        drawn = [set(contribution(Mixed(np.full(8, 50), None, codes, {"a": 1}, 100, seed), 0)) for seed in (0, 1)]
        assert 5 < len(drawn[0] & drawn[1]) < 50  # 25 of chance


class TestPlans:
    """`test_plan` draws mixtures, too: any rank, any step, reads. Here is what only a mixing has."""

    def make(self, **options) -> Plan:
        codes = np.random.default_rng(0).choice(3, 64 * 32, p=[0.9, 0.09, 0.01]).astype(np.uint8)
        weights = options.pop("weights", {"common": 2, "more": 1, "rare": 1})
        mixture = Mixed(np.full(64, 32), None, codes, weights, options.pop("total", 64 * 32), 3)
        return Plan.fitted("hash", mixture, 64, 3, **options)

    def test_a_recurring_crop_has_another_position_each_time(self) -> None:
        plan = self.make()
        drawn = [plan.step(k) for k in range(plan.steps_per_epoch)]
        positions = np.concatenate([samples.position for samples in drawn])
        rows = [row for samples in drawn for row in references(samples)]
        assert len(np.unique(positions)) == len(rows) > 2 * len(set(rows)) - 64 * 32
        assert max(Counter(rows).values()) > 10

    def test_batches_have_the_shares_on_average_and_no_batch_is_far_off(self) -> None:
        plan = self.make(lanes=8, weights={"common": 2, "more": 1, "rare": 1})
        codes, starts = plan.selection._codes, np.arange(64) * 32
        steps = plan.steps(20)
        found = [codes[starts[s.row_group] + s.row] for s in map(plan.step, range(steps))]
        counts = np.array([np.bincount(values, minlength=3) for values in found])
        assert counts.sum(axis=0).tolist() == [20 * 1024, 20 * 512, 20 * 512]
        # A rare value's recurrences lie together, so batches differ more than those of independent draws would.
        assert np.abs(counts[:, 0] - 32).mean() < 3 * np.sqrt(64 * 0.25)

    @pytest.mark.parametrize("world", [1, 4, 8])
    def test_bytes_read_are_bytes_used(self, world: int) -> None:
        plan = self.make(lanes=16, window=1)
        steps = plan.steps(4)
        reads = [read for rank in range(world) for read in plan.reads(plan.lanes_of(rank, world), 0, steps)]
        assert sum(32 * len(read.row_groups) for read in reads) <= 1.1 * steps * 64

    def test_the_digest_tells_mixings_apart(self) -> None:
        plain = Plan.fitted("hash", Selection(np.full(64, 32)), 64, 3)
        same = self.make(weights={"common": 4, "more": 2, "rare": 2})
        assert self.make().digest == same.digest
        others = [self.make(weights={"common": 3, "more": 1, "rare": 1}), self.make(total=2000), plain]
        assert len({self.make().digest, *(plan.digest for plan in others)}) == 4
        with pytest.raises(JobError, match="mixing"):
            Plan(self.make().spec, plain.selection)

    def test_an_epoch_shorter_than_a_batch_is_refused(self) -> None:
        with pytest.raises(JobError, match=r"mixing\.epoch = 40: less than a global batch of 64"):
            self.make(total=40)

    def test_the_rows_of_an_epoch_do_not_change(self) -> None:
        """As the order of version 1: for ever."""
        plan = self.make()
        rows = [plan.selection.rows(group, epoch) for group in range(64) for epoch in (0, 1, 9)]
        assert hashlib.sha256(np.concatenate(rows).astype("<i8").tobytes()).hexdigest() == ROWS


class TestStore:
    @pytest.fixture
    def store(self, crop_store: Callable[..., CropStore]) -> CropStore:
        return crop_store(120)

    def test_shares_of_a_column(self, store: CropStore) -> None:
        lines = np.array(store.metadata(["cell_line"])["cell_line"].to_pylist())
        values = sorted(set(lines.tolist()))
        weights = {value: 1.0 + index for index, value in enumerate(values)}
        half = Selection(store.rows_per_group, np.arange(120) >= 60)
        mixture = mixed(store, half, Mixing(column="cell_line", weights=weights, epoch=100), 0)
        plan = Plan.fitted(store.content_hash, mixture, 10, 0)
        drawn = np.concatenate([store.group_starts[s.row_group] + s.row for s in map(plan.step, range(10))])
        assert drawn.min() >= 60
        found = Counter(lines[drawn].tolist())
        assert [found[value] for value in values] == quotas(weights, 100)
        assert mixed(store, half, Mixing(column="cell_line", weights=weights), 0).total == 60

    @pytest.mark.parametrize("world", [1, 3])
    def test_the_stream_repeats_crops_as_the_plan_does(self, store: CropStore, world: int) -> None:
        lines = sorted(set(store.metadata(["cell_line"])["cell_line"].to_pylist()))
        weights = dict(zip(lines, [9.0, *[1.0] * (len(lines) - 1)], strict=True))
        mixture = mixed(store, Selection.all(store), Mixing(column="cell_line", weights=weights), 0)
        plan, images = Plan.fitted(store.content_hash, mixture, 16, 0, lanes=4), store.crops(np.arange(120))
        drawn: Counter[int] = Counter()
        for rank in range(world):
            for batch in plain_batches(store.uri, plan, rank, world, 0, 15):
                rows = store.group_starts[batch.samples.row_group] + batch.samples.row
                assert np.array_equal(batch.images.numpy(), images[rows])
                drawn.update(rows.tolist())
        assert drawn.total() == 15 * 16 and max(drawn.values()) > 2

    @pytest.mark.parametrize(
        ("tree", "message"),
        [
            (
                {"column": "cellline", "weights": {"HeLa": 1}},
                r"mixing\.column = 'cellline': .*did you mean 'cell_line'",
            ),
            ({"column": "area_px", "weights": {"1": 1}}, r"mixing\.column = 'area_px': a column of int32 .*text"),
            ({"column": "crop_id", "weights": {"1": 1}}, r"mixing\.weights\.1 = 1\.0: no selected crop"),
            ({"column": "cell_line", "weights": {"HeLA": 1}}, r"mixing\.weights\.HeLA = 1\.0: .*did you mean 'HeLa'"),
            ({"column": "cell_line", "weights": {"HeLa": 1}}, r"mixing\.weights = .*no weight for .*with where"),
        ],
    )
    def test_what_cannot_be_meant(self, store: CropStore, tree: dict, message: str) -> None:
        with pytest.raises(JobError, match=message) as refusal:
            mixed(store, Selection.all(store), Mixing(**tree), 0)
        assert refusal.value.exit_code == 2

    @pytest.mark.parametrize(
        ("tree", "key"),
        [
            ({"column": "source", "weights": {"a": 0}}, "mixing.weights.a"),
            ({"column": "source", "weights": {}}, "mixing.weights"),
            ({"column": "source", "weights": {"a": float("inf")}}, "mixing.weights.a"),
            ({"column": "source", "weights": {"a": 1}, "epoch": 0}, "mixing.epoch"),
        ],
    )
    def test_keys_are_checked(self, tree: dict, key: str) -> None:
        with pytest.raises(JobError) as refusal:
            validate(Mixing, tree, "mixing")
        assert refusal.value.key == key


ROWS = "4c5dcb7e4419adb466288cbb3a113e646f337d07be9fa7421c470de9ae855090"
