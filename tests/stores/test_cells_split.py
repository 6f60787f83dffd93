"""Splits of cells: stratified, and the paper's alternating one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import make_store
from scipy.sparse import csr_matrix
from test_cell_store import cells_of

from cosmic_ray.errors import DataError, JobError
from cosmic_ray.stores.groups import Column, group_rows
from cosmic_ray.stores.split import PARTS, MakeSplit, Split
from cosmic_ray.stores.strata import assign_stratified

NO_PAIRS = np.empty((0, 2), np.int64)
FRACTIONS = [(0.8, 0.1, 0.1), (0.5, 0.5, 0.0), (0.34, 0.33, 0.33), (0.0, 0.25, 0.75), (1.0, 0.0, 0.0)]


def column(key: str, values: list[str]) -> Column:
    made = Column(key)
    made.add(pa.table({key: pa.array(values, pa.string())}))
    return made


def split_of(groups: list[str], values: list[str], fractions: tuple[float, ...], seed: int) -> np.ndarray:
    """The part of each row."""
    of_row, keys = group_rows([column("group", groups)], NO_PAIRS)
    return assign_stratified(of_row, keys, column("value", values), fractions, seed)[of_row]


@settings(deadline=None, max_examples=150)
@given(
    values=st.lists(st.sampled_from("abcde"), min_size=1, max_size=120),
    fractions=st.sampled_from(FRACTIONS),
    seed=st.integers(0, 2**40),
)
def test_single_cells_are_shared_out_exactly(values, fractions, seed):
    """Each part has its share of each value, rounded up or down."""
    codes = split_of([str(i) for i in range(len(values))], values, fractions, seed)
    for value in set(values):
        here = codes[np.array(values) == value]
        for part, fraction in enumerate(fractions):
            assert abs((here == part).sum() - fraction * len(here)) < 1


@settings(deadline=None, max_examples=150)
@given(
    sizes=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 12)), min_size=1, max_size=40),
    fractions=st.sampled_from(FRACTIONS),
    seed=st.integers(0, 2**40),
)
def test_groups_of_one_value_come_as_near_as_they_can(sizes, fractions, seed):
    """No part gets more of a value than its share and the largest group of that value; groups stay whole."""
    groups = [str(g) for g, (_, size) in enumerate(sizes) for _ in range(size)]
    values = [value for value, size in sizes for _ in range(size)]
    codes = split_of(groups, values, fractions, seed)
    assert all(len(set(codes[np.array(groups) == group])) == 1 for group in set(groups))
    for value in set(values):
        here = codes[np.array(values) == value]
        largest = max(size for other, size in sizes if other == value)
        for part, fraction in enumerate(fractions):
            assert (here == part).sum() - fraction * len(here) < largest
            assert fraction or not (here == part).any()


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.tuples(st.integers(0, 8), st.sampled_from("abc")), min_size=1, max_size=60),
    seed=st.integers(0, 2**40),
    order=st.randoms(use_true_random=False),
)
def test_the_order_of_rows_does_not_matter(rows, seed, order):
    """Groups of several values, in any order of rows: the same parts, whole groups."""

    def parts(given: list[tuple[int, str]]) -> dict[int, int]:
        codes = split_of([str(group) for group, _ in given], [value for _, value in given], (0.6, 0.2, 0.2), seed)
        found: dict[int, set[int]] = {}
        for (group, _), code in zip(given, codes.tolist(), strict=True):
            found.setdefault(group, set()).add(code)
        assert all(len(of_group) == 1 for of_group in found.values())
        return {group: of_group.pop() for group, of_group in found.items()}

    shuffled = list(rows)
    order.shuffle(shuffled)
    assert parts(rows) == parts(shuffled)


def test_rare_values_come_to_all_parts_alike():
    """500 values of four cells, 80/10/10: 3.2, 0.4 and 0.4 of each; over all of them the shares hold."""
    values = [f"v{i // 4}" for i in range(2000)]
    codes = split_of([str(i) for i in range(2000)], values, (0.8, 0.1, 0.1), 3)
    assert np.abs(np.bincount(codes, minlength=3) / 2000 - [0.8, 0.1, 0.1]).max() < 0.03
    other = split_of([str(i) for i in range(2000)], values, (0.8, 0.1, 0.1), 4)
    assert 0.2 < (codes != other).mean() < 0.5


def test_batches_and_cells_together():
    """Single cells make up for what whole batches could not balance."""
    groups = [f"batch-{i // 30}" for i in range(90)] + [f"cell-{i}" for i in range(110)]
    codes = split_of(groups, ["a"] * 200, (0.5, 0.25, 0.25), 0)
    assert np.bincount(codes).tolist() == [100, 50, 50]


def test_few_large_groups_are_balanced():
    """Fifteen chips of about 45 cells of two donors each: no part gets twice, or half, of its share."""
    rng = np.random.default_rng(0)
    chips = np.repeat(np.arange(15), rng.integers(35, 55, 15))
    donors = [f"donor-{(chip + int(odd)) % 4}" for chip, odd in zip(chips, rng.random(len(chips)) < 0.5, strict=True)]
    for seed in range(5):
        shares = np.bincount(split_of([str(c) for c in chips], donors, (0.8, 0.1, 0.1), seed), minlength=3) / len(chips)
        assert 0.7 < shares[0] < 0.9 and ((shares[1:] > 0.05) & (shares[1:] < 0.2)).all()


def cells(tmp_path: Path, count: int = 60, **more: Any):
    counts = csr_matrix(np.ones((count, 3)))
    return cells_of(str(tmp_path / "cells"), counts, crops=make_store(str(tmp_path / "crops"), count, size=24), **more)


def test_a_stratified_split_of_cells(tmp_path: Path):
    kinds = ["rare" if i % 6 == 0 else "common" for i in range(60)]
    store = cells(tmp_path, perturbation=kinds)
    job = MakeSplit(store=store.uri, out=str(tmp_path / "split"), by=["cell_id"], stratify="perturbation")
    job.check()
    counts = job.run()
    assert counts["rows_by_stratum"] == {
        "common": {"train": 40, "val": 5, "test": 5},
        "rare": {"train": 8, "val": 1, "test": 1},
    }
    split = Split.open(job.out, store)
    assert np.array_equal(Split.open(job.out, store.crops).codes, split.codes) and split.flaws == []
    crops = MakeSplit(store=store.crops.uri, out=str(tmp_path / "of_crops"), stratify="plate", by=["well"])
    crops.check()
    wells = np.array(store.crops.metadata(["well"])["well"].to_pylist())
    crops.run()
    codes = Split.open(crops.out, store.crops).codes
    assert np.array_equal(Split.open(crops.out, store).codes, codes)
    with pytest.raises(DataError, match="is of another store"):
        Split.open(job.out, make_store(str(tmp_path / "another"), 60, size=24, seed=5))
    assert all(len(set(codes[wells == well])) == 1 for well in set(wells))


def test_the_paper_s_alternating_split(tmp_path: Path):
    """The odd cells of the file are img2seq's, the even ones seq2img's, and it says what is wrong with that."""
    store = cells(tmp_path)
    job = MakeSplit(store=store.uri, out=str(tmp_path / "split"), method="alternating")
    job.check()
    assert job.run()["rows"] == {"train": 30, "val": 0, "test": 30}
    split = Split.open(job.out, store.crops)
    odd = store.obs(["source_row"])["source_row"].to_numpy() % 2 == 1
    assert np.array_equal(split.codes == PARTS.index("train"), odd)
    assert len(split.flaws) == 1 and "no cell is held out of both" in split.flaws[0]
    assert job.run()["rows"]["train"] == 30


def test_splits_that_are_refused(tmp_path: Path):
    store = cells(tmp_path)
    out = str(tmp_path / "split")
    with pytest.raises(JobError, match=r"no column 'cell_line_2' \(it has cell_id") as error:
        MakeSplit(store=store.uri, out=out, by=["batch"], stratify="cell_line_2").check()
    assert error.value.key == "stratify"
    with pytest.raises(JobError, match="the paper's split is of cells"):
        MakeSplit(store=store.crops.uri, out=out, method="alternating").check()
    for keys in ({"by": ["batch"]}, {"stratify": "donor"}, {"fractions": {"train": 1, "val": 0, "test": 0}}):
        with pytest.raises(ValueError, match="alternating takes neither"):
            MakeSplit(store=store.uri, out=out, method="alternating", **keys)
