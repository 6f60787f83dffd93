"""Cell stores: what is written is what is read, for any cells; the content hash is of content; damage never passes."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from making import MakeTestStore, make_store
from making_cell_stores import cells_of, genes_of, table_of
from scipy.sparse import csr_matrix

import cosmic_ray
from cosmic_ray import cli, output, storage
from cosmic_ray.errors import DataError
from cosmic_ray.output import claim
from cosmic_ray.stores.cells import CellStore, open_store
from cosmic_ray.stores.cells_verify import verify_published
from cosmic_ray.stores.cells_writer import finished_part, publish_cells, write_part
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.manifest import self_digest

KNOWN_HASH = "cee5335d0dee73ecd74a1c29151006dd1f1c2c4596b07518bc877fda2ffe41fa"
"""Of `cells_of(20 cells, 7 genes)` without images, as the first version of the format computed it."""


@pytest.fixture
def cell_store(tmp_path: Path) -> Callable[..., CellStore]:
    def make(cells: int = 20, genes: int = 7, images: bool = True, out: str | None = None, **options: Any) -> CellStore:
        counts = np.random.default_rng(1).poisson(0.7, (cells, genes))
        crops = make_store(str(tmp_path / f"crops-{cells}"), cells) if images else None
        return cells_of(out or str(tmp_path / f"cells-{images}"), csr_matrix(counts), crops=crops, **options)

    return make


@st.composite
def matrices(draw: st.DrawFn) -> tuple[csr_matrix, str]:
    """Any counts or soft values: empty cells, empty genes, unsorted or doubled entries, stored zeros."""
    rows, genes = draw(st.integers(1, 30)), draw(st.integers(1, 12))
    values = draw(st.sampled_from(["raw", "soft"]))
    number = st.integers(0, 2**30) if values == "raw" else st.floats(0, 2.0**100, width=32)
    entry = st.tuples(st.integers(0, rows - 1), st.integers(0, genes - 1), number)
    entries = draw(st.lists(entry, max_size=60, unique_by=lambda one: one[:2]))
    row, gene, data = zip(*entries, strict=True) if entries else ((), (), ())
    dtype = np.float64 if values == "soft" or draw(st.booleans()) else np.int64
    order = np.argsort(row, kind="stable")
    indptr = np.concatenate([[0], np.cumsum(np.bincount(np.array(row, int), minlength=rows))])
    return csr_matrix((np.array(data, dtype)[order], np.array(gene, int)[order], indptr), shape=(rows, genes)), values


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made=matrices(), rows_per_group=st.integers(1, 12), data=st.data())
def test_what_is_written_is_what_is_read(tmp_path_factory, made, rows_per_group, data):
    counts, values = made
    rows = counts.shape[0]
    number = st.floats(width=64) | st.just(float("nan"))
    more = {
        "text": data.draw(st.lists(st.text(max_size=5), min_size=rows, max_size=rows)),
        "a.b": np.array(data.draw(st.lists(number, min_size=rows, max_size=rows)), np.float64),
        "whole": np.array(
            data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=rows, max_size=rows)), np.int64
        ),
        "truth": np.array(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows))),
    }
    out = str(tmp_path_factory.mktemp("cells"))
    store = cells_of(out, counts, rows_per_group, values, **more)
    dense = counts.toarray()
    read = store.counts()
    assert read.dtype == (np.int32 if values == "raw" else np.float32) and read.has_canonical_format
    assert np.array_equal(read.toarray(), dense.astype(read.dtype)) and (read.data > 0).all()
    picked = np.array(data.draw(st.lists(st.integers(0, rows - 1), max_size=15)), np.int64)
    assert np.array_equal(store.counts(picked).toarray(), dense[picked].astype(read.dtype))
    for name, given_values in more.items():
        stored = store.obs([name], picked)[name].to_pylist()
        expected = [given_values[i] for i in picked]
        assert all(a == b or (a != a and b != b) for a, b in zip(stored, expected, strict=True))
    assert store.rows_per_group.sum() == len(store) == rows and verify_published(out) == []


def test_the_content_hash_is_of_the_content(cell_store, tmp_path: Path):
    """A known answer: stores published by an earlier version keep their hash; anything else of the content moves it."""
    plain = cell_store(images=False)
    assert plain.content_hash == KNOWN_HASH
    counts = plain.counts()
    moved = cells_of(str(tmp_path / "moved"), counts)
    assert moved.content_hash == plain.content_hash
    changed = counts.copy()
    changed.data[3] += 1
    hashes = {plain.content_hash, cell_store().content_hash}
    hashes.add(cells_of(str(tmp_path / "a"), changed).content_hash)
    hashes.add(cells_of(str(tmp_path / "b"), counts, values="soft").content_hash)
    hashes.add(cells_of(str(tmp_path / "c"), counts, extra=["x"] * 20).content_hash)
    hashes.add(cells_of(str(tmp_path / "d"), counts, extra=["y"] * 20).content_hash)
    assert len(hashes) == 6


def test_cells_and_crops_by_row(cell_store):
    store = cell_store()
    rows = np.array([17, 0, 9, 3])
    table = store.read_row_group(2, ["cell_id", "batch", "crop_id", "area_px", "image"])
    assert table["cell_id"].to_pylist() == table["crop_id"].to_pylist() == store.obs()["cell_id"].to_pylist()[16:]
    assert store.columns[0] == "cell_id" and store.columns[-1] == "image"
    assert store.read_row_group(0).column_names == store.columns
    made = store.to_anndata(rows)
    assert made.obs_names.tolist() == store.obs(["cell_id"], rows)["cell_id"].to_pylist()
    assert np.array_equal(made.X.toarray(), store.counts().toarray()[rows])
    assert made.uns["cosmic_ray"]["content_hash"] == store.content_hash and made.uns["cosmic_ray"]["simulated"]
    assert pickle.loads(pickle.dumps(store)).content_hash == store.content_hash and len(pickle.dumps(store)) < 500
    assert isinstance(open_store(store.uri), CellStore) and isinstance(open_store(store.crops.uri), CropStore)


def test_a_notebook_opens_either(cell_store: Callable[..., CellStore]) -> None:
    cells = cell_store()
    assert isinstance(cosmic_ray.open_store(cells.uri), CellStore)
    assert isinstance(cosmic_ray.open_store(cells.crops.uri), CropStore)


def test_one_kind_of_store_is_not_the_other(cell_store):
    store = cell_store()
    with pytest.raises(
        DataError, match=r"not a crop store.*the images of a cell store are the crop store in its folder"
    ):
        CropStore.open(store.uri)
    with pytest.raises(DataError, match="not a cell store: its format is 'cosmic-ray/crops'"):
        CellStore.open(store.crops.uri)


def test_rows_columns_and_genes_that_are_not_there(cell_store):
    store = cell_store()
    for rows in ([20], [-1]):
        with pytest.raises(IndexError, match="of a store with 20"):
            store.counts(np.array(rows))
    with pytest.raises(KeyError, match="no column age; it has cell_id"):
        store.obs(["age"])
    with pytest.raises(KeyError, match="no column age"):
        store.read_row_group(0, ["age"])
    assert store.columns_of(["g5", "g0"]).tolist() == [5, 0]
    with pytest.raises(DataError, match=r"2 of 3 genes are not in this store: TP53, MYC"):
        store.columns_of(["TP53", "g1", "MYC"])
    assert store.counts(np.array([], int)).shape == (0, 7)


def test_values_that_cannot_be_stored(tmp_path: Path):
    for data, values in (([1.5], "raw"), ([-1.0], "raw"), ([np.nan], "soft"), ([-0.1], "soft"), ([2.0**31], "raw")):
        with np.errstate(invalid="ignore"), pytest.raises(ValueError, match=f"{values} values are"):
            write_part(str(tmp_path), 0, ["a"], csr_matrix(np.array([data])), values)
    with pytest.raises(ValueError, match="2 rows of expression for 1 cells"):
        write_part(str(tmp_path), 0, ["a"], csr_matrix(np.ones((2, 1))), "raw")
    part = write_part(str(tmp_path), 3, ["a"], csr_matrix(np.ones((1, 1))), "raw")
    assert finished_part(str(tmp_path), 3) == part and finished_part(str(tmp_path), 2) is None
    (tmp_path / "expression/part-00003.parquet").write_bytes(b"short")
    assert finished_part(str(tmp_path), 3) is None


@pytest.mark.parametrize(
    "change,problem",
    [
        (lambda cells, genes, parts: (cells, genes, parts[:-1]), "do not make 20 cells"),
        (lambda cells, genes, parts: (cells, genes, [parts[2], *parts[:2]]), "do not make 20 cells in even"),
        (lambda cells, genes, parts: (table_of(["a"] * 20), genes, parts), "a cell_id stands twice"),
        (
            lambda cells, genes, parts: (cells, pa.table({"gene_id": ["g", "g"], "symbol": ["", ""]}), parts),
            "a gene_id",
        ),
        (lambda cells, genes, parts: (cells.drop_columns(["batch"]), genes, parts), "cells need the columns cell_id"),
        (lambda cells, genes, parts: (table_of(ids_20(), x=[None] + ["a"] * 19), genes, parts), "nulls in x"),
        (lambda cells, genes, parts: (table_of(ids_20(), x=pa.array([1] * 20, pa.int8())), genes, parts), "of string"),
    ],
)
def test_parts_that_make_no_store(tmp_path: Path, change: Any, problem: str):
    out, counts = str(tmp_path), csr_matrix(np.ones((20, 2)))
    parts = [write_part(out, i, ids_20()[at : at + 8], counts[at : at + 8], "raw") for i, at in enumerate((0, 8, 16))]
    cells, genes, parts = change(table_of(ids_20()), genes_of(2), parts)
    keys = {"values": "raw", "crops": None, "statistics": {}, "lineage": {}, "job": {}, "simulated": False}
    with claim(MakeTestStore(out=out)) as target, pytest.raises(DataError, match=problem):
        publish_cells(target, cells, genes, parts, **keys)
    assert not (tmp_path / "manifest.json").exists()


def ids_20() -> list[str]:
    return [f"c{i}" for i in range(20)]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> tuple[str, dict[str, bytes]]:
    """A store, and the bytes of all its files that are read (not the entries for builds that resume)."""
    out = str(tmp_path_factory.mktemp("damaged") / "cells")
    crops = make_store(str(tmp_path_factory.mktemp("crops")), 20, size=8)
    store = cells_of(out, csr_matrix(np.random.default_rng(0).poisson(1, (20, 5))), crops=crops)
    kept = [uri for uri in storage.listing(out) if uri.endswith((".parquet", "manifest.json"))]
    return store.uri, {uri: Path(uri).read_bytes() for uri in kept}


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_flipped_byte_passes(damaged, data: st.DataObject):
    """Any byte of any object of a store: verifying names that object."""
    out, contents = damaged
    uri = data.draw(st.sampled_from(sorted(contents)))
    position = data.draw(st.integers(0, len(contents[uri]) - 1))
    spoilt = bytearray(contents[uri])
    spoilt[position] ^= data.draw(st.integers(1, 255))
    Path(uri).write_bytes(spoilt)
    try:
        problems = verify_published(out)
    finally:
        Path(uri).write_bytes(contents[uri])
    assert problems and all(uri in problem or storage.name(out) in problem for problem in problems)
    assert verify_published(out) == []


def test_damage_is_named_as_it_is_read(cell_store):
    store = cell_store()
    part = Path(store.uri) / "expression/part-00001.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"part-00001\.parquet: its bytes do not match") as error:
        store.counts()
    assert error.value.uri == str(part) and store.counts(np.array([3])).shape == (1, 7)
    part.unlink()
    with pytest.raises(DataError, match=r"part-00001\.parquet: not found"):
        store.read_counts(1)
    (Path(store.uri) / "cells.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"cells\.parquet: its bytes do not match"):
        CellStore.open(store.uri).obs()


def test_manifests_that_do_not_open(cell_store):
    store = cell_store()
    at = Path(store.uri) / "manifest.json"
    good = json.loads(at.read_bytes())

    def opened(**changes: Any) -> CellStore:
        tree = {**good, **changes, "digest": ""}
        at.write_bytes(output.encode({**tree, "digest": self_digest(output.encode(tree))}))
        return CellStore.open(store.uri)

    opened()
    forged = [[*good["parts"][0][:-1], "0" * 64], *good["parts"][1:]]
    for changes, problem in (
        ({"version": 2}, "unknown version 2 of cosmic-ray/cells"),
        ({"format": "cosmic-ray/crops"}, "not a cell store: its format is 'cosmic-ray/crops'"),
        ({"parts": forged}, "content hash does not follow"),
        ({"values": "soft"}, "content hash does not follow"),
        ({"rows": "many"}, "rows: Input should be"),
    ):
        with pytest.raises(DataError, match=problem):
            opened(**changes)
    at.write_bytes(output.encode({**good, "rows": 21}))
    with pytest.raises(DataError, match="does not match its own digest"):
        CellStore.open(store.uri)


def test_the_command_line_knows_cells(cell_store, tmp_path: Path, capsys: pytest.CaptureFixture):
    store, without = cell_store(), cell_store(images=False)
    cli.show(store.uri, montage=str(tmp_path / "m.png"), as_json=True)
    about = json.loads(capsys.readouterr().out)
    assert (about["rows"], about["genes"], about["row_groups"]) == (20, 7, 3)
    assert (tmp_path / "m.png").read_bytes()[:4] == b"\x89PNG" and about["montage"] == str(tmp_path / "m.png")
    cli.show(without.uri, montage=str(tmp_path / "none.png"), as_json=True)
    assert "montage" not in json.loads(capsys.readouterr().out) and not (tmp_path / "none.png").exists()
    with pytest.raises(SystemExit, match="0"):
        cli.verify(store.uri, as_json=True)
    Path(f"{store.uri}/genes.parquet").write_bytes(b"spoilt")
    with pytest.raises(SystemExit, match="1"):
        cli.verify(store.uri, as_json=True)
    assert "genes.parquet: its bytes do not match" in capsys.readouterr().out


def test_other_crops_in_its_place_are_noticed(cell_store, tmp_path: Path):
    store = cell_store()
    other = make_store(str(tmp_path / "other"), 20, seed=9)
    for uri in storage.listing(other.uri):
        storage.write_bytes(f"{store.uri}/crops{uri.removeprefix(other.uri)}", storage.read_bytes(uri))
    with pytest.raises(DataError, match="not the crop store that was published with these cells"):
        store.crops  # noqa: B018
