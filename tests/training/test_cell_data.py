"""Cells as the loop's data: every tensor is of the cell that the plan names, on any ranks, from any step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from making import make_store
from making_cell_stores import cells_of
from scipy.sparse import csr_matrix

from cosmic_ray.errors import DataError
from cosmic_ray.ingest.plan import Plan
from cosmic_ray.ingest.selection import Selection
from cosmic_ray.ingest.stream import plain_batches
from cosmic_ray.stores.cells import CellStore
from cosmic_ray.training.cell_data import CellData, OpenCounts, order_hash

CELLS, GENES, BATCH = 150, 11, 13


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CellStore:
    folder = tmp_path_factory.mktemp("cells")
    counts = csr_matrix(np.random.default_rng(1).poisson(0.7, (CELLS, GENES)))
    return cells_of(str(folder / "cells"), counts, crops=make_store(str(folder / "crops"), CELLS))


def plan_of(store: CellStore, images: bool, **options: int) -> Plan:
    mask = np.arange(len(store)) % 5 != 0
    return Plan.fitted(
        order_hash(store, images),
        Selection(store.rows_per_group, mask),
        BATCH,
        3,
        **{"lanes": 4, "window": 2} | options,
    )


TABLES = {
    "condition": np.random.default_rng(2).normal(size=(CELLS, 3)).astype(np.float32),
    "tokens": np.random.default_rng(3).normal(size=(CELLS, 2, 5)).astype(np.float16),
}
HELD_OUT = np.arange(0, CELLS, 5)


def data_of(store: CellStore, images: bool = True, rank: int = 0, world: int = 1, **options) -> CellData:
    stream = plain_batches if images else None
    return CellData(store, plan_of(store, images), HELD_OUT, stream, TABLES, True, rank, world, **options)


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_tensor_is_of_the_cell_that_the_plan_names(store: CellStore, images: bool, world: int) -> None:
    plan, counts, crops = plan_of(store, images), store.counts().toarray(), store.crops.crops(np.arange(CELLS))
    ids = store.obs(["cell_id"])["cell_id"].to_pylist()
    streams = [data_of(store, images, rank, world).shares(4, 25) for rank in range(world)]
    for step in range(4, 25):
        samples = plan.step(step)
        rows = store.group_starts[samples.row_group] + samples.row
        at = 0
        for stream in streams:
            share = next(stream)
            mine = rows[at : at + len(share)]
            assert share.step == step and share.positions.tolist() == samples.position[at : at + len(share)].tolist()
            assert share.tensors.keys() == {"condition", "tokens", "counts"} | ({"images"} if images else set())
            assert share.tensors["counts"].dtype == torch.float32
            np.testing.assert_array_equal(share.tensors["counts"], counts[mine])
            for name, table in TABLES.items():
                np.testing.assert_array_equal(share.tensors[name], table[mine])
            if images:
                np.testing.assert_array_equal(share.tensors["images"], crops[mine])
            assert share.names() == [ids[row] for row in mine]
            at += len(share)
        assert at == BATCH
    assert all(next(stream, None) is None for stream in streams)


@pytest.mark.parametrize("world", [1, 3])
def test_the_held_out_cells_in_equally_many_parts(store: CellStore, world: int) -> None:
    shares = [list(data_of(store, True, rank, world, at_once=4).held_out()) for rank in range(world)]
    assert len({len(mine) for mine in shares}) == 1
    every = [share for mine in shares for share in mine]
    assert max(map(len, every)) <= 4
    assert torch.cat([share.positions for share in every]).tolist() == list(range(len(HELD_OUT)))
    found = {name: np.concatenate([share.tensors[name] for share in every]) for name in every[0].tensors}
    np.testing.assert_array_equal(found["counts"], store.counts(HELD_OUT).toarray())
    np.testing.assert_array_equal(found["images"], store.crops.crops(HELD_OUT))
    np.testing.assert_array_equal(found["tokens"], TABLES["tokens"][HELD_OUT])


def test_counts_are_read_once_and_kept_for_open_windows_only(store: CellStore, monkeypatch) -> None:
    plan = plan_of(store, False, window=1)
    lanes, read = range(plan.spec.lanes), []
    once = CellStore.read_counts
    monkeypatch.setattr(CellStore, "read_counts", lambda self, group: (read.append(group), once(self, group))[1])
    counts, most = OpenCounts(store, plan, lanes, 0, 40), 0
    for step in range(40):
        counts.of(step)
        most = max(most, counts.open_groups)
    counts.close()
    assert len(read) == sum(len(each.row_groups) for each in plan.reads(lanes, 0, 40))
    assert most <= 3 * plan.spec.lanes < len(store.rows_per_group)


def test_a_mapped_table_is_read_by_row(store: CellStore, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", TABLES["tokens"])
    tables = {"tokens": np.load(tmp_path / "tokens.npy", mmap_mode="r")}
    share = next(CellData(store, plan_of(store, False), HELD_OUT, tables=tables).shares(0, 1))
    samples = plan_of(store, False).step(0)
    rows = store.group_starts[samples.row_group] + samples.row
    np.testing.assert_array_equal(share.tensors["tokens"], TABLES["tokens"][rows])
    assert share.tensors.keys() == {"tokens"}


class TestBadInput:
    def test_cells_whose_row_is_not_finite_are_named(self, store: CellStore) -> None:
        bad = TABLES["condition"].copy()
        bad[4, 1] = np.nan
        name = store.obs(["cell_id"], np.array([4]))["cell_id"][0].as_py()
        data = CellData(store, plan_of(store, False), HELD_OUT, tables={"condition": bad})
        with pytest.raises(DataError, match=f"condition of 1 cells is not finite: {name}"):
            list(data.shares(0, 20))

    @pytest.mark.parametrize("bad", [np.zeros((CELLS - 1, 3), np.float32), np.zeros((CELLS, 3), np.int32)])
    def test_a_table_that_does_not_fit_is_refused(self, store: CellStore, bad: np.ndarray) -> None:
        with pytest.raises(DataError, match="condition must be floating"):
            CellData(store, plan_of(store, False), HELD_OUT, tables={"condition": bad})

    def test_a_plan_of_another_store_is_refused(self, store: CellStore) -> None:
        with pytest.raises(DataError, match="plan is of another store"):
            CellData(store, plan_of(store, True), HELD_OUT)
