"""The report of a store and its embeddings: from a sample of bounded size, and only what was drawn is read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cosmic_ray import storage
from cosmic_ray.errors import DataError
from cosmic_ray.evaluation import sections
from cosmic_ray.evaluation.report import Report
from cosmic_ray.stores.embeddings import Embeddings, about_parts, write_part
from cosmic_ray.stores.split import MakeSplit

ROWS, PART_ROWS, WIDTH = 210, 16, 4


@pytest.fixture
def store(crop_store):
    return crop_store(ROWS, columns={"cell_line": ["HeLa" if row % 2 else "U2OS" for row in range(ROWS)]})


@pytest.fixture
def embeddings(store, tmp_path) -> str:
    """Embeddings that say which row they are of and tell the cell lines apart, as an embed job leaves them."""
    out = str(tmp_path / "embed")
    ids = store.metadata(["crop_id"])["crop_id"].combine_chunks()
    rows = np.arange(ROWS, dtype=np.float32)
    vectors = np.stack([rows, rows % 2, np.sin(rows), np.cos(rows)], 1)
    slices = [slice(start, start + PART_ROWS) for start in range(0, ROWS, PART_ROWS)]
    parts = [write_part(out, part, "crop_id", ids[here], vectors[here]) for part, here in enumerate(slices)]
    storage.write_bytes(f"{out}/manifest.json", json.dumps(about_parts(parts, (WIDTH,))).encode())
    return out


@pytest.mark.parametrize("count", [1, 40, ROWS, 10 * ROWS])
def test_a_sample_is_of_that_size_seeded_and_in_few_parts(embeddings, count):
    found = Embeddings.open(embeddings)
    rows = found.sample(count, seed=3)
    assert len(np.unique(rows)) == len(rows) == min(count, ROWS)
    assert (np.diff(rows) > 0).all() and rows[0] >= 0 and rows[-1] < ROWS
    assert len(np.unique(rows // PART_ROWS)) <= count // PART_ROWS + 2
    np.testing.assert_array_equal(rows, found.sample(count, seed=3))
    for part in set(range(14)) - set(rows // PART_ROWS):
        Path(embeddings, f"part-{part:05}.parquet").unlink()
    np.testing.assert_array_equal(found.vectors(rows)[:, 0], rows)


def test_every_row_is_drawn_by_some_seed(embeddings):
    found = Embeddings.open(embeddings)
    drawn = np.concatenate([found.sample(50, seed) for seed in range(200)])
    assert np.bincount(drawn, minlength=ROWS).min() > 0


def test_metadata_of_some_rows_is_that_of_all_at_these_rows(store):
    rows = np.array([200, 3, 3, 17, 209, 0])
    whole = store.metadata(["crop_id", "cell_line"])
    assert store.metadata(["cell_line", "crop_id"], rows).select(["crop_id", "cell_line"]).equals(whole.take(rows))
    assert len(store.metadata(["crop_id"], np.array([], np.int64))) == 0
    with pytest.raises(IndexError):
        store.metadata(["crop_id"], np.array([ROWS]))


def test_the_page_says_how_many_crops_it_looked_at(store, embeddings, tmp_path, monkeypatch):
    monkeypatch.setattr(sections, "_SAMPLE", 48)
    split = str(tmp_path / "split")
    MakeSplit(store=store.uri, out=split, near_duplicates={"crops": None, "fields": None}).run()
    found = Report(out=str(tmp_path / "report"), crops=store.uri, split=split, embeddings=embeddings).run()
    html = storage.read_bytes(found["report"]).decode()
    assert f"From 48 of {ROWS} crops, drawn with seed 0" in html and "simulated data" in html
    assert found["embedding"]["sampled"] == 48 and found["embedding"]["rows"] == ROWS
    assert found["embedding"]["cell_line_balanced_accuracy_on_val"]["embedding"] == 1.0


def test_embeddings_of_another_store_are_refused(store, crop_store, embeddings, tmp_path):
    other, split = crop_store(ROWS + 8), str(tmp_path / "split")
    MakeSplit(store=other.uri, out=split, near_duplicates={"crops": None, "fields": None}).run()
    with pytest.raises(DataError, match=r"210 embeddings for a store of 218 crops"):
        Report(out=str(tmp_path / "report"), crops=other.uri, split=split, embeddings=embeddings).run()
