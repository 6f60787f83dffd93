"""Pages decoded here are what Arrow's own reader gives, and whatever is stored in another way is left to it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cosmic_ray.errors import DamagedError
from cosmic_ray.stores.columns import image_column, images
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.pages import decoded, find_pages

NBYTES = 48


def column_of(values: pa.Array, nullable: bool = False, **options: object) -> tuple[bytes, pq.ColumnChunkMetaData]:
    """A Parquet file with these values in one row group, and where they lie in it."""
    schema = pa.schema([pa.field("image", values.type, nullable=nullable)])
    file = io.BytesIO()
    pq.write_table(pa.table([values], schema=schema), file, use_dictionary=options.pop("dictionary", False), **options)
    return file.getvalue(), pq.read_metadata(file).row_group(0).column(0)


def crops(rows: int) -> np.ndarray:
    rng = np.random.default_rng(rows)
    return rng.integers(0, 4, (rows, 3, 4, 4)).astype(np.uint8)


@pytest.mark.parametrize("compression", ["NONE", "LZ4", "ZSTD"])
@pytest.mark.parametrize(("rows", "page"), [(1, 2**20), (300, 2**20), (300, 64)])
def test_pages_hold_what_was_written(rows: int, page: int, compression: str) -> None:
    written = crops(rows)
    options = {"compression": compression, "data_page_size": page, "write_batch_size": 16}
    data, column = column_of(image_column(written), **options)
    pages = find_pages(memoryview(data), column, 0, NBYTES)
    assert pages is not None and (len(pages) > 1) == (page == 64)
    parts = list(decoded(memoryview(data), pages, column.compression, NBYTES))
    assert [len(part) for part in parts] == [page.rows for page in pages]
    assert np.array_equal(np.concatenate(parts), written.reshape(rows, -1))


@pytest.mark.parametrize(
    ("options", "nbytes"),
    [
        ({"data_page_version": "2.0"}, NBYTES),
        ({"dictionary": True}, NBYTES),
        ({"compression": "GZIP"}, NBYTES),
        ({"column_encoding": {"image": "DELTA_LENGTH_BYTE_ARRAY"}}, NBYTES),
        ({}, NBYTES - 1),
    ],
    ids=["version 2", "dictionary", "gzip", "other encoding", "other size"],
)
def test_what_is_stored_in_another_way_is_left_to_arrow(options: dict, nbytes: int) -> None:
    data, column = column_of(image_column(crops(40)), **options)
    assert find_pages(memoryview(data), column, 0, nbytes) is None


def test_nulls_are_left_to_arrow() -> None:
    """Their page holds levels before the values."""
    data, column = column_of(pa.array([bytes(NBYTES)] * 20 + [None], pa.binary()), nullable=True, compression="NONE")
    assert find_pages(memoryview(data), column, 0, NBYTES) is None


def test_values_of_unequal_size_are_refused() -> None:
    """Though together they are as long as they should be."""
    values = pa.array([bytes(NBYTES - 1), bytes(NBYTES + 1)], pa.binary())
    data, column = column_of(values, compression="NONE")
    pages = find_pages(memoryview(data), column, 0, NBYTES)
    assert pages is not None
    with pytest.raises(ValueError, match="48 bytes"):
        list(decoded(memoryview(data), pages, column.compression, NBYTES))


def test_a_store_decodes_the_same_either_way(
    crop_store: Callable[..., CropStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = crop_store(40)

    def all_images() -> np.ndarray:
        groups = range(len(store.row_groups))
        return np.concatenate([part for group in groups for part in store.decoded_images(group, store.stored(group))])

    ours = all_images()
    monkeypatch.setattr("cosmic_ray.stores.crops.find_pages", lambda *_: None)
    assert np.array_equal(ours, all_images())
    rows = pa.concat_tables(store.batches(100))
    assert np.array_equal(ours, images(rows, store.spec).reshape(len(rows), -1))


def test_a_footer_that_is_handed_over_is_checked_too(crop_store: Callable[..., CropStore]) -> None:
    store = crop_store(40)
    footer = bytearray(store.stored_footer(store.row_groups[0].shard))
    footer[7] ^= 1
    with pytest.raises(DamagedError, match="footer does not match"):
        list(store.decoded_images(0, store.stored(0), bytes(footer)))


def test_memory_that_is_lent_is_used(crop_store: Callable[..., CropStore]) -> None:
    store = crop_store(40)
    room = np.zeros(store.row_groups[0].nbytes + 10, np.uint8)
    assert store.stored(0, room=memoryview(room)) == store.stored(0) == room[:-10].tobytes()
    shard = Path(store.row_groups[0].shard)
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(DamagedError, match="ends early"):
        store.stored(0, room=memoryview(room))
