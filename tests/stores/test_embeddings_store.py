"""Embeddings as an artefact: written in one call, read in any order, of one store and no other, damage named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from making import MakeTestStore, make_store
from making_cell_stores import cells_of
from scipy.sparse import csr_matrix

from cosmic_ray.errors import DamagedError, DataError
from cosmic_ray.output import claim
from cosmic_ray.stores import embeddings
from cosmic_ray.stores.cells import CellStore
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.embeddings import Embeddings, id_column, rows_a_part, write_embeddings

ROWS = 30


def write(out: str, store: CropStore | CellStore, values: np.ndarray, ids: pa.Array | None = None) -> Embeddings:
    table = store.obs(["cell_id"]) if isinstance(store, CellStore) else store.metadata(["crop_id"])
    ids = table[id_column(store)].combine_chunks() if ids is None else ids
    about = {"lineage": {"model": None}, "simulated": True, "job": {"kind": "test"}}
    with claim(MakeTestStore(out=out)) as target:
        write_embeddings(target.inside("made"), ids, values, store=store, **about)
    return Embeddings.open(f"{out}/made")


@pytest.fixture
def store(tmp_path) -> CellStore:
    crops = make_store(str(tmp_path / "crops"), ROWS)
    return cells_of(str(tmp_path / "cells"), csr_matrix(np.ones((ROWS, 3))), crops=crops)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tail=st.sampled_from([(1,), (5,), (3, 4)]),
    part=st.integers(1, ROWS + 3),
    rows=st.lists(st.integers(0, ROWS - 1), max_size=40),
)
def test_what_is_written_is_what_is_read_in_any_order(tmp_path_factory, tail, part, rows):
    folder = str(tmp_path_factory.mktemp("embeddings"))
    store = make_store(f"{folder}/crops", ROWS)
    kind = np.float32 if len(tail) == 1 else np.float16
    values = np.random.default_rng(0).normal(size=(ROWS, *tail)).astype(kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embeddings, "rows_a_part", lambda nbytes: part)
        found = write(folder, store, values)
    assert found.shape == tail and found.width == tail[-1] and len(found) == ROWS
    assert len(found.manifest["parts"]) == -(-ROWS // part)
    np.testing.assert_array_equal(found.vectors(), values)
    taken = found.vectors(np.array(rows, np.int64))
    np.testing.assert_array_equal(taken, values[rows])
    assert taken.dtype == kind


def test_they_are_of_one_store_and_of_its_crops(store, tmp_path):
    values = np.ones((ROWS, 2), np.float32)
    of_cells = write(str(tmp_path / "a"), store, values)
    of_crops = write(str(tmp_path / "b"), store.crops, values)
    other = make_store(str(tmp_path / "other"), ROWS, seed=1)
    for found in (of_cells, of_crops):
        found.require(store)
        found.require(store.crops)
        with pytest.raises(DataError, match=r"made of another store .*not of .*other"):
            found.require(other)
    assert of_cells.lineage["store"]["content_hash"] == store.content_hash
    assert of_crops.lineage["store"] == {"uri": store.crops.uri, "content_hash": store.crops.content_hash}
    bare = cells_of(str(tmp_path / "bare"), csr_matrix(np.ones((ROWS, 3))))
    with pytest.raises(DataError, match="made of another store"):
        of_cells.require(bare)


def test_the_hash_is_of_ids_and_numbers(store, tmp_path):
    values = np.random.default_rng(0).normal(size=(ROWS, 4)).astype(np.float32)
    hashes = {write(str(tmp_path / name), store, values).content_hash for name in "ab"}
    assert len(hashes) == 1
    changed = values.copy()
    changed[7, 2] += 1e-6
    hashes.add(write(str(tmp_path / "c"), store, changed).content_hash)
    ids = pa.array([f"id-{row}" for row in range(ROWS)])
    hashes.add(write(str(tmp_path / "d"), store, values, ids).content_hash)
    assert len(hashes) == 3


def test_writing_again_leaves_nothing_of_what_was_there(store, tmp_path):
    wide = np.ones((ROWS, 2), np.float32)
    write(str(tmp_path / "a"), store, wide)
    Path(tmp_path, "a", "made", "part-00009.parquet").write_bytes(b"of a longer run")
    found = write(str(tmp_path / "a"), store, 2 * wide)
    np.testing.assert_array_equal(found.vectors(), 2 * wide)
    assert not Path(tmp_path, "a", "made", "part-00009.parquet").exists()


def test_bad_numbers_and_damage_are_named(store, tmp_path):
    values = np.ones((ROWS, 2), np.float32)
    with pytest.raises(ValueError, match="29 embeddings and 30 ids of a store with 30 rows"):
        write(str(tmp_path / "a"), store, values[1:])
    for bad in (np.nan, np.inf):
        spoilt = values.copy()
        spoilt[4, 1] = bad
        with pytest.raises(ValueError, match="row 4 is not finite"):
            write(str(tmp_path / "b"), store, spoilt)
    assert not Path(tmp_path, "b", "made", "manifest.json").exists()
    found = write(str(tmp_path / "c"), store, values)
    with pytest.raises(IndexError, match=r"rows 0\.\.30 of 30"):
        found.vectors(np.array([0, ROWS]))
    part = Path(tmp_path, "c", "made", "part-00000.parquet")
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedError, match=r"part-00000\.parquet: its bytes"):
        found.vectors()
    with pytest.raises(DataError, match="not embeddings of version 1, but 'cosmic-ray/cells'"):
        Embeddings.open(store.uri)


def test_parts_are_bounded():
    assert rows_a_part(4 * 1024) == 16384
    assert rows_a_part(2 * 197 * 1024) == 665
    assert rows_a_part(2**40) == 1
