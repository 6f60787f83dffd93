"""Crop stores: what is written is what is read, for any shape; the content hash is of content; damage never passes."""

from __future__ import annotations

import json
import pickle
import tracemalloc
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from making import make_rows, publish_entries, store_of

from cosmic_ray import output, storage
from cosmic_ray.errors import DataError, JobError, NotFoundError
from cosmic_ray.stores import manifest as form
from cosmic_ray.stores.columns import image_column, images
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.manifest import COLUMNS, CropSpec
from cosmic_ray.stores.verify import verify_store
from cosmic_ray.stores.writer import encode_shard, finished_shard, order_keys, write_shard

MakeStore = Callable[..., CropStore]


KNOWN_HASH = "37c205f61e9477adb784c9336b09253e29552d26db51838b8462e8d22ab8bd35"
"""Of `crop_store(20, channels=2, size=8)`, as the first version of the format computed it."""


def examples(count: int) -> settings:
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=count, deadline=None, suppress_health_check=checks)


@st.composite
def tables(draw: st.DrawFn) -> tuple[pa.Table, CropSpec]:
    """Rows with any values in any columns of any order, and the spec of their images."""
    names = st.text(min_size=1, max_size=5)
    channels = draw(st.lists(names, min_size=1, max_size=3, unique=True))
    spec = CropSpec(channels=tuple(channels), height=draw(st.integers(1, 9)), width=draw(st.integers(1, 9)))
    rows = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    floats = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1.5, 1e-45, 3.4e38], np.float32)
    texts = draw(st.lists(st.text(max_size=8), min_size=1, max_size=5))
    made = {
        "string": lambda: pa.array([texts[i] for i in rng.integers(0, len(texts), rows)], pa.string()),
        "float32": lambda: pa.array(rng.choice(floats, rows)),
        "int32": lambda: pa.array(rng.integers(-(2**31), 2**31, rows).astype(np.int32)),
        "binary": lambda: image_column(rng.integers(0, 256, (rows, *spec.shape), dtype=np.uint8)),
    }
    extra = draw(
        st.dictionaries(st.from_regex(r"q_[A-Za-z0-9_]{1,6}", fullmatch=True), st.sampled_from(form.EXTRA_TYPES))
    )
    columns = {name: made[kind]() for name, kind in {**COLUMNS, **extra}.items()}
    order = draw(st.permutations(sorted(columns)))
    return pa.table({name: columns[name] for name in order}), spec


def read_all(store: CropStore) -> pa.Table:
    return pa.concat_tables(store.read_row_group(index) for index in range(len(store.row_groups)))


def same(left: pa.Table, right: pa.Table) -> bool:
    """Equal names, types and values, NaN equal to NaN and -0.0 different from 0.0."""
    if left.schema.names != right.schema.names or left.schema.types != right.schema.types:
        return False
    for one, other in zip(left.columns, right.columns, strict=True):
        if pa.types.is_floating(one.type):
            bits = [
                np.where(np.isnan(x), np.float32(np.nan), x).view(np.uint32) for x in (one.to_numpy(), other.to_numpy())
            ]
            if not np.array_equal(*bits):
                return False
        elif not one.equals(other):
            return False
    return True


@examples(12)
@given(
    made=tables(),
    rows_per_group=st.integers(1, 16),
    groups_per_shard=st.integers(1, 4),
    compression=st.sampled_from(["none", "lz4", "zstd"]),
)
def test_what_is_written_is_what_is_read(fresh, made, rows_per_group, groups_per_shard, compression):
    rows, spec = made
    store = store_of(fresh(), rows, spec, rows_per_group, groups_per_shard, compression, masked=False)
    stored = read_all(store)
    assert same(stored, rows.select(store.columns))
    assert len(store) == len(rows) and store.rows_per_group.sum() == len(rows)
    assert same(store.metadata(["plate", "area_px"]), rows.select(["plate", "area_px"]))
    size = rows_per_group + 3
    batches = list(store.batches(size))
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert same(pa.concat_tables(batches), stored)
    picked = np.random.default_rng(0).integers(0, len(rows), 10)
    assert np.array_equal(store.crops(picked), images(rows, spec)[picked])
    extremes = rows["crop_id"].to_pylist()
    problems = verify_store(store.uri)
    assert bool(problems) == (len(set(extremes)) < len(extremes))


@examples(6)
@given(made=tables(), rows_per_group=st.integers(1, 16), seed=st.integers(0, 2**31))
def test_the_content_hash_is_of_the_content(fresh, made, rows_per_group, seed):
    rows, spec = made

    def publish(*given: Any) -> CropStore:
        return store_of(fresh(), *given)

    plain = publish(rows, spec, rows_per_group, 1, "none").content_hash
    columns = np.random.default_rng(seed).permutation(rows.column_names).tolist()
    chunked = pa.concat_tables([rows.slice(0, len(rows) // 2), rows.slice(len(rows) // 2)]).select(columns)
    assert publish(chunked, spec, rows_per_group, 3, "zstd").content_hash == plain
    altered = images(rows, spec).copy()
    altered[-1, 0, 0, 0] ^= 1
    changed = rows.set_column(rows.column_names.index("image"), "image", image_column(altered))
    assert publish(changed, spec, rows_per_group, 1, "none").content_hash != plain
    renamed = CropSpec(channels=(*spec.channels[:-1], spec.channels[-1] + "'"), height=spec.height, width=spec.width)
    assert publish(rows, renamed, rows_per_group, 1, "none").content_hash != plain


def test_the_content_hash_stays_what_it_was(crop_store: MakeStore):
    """A known answer: stores published by an earlier version must keep their hash."""
    assert crop_store(20, channels=2, size=8).content_hash == KNOWN_HASH


def test_the_key_of_a_crop_in_the_order_of_a_store_is_its_own():
    assert order_keys(["a", "b"], 7).tolist() != order_keys(["a", "b"], 8).tolist()
    assert order_keys(["a", "b"], 7).tolist() == order_keys(["b", "a"], 7).tolist()[::-1]
    assert order_keys(["a"], -1) == order_keys(["a"], 2**64 - 1)


@pytest.mark.parametrize("channels,size", [(1, 256), (5, 64)])
def test_other_shapes_are_ordinary(crop_store: MakeStore, channels: int, size: int):
    store = crop_store(9, channels=channels, size=size)
    assert store.spec.shape == (channels, size, size)
    assert store.crops(np.array([8, 0])).shape == (2, channels, size, size)
    assert verify_store(store.uri) == []


@pytest.mark.slow
def test_a_store_on_s3(crop_store: MakeStore, s3: str, tmp_path: Path):
    far, near = crop_store(40, f"{s3}/crops"), crop_store(40, str(tmp_path / "crops"))
    assert far.content_hash == near.content_hash and same(read_all(far), read_all(near))
    assert verify_store(f"{s3}/crops") == []
    storage.delete(far.row_groups[-1].shard)
    with pytest.raises(NotFoundError, match=r"s3://.*shard-00002\.parquet: this shard is missing"):
        far.read_row_group(len(far.row_groups) - 1)


def test_images_are_views(crop_store: MakeStore):
    store = crop_store(8)
    table = store.read_row_group(0)
    view = images(table, store.spec)
    assert view.base is not None and not view.flags.writeable
    column = table["image"].chunk(0)
    assert view.__array_interface__["data"][0] == column.buffers()[2].address
    assert np.array_equal(images(column.slice(3, 2), store.spec), view[3:5])
    both = pa.chunked_array([column.slice(0, 3), column.slice(3)])
    assert np.array_equal(images(both, store.spec), view)
    assert images(column.slice(0, 0), store.spec).shape == (0, 1, 16, 16)
    with pytest.raises(ValueError, match="image 0 has 256 bytes"):
        images(column, CropSpec(channels=("a",), height=8, width=8))
    with pytest.raises(ValueError, match="1 of 1 images are null"):
        images(pa.array([None], pa.binary()), store.spec)
    with pytest.raises(ValueError, match="uint8"):
        image_column(np.zeros((1, 1, 2, 2), np.float32))


def test_rows_and_columns_that_are_not_there(crop_store: MakeStore):
    store = crop_store(20)
    with pytest.raises(KeyError, match="no column nuclei; it has crop_id, source"):
        store.read_row_group(0, ["nuclei"])
    with pytest.raises(KeyError, match="never reads images"):
        store.metadata(["image"])
    for rows in ([20], [-1]):
        with pytest.raises(IndexError, match="of a store with 20"):
            store.crops(np.array(rows))
    assert store.crops(np.array([], int)).shape == (0, 1, 16, 16)


def test_metadata_never_fetches_images(crop_store: MakeStore, monkeypatch: pytest.MonkeyPatch):
    store = crop_store(64, size=64)
    fetched: list[int] = []
    read_range = storage.read_range
    monkeypatch.setattr(storage, "read_range", lambda *args: fetched.append(args[2]) or read_range(*args))
    store.metadata(["plate"])
    footers = sum(shard.footer_nbytes for shard in store.manifest.shards)
    assert sum(fetched) == footers + sum(group.meta_nbytes for group in store.row_groups)


def test_any_parquet_reader_reads_a_shard(crop_store: MakeStore):
    store = crop_store(16)
    table = pq.read_table(store.row_groups[0].shard)
    assert table.column_names == store.columns and same(table, read_all(store))


def test_a_store_travels_by_its_uri(crop_store: MakeStore):
    store = crop_store(16)
    assert len(pickle.dumps(store)) < 1000
    assert pickle.loads(pickle.dumps(store)).content_hash == store.content_hash


def test_rows_that_cannot_be_stored():
    spec = CropSpec(channels=("DNA",), height=4, width=4)
    rows = make_rows(4, spec)
    nulls = rows.set_column(1, "source", pa.array(["a", None, "b", "c"]))
    cases = {
        "no column area_px": rows.drop_columns(["area_px"]),
        "nulls in source": nulls,
        "at least one row": rows.slice(0, 0),
        r"extra columns are string, float32, int32; not \{'q_x': 'double'\}": rows.append_column(
            "q_x", pa.array([0.0] * 4)
        ),
    }
    for problem, table in cases.items():
        with pytest.raises(ValueError, match=problem):
            encode_shard(table, spec)
    with pytest.raises(ValueError, match=r"'q.x'.*letters, digits and _"):
        encode_shard(rows.append_column("q.x", rows["area_px"]), spec)
    with pytest.raises(ValueError, match="image 0 has 16 bytes"):
        encode_shard(rows, CropSpec(channels=("DNA",), height=4, width=5))


def test_a_build_resumes_at_the_shard(tmp_path: Path):
    spec, out = CropSpec(channels=("DNA",), height=4, width=4), str(tmp_path)
    encoded = encode_shard(make_rows(10, spec), spec, rows_per_group=4)
    assert encoded.data == encode_shard(make_rows(10, spec), spec, rows_per_group=4).data
    assert finished_shard(out, 3) is None
    entry = write_shard(out, 3, encoded)
    assert finished_shard(out, 3) == entry
    assert entry.shard.name == "shard-00003.parquet" and [group.rows for group in entry.shard.row_groups] == [4, 4, 2]
    storage.write_bytes(f"{out}/shards/shard-00003.parquet", encoded.data[:-1])
    assert finished_shard(out, 3) is None


def test_shards_that_make_no_store(tmp_path: Path):
    spec = CropSpec(channels=("DNA",), height=4, width=4)
    rows = make_rows(10, spec)
    short, whole = encode_shard(rows, spec, 4), encode_shard(rows.slice(0, 8), spec, 4)
    other = encode_shard(rows.append_column("q_a", rows["area_px"]), spec, 4)
    for shards, problem in (
        ([], "needs at least one shard"),
        ([short, whole], "row group before the last one is short"),
        ([whole, other], r"shard-00001\.parquet: has another image shape, other columns"),
        ([whole, encode_shard(rows, spec, 5)], "row-group size"),
    ):
        entries = [write_shard(str(tmp_path), index, shard) for index, shard in enumerate(shards)]
        with pytest.raises(DataError, match=problem):
            publish_entries(str(tmp_path), entries, spec)


@examples(40)
@given(data=st.data())
def test_no_flipped_byte_passes(damaged_store, data: st.DataObject):
    """Any byte of any object of a store: reading or verifying names that object."""
    store, contents = damaged_store
    uri = data.draw(st.sampled_from(sorted(contents)))
    position = data.draw(st.integers(0, len(contents[uri]) - 1))
    spoilt = bytearray(contents[uri])
    spoilt[position] ^= data.draw(st.integers(1, 255))
    Path(uri).write_bytes(spoilt)
    try:
        problems = verify_store(store.uri)
    finally:
        Path(uri).write_bytes(contents[uri])
    assert problems and all(uri in problem for problem in problems)


@examples(20)
@given(data=st.data())
def test_no_flipped_byte_of_a_row_group_is_read(damaged_store, data: st.DataObject):
    store, contents = damaged_store
    group = data.draw(st.sampled_from(store.row_groups))
    position = data.draw(st.integers(group.offset, group.offset + group.nbytes - 1))
    spoilt = bytearray(contents[group.shard])
    spoilt[position] ^= data.draw(st.integers(1, 255))
    Path(group.shard).write_bytes(spoilt)
    try:
        with pytest.raises(DataError, match=r"shard-\d+\.parquet: row group \d: its bytes do not match") as error:
            store.read_row_group(group.index)
    finally:
        Path(group.shard).write_bytes(contents[group.shard])
    assert error.value.uri == group.shard


def test_damaged_shards_are_named(crop_store: MakeStore):
    store = crop_store(48)
    first, second, third = sorted({group.shard for group in store.row_groups})
    whole = Path(second).read_bytes()
    Path(first).unlink()
    Path(second).write_bytes(whole[: len(whole) // 2])
    Path(third).write_bytes(whole)
    store = CropStore.open(store.uri)
    for group, shard, problem in ((0, first, "missing"), (2, second, "ends early"), (4, third, "match|ends early")):
        with pytest.raises(DataError, match=problem) as error:
            store.read_row_group(group)
        assert error.value.uri == shard and shard in str(error.value)
    problems = verify_store(store.uri)
    assert all(any(shard in problem for problem in problems) for shard in (first, second, third))


def signed(tree: dict[str, Any]) -> bytes:
    return output.encode({**tree, "digest": form.self_digest(output.encode({**tree, "digest": ""}))})


def test_manifests_that_do_not_open(crop_store: MakeStore, tmp_path: Path):
    store = crop_store(16)
    at = Path(store.uri) / "manifest.json"
    good = json.loads(at.read_bytes())

    def opened(**changes: Any) -> None:
        tree = {**good, **changes}
        at.write_bytes(signed(tree))
        CropStore.open(store.uri)

    opened()
    group = good["shards"][0]["row_groups"][0]
    forged = [{**good["shards"][0], "row_groups": [[*group[:-1], "0" * 64], *good["shards"][0]["row_groups"][1:]]}]
    for changes, problem in (
        ({"version": 2}, "unknown version 2 of cosmic-ray/crops"),
        ({"format": "cosmic-ray/split"}, "not a crop store: its format is 'cosmic-ray/split'"),
        ({"rows": "many"}, "rows: "),
        ({"colour": "blue"}, "colour: "),
        ({"shards": forged}, "content hash does not follow"),
    ):
        with pytest.raises(DataError, match=problem) as error:
            opened(**changes)
        assert str(error.value).startswith(str(at))
    at.write_bytes(output.encode({**good, "rows": 17}))
    with pytest.raises(DataError, match="does not match its own digest"):
        CropStore.open(store.uri)
    with pytest.raises(NotFoundError, match=r"nothing is published here: no manifest\.json"):
        CropStore.open(str(tmp_path / "nowhere"))
    with pytest.raises(JobError):
        CropStore.open("ftp://server/store")


def test_verify_finds_what_the_digests_cannot(crop_store: MakeStore):
    ids = [f"crop-{row}" for row in range(31)] + ["crop-7"]
    assert verify_store(crop_store(32, columns={"crop_id": ids}).uri)[0].endswith(
        "1 crop ids stand more than once, such as 'crop-7'"
    )
    areas = pa.array(np.full(32, 5, np.int32))
    problems = verify_store(crop_store(32, columns={"area_px": areas}).uri)
    assert len(problems) == 4 and "8 crops break the store's mask rule: crop 'crop-0-000000' has" in problems[0]


def test_statistics_are_exact(crop_store: MakeStore):
    few, many = crop_store(40, groups_per_shard=1), crop_store(40, rows_per_group=40, groups_per_shard=9)
    assert few.manifest.statistics == many.manifest.statistics
    crops, statistics = few.crops(np.arange(40)), few.manifest.statistics
    pixels = crops[crops > 0].astype(float)
    said = statistics["nonzero_pixels"]["channel-0"]
    assert said["count"] == len(pixels) and said["sum"] == pixels.sum()
    assert np.isclose(said["mean"], pixels.mean()) and np.isclose(said["std"], pixels.std())
    areas = np.sort(few.metadata(["area_px"])["area_px"].to_numpy())
    assert statistics["area_px_percentiles"]["50"] == np.percentile(areas, 50, method="inverted_cdf")
    assert statistics["area_px_percentiles"]["100"] == areas[-1]
    assert statistics["rows_by_plate"] == {"plate-0": 14, "plate-1": 13, "plate-2": 13}


def test_a_store_of_millions_opens_by_its_manifest_alone(crop_store: MakeStore):
    """21.8 M rows: 5,400 shards of 4 row groups of 1,024 rows, by their manifest alone."""
    store = crop_store(64, rows_per_group=8, groups_per_shard=4)
    tree = json.loads((Path(store.uri) / "manifest.json").read_bytes())
    shard = tree["shards"][0]
    tree["shards"] = [{**shard, "name": f"shard-{index:05}.parquet"} for index in range(5400)]
    spec = CropSpec.model_validate(tree["spec"])
    groups = [form.StoredGroup(*group) for group in shard["row_groups"]] * 5400
    tree |= {"rows": 5400 * 32, "content_hash": form.content_hash(spec, {}, groups)}
    (Path(store.uri) / "manifest.json").write_bytes(signed(tree))
    large = CropStore.open(store.uri)
    assert len(large.row_groups) == 21_600 and large.group_starts[-1] == len(large)
    tracemalloc.start()
    CropStore.open(store.uri)
    assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    tracemalloc.stop()


def test_footers_are_not_all_kept(crop_store: MakeStore, monkeypatch: pytest.MonkeyPatch):
    from cosmic_ray.stores import crops

    monkeypatch.setattr(crops, "_FOOTERS_KEPT", 3)
    store = crop_store(64, rows_per_group=4, groups_per_shard=1)
    assert len(list(store.batches(10))) == 7
    assert len(store._footers) == 3


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[[], str]:
    """A folder that is not there yet, at every call."""
    return lambda: str(tmp_path / uuid.uuid4().hex)


@pytest.fixture
def damaged_store(crop_store: MakeStore) -> tuple[CropStore, dict[str, bytes]]:
    """A small store and the bytes of each of its objects."""
    store = crop_store(12, size=6, rows_per_group=3)
    names = [str(Path(store.uri) / "manifest.json"), *{group.shard for group in store.row_groups}]
    return store, {name: Path(name).read_bytes() for name in names}
