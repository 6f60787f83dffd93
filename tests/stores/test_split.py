"""Splits: groups stay whole, parts depend on group keys alone, near-duplicates stay together."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import make_rows, store_of
from PIL import Image

from cosmic_ray import output
from cosmic_ray.errors import DataError, JobError
from cosmic_ray.stores.columns import image_column
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.duplicates import correlation, exact_pairs, fingerprints, similar
from cosmic_ray.stores.groups import Column, assign, group_rows
from cosmic_ray.stores.layouts import same_layouts, shared
from cosmic_ray.stores.manifest import CropSpec
from cosmic_ray.stores.split import PARTS, MakeSplit, Split

MakeStore = Callable[..., CropStore]
NO_PAIRS = np.empty((0, 2), np.int64)
KEYS = st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=40)


def column(key: str, *values: list[str], cut: int = 3) -> Column:
    """A column over `values` (one list for each name in the key), filled in pieces of `cut` rows."""
    made = Column(key)
    table = pa.table({name: pa.array(v, pa.string()) for name, v in zip(key.split("+"), values, strict=True)})
    for start in range(0, len(table), cut):
        made.add(table.slice(start, cut))
    return made


def joined_by_hand(columns: list[list[str]], pairs: list[tuple[int, int]]) -> list[frozenset[int]]:
    """The groups of rows, by closing over shared values and pairs until nothing changes."""
    groups = [{row} for row in range(len(columns[0]))]
    links = [(i, j) for values in columns for i in range(len(values)) for j in range(i) if values[i] == values[j]]
    for one, other in [*links, *pairs]:
        if groups[one] is not groups[other]:
            groups[one] |= groups[other]
            for row in groups[other]:
                groups[row] = groups[one]
    return [frozenset(group) for group in groups]


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_groups_are_the_closure_of_values_and_pairs(data: st.DataObject):
    first = data.draw(KEYS)
    rows = st.integers(0, len(first) - 1)
    second = data.draw(st.lists(st.sampled_from("abcdefghijkl"), min_size=len(first), max_size=len(first)))
    pairs = data.draw(st.lists(st.tuples(rows, rows), max_size=4))
    columns = [column("one", first), column("two", second)]
    groups, keys = group_rows(columns, np.array(pairs, np.int64).reshape(-1, 2))
    expected = joined_by_hand([first, second], pairs)
    assert [frozenset(np.flatnonzero(groups == group).tolist()) for group in groups] == expected
    assert len(keys) == groups.max() + 1
    assert list(dict.fromkeys(groups.tolist())) == list(range(len(keys)))


@settings(deadline=None, max_examples=100)
@given(values=KEYS, others=KEYS, seed=st.integers(-(2**40), 2**70), order=st.randoms(use_true_random=False))
def test_a_group_goes_where_its_key_says(values, others, seed, order):
    """Neither the order of rows nor further groups move a group; equal values go together."""

    def parts(rows: list[str]) -> dict[str, int]:
        groups, keys = group_rows([column("well", rows)], NO_PAIRS)
        codes = assign(keys, (0.5, 0.3, 0.2), seed)[groups]
        assert all(len({int(c) for c, v in zip(codes, rows, strict=True) if v == value}) == 1 for value in rows)
        return dict(zip(rows, codes.tolist(), strict=True))

    alone = parts(values)
    more = [*values, *(f"{other}-" for other in others)]
    order.shuffle(more)
    assert {value: part for value, part in parts(more).items() if value in alone} == alone


def test_a_field_is_hashed_by_what_it_is_called_wherever_it_lies():
    def by_field(root: str, wells: list[str]) -> Column:
        known = {"source": [""] * 3, "plate": ["P", "P", "Q"], "well": wells, "site": ["1"] * 3}
        made = Column("field_uri")
        made.add(pa.table({"field_uri": [f"{root}/{plate}/a.tif" for plate in "PPQ"], **known}).select(made.reads))
        return made

    here, there = by_field("/data", ["A1", "A1", "A1"]), by_field("s3://bucket/copy", ["A1", "A1", "A1"])
    assert here.codes.tolist() == there.codes.tolist() == [0, 0, 1]
    assert here.hashes().tolist() == there.hashes().tolist()
    assert len(set(here.hashes().tolist())) == 2
    assert by_field("/data", ["A1", "A2", "A1"]).hashes()[0] == by_field("/data", ["A2", "A1", "A1"]).hashes()[0]


@pytest.mark.parametrize("fractions", [(0.8, 0.1, 0.1), (0.5, 0.5, 0.0), (0.0, 0.3, 0.7), (1.0, 0.0, 0.0)])
def test_shares_come_near_the_fractions(fractions: tuple[float, ...]):
    keys = np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64)
    one, other = assign(keys, fractions, 1), assign(keys, fractions, 2)
    for part, fraction in enumerate(fractions):
        spread = np.sqrt(fraction * (1 - fraction) / len(keys))
        assert abs((one == part).mean() - fraction) <= 4 * spread
    independent = np.mean([(one == part) & (other == part) for part in range(3)], axis=1).sum()
    assert abs(independent - np.square(fractions).sum()) < 0.02


def test_two_columns_as_one_key():
    plates, wells = ["p1", "p1", "p2", "p2"], ["A1", "A1", "A1", "B2"]
    both, _ = group_rows([column("plate+well", plates, wells)], NO_PAIRS)
    either, _ = group_rows([column("plate", plates), column("well", wells)], NO_PAIRS)
    assert both.tolist() == [0, 0, 1, 2] and either.tolist() == [0, 0, 0, 0]


def test_a_split_of_a_store(crop_store: MakeStore, tmp_path: Path):
    store = crop_store(400, size=24, rows_per_group=50)
    job = MakeSplit(store=store.uri, out=str(tmp_path / "split"), seed=3)
    job.check()
    counts = job.run()
    assert job.run() == counts and counts["groups"] == 80 and sum(counts["rows"].values()) == 400
    split = Split.open(job.out, store)
    assert split.codes.dtype == np.uint8 and split.manifest["simulated"] is True
    rows = np.concatenate([split.rows(part) for part in PARTS])
    assert np.array_equal(np.sort(rows), np.arange(400))
    assert {part: len(split.rows(part)) for part in PARTS} == counts["rows"]
    fields = np.array(store.metadata(["field_uri"])["field_uri"].to_pylist())
    for field in set(fields):
        assert len(set(split.codes[fields == field])) == 1 == len(set(split.group_codes[fields == field]))
    with pytest.raises(KeyError, match="train, val, test"):
        split.rows("tset")
    again = MakeSplit(store=store.uri, out=str(tmp_path / "again"), seed=3)
    again.run()
    assert Split.open(again.out, store).content_hash == split.content_hash
    other = MakeSplit(store=store.uri, out=str(tmp_path / "other"), seed=4)
    other.run()
    assert Split.open(other.out, store).content_hash != split.content_hash


@pytest.mark.slow
def test_a_split_on_s3(crop_store: MakeStore, s3: str):
    store = crop_store(60, f"{s3}/crops")
    MakeSplit(store=store.uri, out=f"{s3}/split", seed=1).run()
    assert len(Split.open(f"{s3}/split", store).codes) == 60


def test_jobs_that_are_refused(crop_store: MakeStore, tmp_path: Path):
    store = crop_store(40)
    out = str(tmp_path / "split")
    for keys, key, problem in (
        ({"store": str(tmp_path / "no")}, "store", "nothing is published here"),
        ({"by": ["plate", "plate+donor"]}, "by.1", r"no column 'donor' \(it has crop_id, source"),
        ({"by": ["image"]}, "by.0", "no column 'image'"),
    ):
        with pytest.raises(JobError, match=problem) as error:
            MakeSplit(**{"store": store.uri, "out": out, **keys}).check()
        assert error.value.key == key
    with pytest.raises(ValueError, match=r"add up to 0\.9"):
        MakeSplit(store=store.uri, out=out, fractions={"train": 0.7})
    with pytest.raises(JobError, match=r"no crop falls to it: there are 1 groups, the largest with 40.*finer column"):
        MakeSplit(store=store.uri, out=out, by=["source"]).run()
    assert not Path(out, "manifest.json").exists()


def test_splits_that_do_not_open(crop_store: MakeStore, tmp_path: Path):
    store = crop_store(40)
    out = tmp_path / "split"
    MakeSplit(store=store.uri, out=str(out), fractions={"train": 0.5, "val": 0.5, "test": 0}).run()
    with pytest.raises(DataError, match="is of another store"):
        Split.open(str(out), crop_store(41))
    codes, manifest = (out / "codes.parquet").read_bytes(), json.loads((out / "manifest.json").read_bytes())
    (out / "codes.parquet").write_bytes(codes[:40] + bytes([codes[40] ^ 1]) + codes[41:])
    with pytest.raises(DataError, match=r"codes\.parquet: its bytes do not match"):
        Split.open(str(out), store)
    (out / "codes.parquet").write_bytes(codes)
    for changes, problem in (({"version": 2}, "version 2"), ({"content_hash": "0"}, "not that of the codes")):
        (out / "manifest.json").write_bytes(output.encode({**manifest, **changes}))
        with pytest.raises(DataError, match=problem):
            Split.open(str(out), store)


def textured(rows: int, size: int, seed: int) -> np.ndarray:
    """Simulated nuclei (rows, 1, size, size): smooth texture in an ellipse, brighter inside, as real ones are."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[:size, :size] - size / 2
    made = np.zeros((rows, 1, size, size), np.uint8)
    for row in range(rows):
        a, b, turn = *rng.uniform(0.2, 0.4, 2) * size, rng.uniform(0, np.pi)
        along, across = xx * np.cos(turn) + yy * np.sin(turn), yy * np.cos(turn) - xx * np.sin(turn)
        depth = 1 - (along / a) ** 2 - (across / b) ** 2
        texture = gaussian_filter(rng.standard_normal((size, size)), 2.0)
        value = 60 + 80 * np.sqrt(depth.clip(0)) + 25 * texture / texture.std()
        made[row, 0] = np.where(depth > 0, value.clip(1, 255), 0)
    return made


def encoded_again(crop: np.ndarray) -> np.ndarray:
    """Darker, through a JPEG of high quality, and a pixel further down."""
    sink = io.BytesIO()
    Image.fromarray((crop[0] * 0.8).astype(np.uint8)).save(sink, "JPEG", quality=97)
    seen = np.asarray(Image.open(io.BytesIO(sink.getvalue())))
    return np.roll(np.where(crop > 0, np.maximum(seen, 1), 0), 1, axis=1).astype(np.uint8)


def test_copies_are_found_and_others_are_not(tmp_path: Path):
    crops = textured(300, 48, seed=0)
    copies = np.stack([encoded_again(crop) for crop in crops[:40]])
    everything = np.concatenate([crops, copies, crops[40:50]])
    spec = CropSpec(channels=("DNA",), height=48, width=48)
    rows = make_rows(len(everything), spec)
    rows = rows.set_column(rows.column_names.index("image"), "image", image_column(everything))
    store = store_of(str(tmp_path), rows, spec, 64, 2, "lz4", masked=False)
    prints = fingerprints(everything)
    assert {tuple(pair) for pair in exact_pairs(prints.exact).tolist()} == {(40 + i, 340 + i) for i in range(10)}
    found = {tuple(pair) for pair in similar(store, prints.area, prints.bits, 0.99).tolist()}
    true = {(i, 300 + i) for i in range(40) if correlation(crops[i], copies[i]) >= 0.99}
    assert len(true) >= 30
    assert found - {(40 + i, 340 + i) for i in range(10)} == true


def test_small_and_flat_crops_are_left_alone():
    crops = np.zeros((6, 1, 16, 16), np.uint8)
    crops[2:4, 0, :6, :6] = np.arange(36).reshape(6, 6) + 1
    crops[4:, 0, :12, :12] = 9
    prints = fingerprints(crops)
    assert not prints.area.any() and not prints.exact.any()
    assert len(exact_pairs(prints.exact)) == 0


def test_correlation_is_of_texture():
    crops = textured(3, 32, seed=1)
    assert correlation(crops[0], crops[0] // 2 + (crops[0] > 0)) > 0.99
    assert correlation(crops[0], np.roll(crops[0], 1, axis=2)) == pytest.approx(1.0)
    assert correlation(crops[0], crops[1]) < 0.9
    assert correlation(crops[0], np.zeros_like(crops[0])) == 0.0


def test_fields_that_show_the_same_cells():
    rng = np.random.default_rng(0)
    layouts = [rng.uniform(0, 1000, (rng.integers(20, 200), 2)) for _ in range(60)]
    few = rng.uniform(0, 1000, (8, 2))
    moved = layouts[7][rng.random(len(layouts[7])) < 0.9] + [9, -6] + rng.normal(0, 1, (1, 2))
    layouts += [moved, few, few]
    fields = np.repeat(np.arange(len(layouts)), [len(points) for points in layouts])
    order = rng.permutation(len(fields))
    y, x = np.concatenate(layouts)[order].T
    assert same_layouts(fields[order], y, x, 0.6).tolist() == [[7, 60]]
    assert same_layouts(fields[order], np.full(len(y), np.nan), x, 0.6).shape == (0, 2)
    assert shared(layouts[7], moved) == 1.0 and shared(layouts[1], layouts[2]) < 0.3


def test_near_duplicates_share_a_part(crop_store: MakeStore, tmp_path: Path):
    """Copies of crops and of whole fields join their fields' groups, and with them everything in those."""
    spec = CropSpec(channels=("DNA",), height=48, width=48)
    rows, crops = make_rows(400, spec), textured(400, 48, seed=2)
    crops[200] = crops[3]
    y = np.random.default_rng(5).uniform(0, 1000, 400).astype(np.float32)
    x = np.random.default_rng(6).uniform(0, 1000, 400).astype(np.float32)
    y[300:320], x[300:320] = y[100:120] + 5, x[100:120] - 3
    fields = [f"field-{row // 20}" for row in range(400)]
    for name, values in (("image", image_column(crops)), ("centroid_y", y), ("centroid_x", x), ("field_uri", fields)):
        rows = rows.set_column(rows.column_names.index(name), name, pa.array(values))
    store = store_of(str(tmp_path / "store"), rows, spec, 64, 2, "lz4", masked=False)
    job = MakeSplit(store=store.uri, out=str(tmp_path / "split"))
    found = job.run()["near_duplicates"]
    assert (found["identical_crops"], found["similar_fields"]) == (1, 1)
    assert found["such_as"] == [["field-5", "field-15"]]
    groups = Split.open(job.out, store).group_codes
    assert len(set(groups[[3, 0, 200, 219]])) == 1 and len(set(groups[100:120]) | set(groups[300:320])) == 1
    assert groups.max() + 1 == 18
    plain = MakeSplit(store=store.uri, out=str(tmp_path / "plain"), near_duplicates={"crops": None, "fields": None})
    assert plain.run()["groups"] == 20


@pytest.mark.data
def test_the_known_pair_of_real_fields(data_root: Path):
    """dsb2018 holds one embryo twice: found by where its nuclei lie, and no other pair among 541 fields."""
    from scipy.ndimage import center_of_mass

    names = sorted((data_root / "images/dsb2018_train_fluo/labels").glob("*.png"))
    fields, centres = [], []
    for number, name in enumerate(names):
        labels = np.asarray(Image.open(name))
        found = center_of_mass(labels > 0, labels, np.unique(labels[labels > 0]))
        fields += [number] * len(found)
        centres += found
    y, x = np.array(centres).T
    pairs = same_layouts(np.array(fields), y, x, 0.6)
    assert [[names[one].name[:8], names[other].name[:8]] for one, other in pairs] == [["20b20ab0", "cb4df20a"]]
