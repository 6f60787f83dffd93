"""`build-cells`: the same cells in expression and images, joined by id; everything left out is listed or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making_cells import LENIENT, SIDE, encoded, expression, image_of, make_adata, write_iris
from PIL import Image
from scipy.sparse import csc_matrix, csr_matrix

from cosmic_ray import storage
from cosmic_ray.cells import build
from cosmic_ray.cells.images import Files
from cosmic_ray.cells.job import BuildCells, Images
from cosmic_ray.cells.join import join
from cosmic_ray.errors import CosmicError, DataError, JobError
from cosmic_ray.ingest.plan import Plan
from cosmic_ray.ingest.selection import Selection
from cosmic_ray.stores.cells import CellStore
from cosmic_ray.stores.cells_verify import verify_published
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.split import MakeSplit, Split

HALVES = {"train": 0.5, "val": 0.5, "test": 0}


def run(out: Path | str, keys: dict[str, Any], **more: Any) -> tuple[dict[str, Any], CellStore]:
    job = BuildCells(out=str(out), **{"rows_per_group": 8, **keys, **more})
    job.check()
    return job.run(), CellStore.open(job.out)


def rejected(out: Path | str) -> list[tuple[str, str, str]]:
    rows = pq.read_table(f"{out}/rejected.parquet").to_pylist()
    return [(row["what"], row["id"], row["reason"]) for row in rows]


@pytest.mark.parametrize("where", ["folder", "zip"])
def test_the_iris_layout(tmp_path: Path, where: str):
    adata = make_adata()
    results, store = run(tmp_path / "out", write_iris(tmp_path / "in", adata, where))
    assert verify_published(store.uri) == []
    assert (results["rows"], results["genes"], results["values"]) == (40, 29, "raw")
    assert results["genes_rejected"] == {"few cells": 1} and results["mitochondrial_genes"] == 2
    assert rejected(store.uri) == [("gene", "ENS00029", "few cells")]
    made = store.to_anndata()
    by_id = adata[[list(adata.obs["cell_id"]).index(cell_id) for cell_id in made.obs_names], :-1]
    assert made.var_names.tolist() == by_id.var_names.tolist()
    assert made.var["symbol"].tolist() == by_id.var["symbol"].tolist()
    assert made.X.dtype == np.int32 and np.array_equal(made.X.toarray(), by_id.X.toarray())
    for ours, theirs in (("batch", "plate"), ("cell_type", "kind"), ("donor", "who"), ("kind", "kind")):
        assert made.obs[ours].tolist() == by_id.obs[theirs].tolist()
    assert made.obs["size"].tolist() == by_id.obs["size"].tolist() and made.obs["good"].dtype == bool
    full = adata.X[made.obs["source_row"].to_numpy()].toarray()
    assert made.obs["q_counts"].tolist() == full.sum(axis=1).tolist()
    assert made.obs["q_genes"].tolist() == (full > 0).sum(axis=1).tolist()
    assert np.allclose(made.obs["q_mito_share"], full[:, 27:29].sum(axis=1) / full.sum(axis=1))
    crops = store.crops.crops(np.arange(40))
    for crop, cell_id in zip(crops, made.obs_names, strict=True):
        assert np.abs(crop[0].astype(int) - image_of(cell_id)).mean() < 8
    assert len({crop.tobytes() for crop in crops}) == 40
    known = store.crops.metadata(["crop_id", "batch"])
    assert known["crop_id"].to_pylist() == made.obs_names.tolist()
    assert known["batch"].to_pylist() == made.obs["batch"].tolist()
    assert not any("scratch" in uri for uri in storage.listing(store.uri))
    assert BuildCells(out=store.uri, **write_iris(tmp_path / "in", adata, where), rows_per_group=8).run() == results


def test_the_content_is_the_same_in_any_chunks_and_anywhere(tmp_path: Path):
    """Neither the size of chunks, the folder, the order of cells and genes, nor how counts are stored is content."""
    adata = make_adata()
    keys = write_iris(tmp_path / "in", adata)
    first, store = run(tmp_path / "a", keys)
    more, _ = run(tmp_path / "b", keys, chunk_cells=7, threads=1)
    shutil.copytree(tmp_path / "in", tmp_path / "moved")
    dense = adata.copy()
    dense.layers["counts"], dense.X = dense.X.toarray().astype(np.int64), csr_matrix(dense.X.shape, dtype=np.float32)
    dense.write_h5ad(tmp_path / "moved" / "cells.h5ad")
    moved = json.loads(json.dumps(keys).replace(str(tmp_path / "in"), str(tmp_path / "moved")))
    moved["expression"]["counts"] = "counts"
    other, _ = run(tmp_path / "c", moved)
    assert first["content_hash"] == more["content_hash"] == other["content_hash"]
    changed = adata.copy()
    changed.X[5, 0] += 1
    assert run(tmp_path / "d", write_iris(tmp_path / "in2", changed))[0]["content_hash"] != store.content_hash


def test_several_files_in_one_order_of_genes(tmp_path: Path):
    one, two = make_adata(20, seed=1), make_adata(15, seed=2)
    keys = write_iris(tmp_path / "in", one)
    for cell_id in two.obs["cell_id"]:
        (tmp_path / "in/images" / f"{cell_id}.jpg").write_bytes(encoded(image_of(cell_id)))
    shuffled = anndata.AnnData(two.X[:, ::-1], obs=two.obs.assign(extra=7), var=two.var[::-1])
    shuffled.write_h5ad(tmp_path / "in" / "more.h5ad")
    keys["expression"]["uri"] = str(tmp_path / "in")
    _, store = run(tmp_path / "out", keys, chunk_cells=6)
    made = store.to_anndata()
    both = np.concatenate([one.X.toarray(), two.X.toarray()])[made.obs["source_row"].to_numpy()]
    assert np.array_equal(made.X.toarray(), both[:, np.isin(one.var_names, made.var_names)])
    of_two = made.obs_names.str.startswith("cell-2")
    assert np.isnan(made.obs["extra"][~of_two]).all() and (made.obs["extra"][of_two] == 7).all()
    two[:, 1:].copy().write_h5ad(tmp_path / "in" / "more.h5ad")
    with pytest.raises(DataError, match=r"more\.h5ad: lacks 1 genes of .*cells\.h5ad: ENS00000"):
        run(tmp_path / "bad", keys)


def test_a_crop_store_and_anndata(tmp_path: Path, crop_store: Callable[..., CropStore]):
    crops = crop_store(
        50, channels=2, size=16, columns={"donor": ["unknown"] * 50, "q_focus": np.arange(50, dtype=np.int32)}
    )
    adata = make_adata(40)
    ids = crops.metadata(["crop_id"])["crop_id"].to_pylist()
    adata.obs["cell_id"] = ids[5:45]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    keys = {"expression": expression(tmp_path / "cells.h5ad"), "quality": LENIENT}
    keys["images"] = {"uri": crops.uri, "holds": "crops"}
    with pytest.raises(CosmicError, match=r"10 of 50 images are rejected.*max_rejected_share = 0\.1"):
        run(tmp_path / "out", keys, max_rejected_share=0.1)
    results, store = run(tmp_path / "out", keys)
    assert results["images_rejected"] == {"no cell": 10} and results["simulated"] is True
    assert sorted(rejected(store.uri))[1:] == sorted(("image", name, "no cell") for name in [*ids[:5], *ids[45:]])
    assert verify_published(store.uri) == [] and store.crops.manifest.intensity == crops.manifest.intensity
    rows = np.array([ids.index(name) for name in store.obs(["cell_id"])["cell_id"].to_pylist()])
    assert np.array_equal(store.crops.crops(np.arange(40)), crops.crops(rows))
    columns = [name for name in crops.columns if name not in ("image", "donor")]
    assert set(store.crops.metadata(["donor"])["donor"].to_pylist()) == {"D0", "D1"}
    assert store.crops.metadata(columns).to_pandas().equals(crops.metadata(columns, rows).to_pandas())
    assert store.manifest.lineage[crops.uri] == crops.content_hash


def test_masks_of_a_label_image(tmp_path: Path):
    labels = np.zeros((200, 200), np.uint16)
    adata = make_adata(20)
    for number in range(1, 20):
        y, x = 20 + 40 * ((number - 1) // 5), 20 + 40 * ((number - 1) % 5)
        labels[y - 5 : y + number % 4 + 1, x - 4 : x + 5] = number
    labels[:, 198:] = 20
    Image.fromarray(labels).save(tmp_path / "labels.png")
    adata.obs["label"] = [*range(1, 18), 18, 18, 20]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    keys = {"expression": expression(tmp_path / "cells.h5ad"), "quality": LENIENT}
    keys["images"] = {"uri": str(tmp_path / "labels.png"), "holds": "labels", "label": "label", "crop_px": 24}
    results, store = run(tmp_path / "out", keys)
    assert results["cells_rejected"] == {"several cells": 2, "too large": 1}
    assert results["images_rejected"] == {"no cell": 1} and results["rows"] == 17
    assert verify_published(store.uri) == [] and store.crops.manifest.intensity.masked
    rows = store.obs(["label"])["label"].to_numpy()
    for crop, label in zip(store.crops.crops(np.arange(17)), rows, strict=True):
        assert set(np.unique(crop)) == {0, 255}
        y, x = (slice(axis.min(), axis.max() + 1) for axis in np.nonzero(crop[0]))
        inside = np.nonzero(labels == label)
        assert crop[0][y, x].shape == tuple(axis.max() - axis.min() + 1 for axis in inside)


def test_cells_without_images(tmp_path: Path):
    make_adata().write_h5ad(tmp_path / "cells.h5ad")
    results, store = run(tmp_path / "out", {"expression": expression(tmp_path / "cells.h5ad"), "quality": LENIENT})
    assert results["images"] is False and verify_published(store.uri) == []
    assert store.columns[0] == "cell_id" and "size" in store.columns and "image" not in store.columns
    with pytest.raises(DataError, match="these cells have no images"):
        store.crops  # noqa: B018
    split = MakeSplit(store=store.uri, out=str(tmp_path / "split"), by=["batch"], fractions=HALVES)
    split.check()
    split.run()
    batches = np.array(store.obs(["batch"])["batch"].to_pylist())
    codes = Split.open(split.out, store).codes
    assert all(len(set(codes[batches == batch])) == 1 for batch in set(batches))


def test_the_paper_s_quality_control(tmp_path: Path):
    """Known answers: 3 cells of few genes, 2 of much mitochondrial RNA, 1 of both; genes are counted on what stays."""
    counts = np.ones((20, 12), np.int32)
    counts[:3, 2:] = 0  # two genes
    counts[2, 10] = 9  # and mitochondrial
    counts[3:5, 10] = 50
    counts[:, 4] = 0
    counts[5:8, 4] = 1  # in three cells
    counts[:, 5] = 0
    counts[3:9, 5] = 1  # in six, of which two go
    adata = make_adata(20, 12)
    adata.X = csr_matrix(counts)
    adata.var["symbol"] = [f"g{i}" for i in range(10)] + ["mt-Nd1", "g11"]
    quality = {"min_genes": 4, "max_mito_share": 0.5, "min_cells": 4}
    results, store = run(tmp_path / "out", write_iris(tmp_path / "in", adata), quality=quality)
    assert results["cells_rejected"] == {"few genes": 3, "mitochondrial": 2} and results["rows"] == 15
    assert [name for what, name, _ in rejected(store.uri) if what == "gene"] == ["ENS00004"]
    assert store.genes["gene_id"].to_pylist() == [f"ENS{i:05}" for i in range(12) if i != 4]
    with pytest.raises(CosmicError, match=r"no cell is left: see quality\.min_genes"):
        run(tmp_path / "none", write_iris(tmp_path / "in", adata), quality={"min_genes": 500})


def spoil(adata: anndata.AnnData, row: int, value: float) -> anndata.AnnData:
    counts = adata.X.toarray()
    counts[row, 1] = value
    adata.X = csr_matrix(counts)
    return adata


def test_every_cell_at_fault_is_listed(tmp_path: Path):
    """Ids, images and counts that cannot be: each kind listed with its reason, and none of them in the store."""
    adata = make_adata(100)
    ids = adata.obs["cell_id"].astype(object).to_numpy(copy=True)
    twins, nameless = ids[2], 4
    ids[3], ids[nameless] = twins, None
    spoil(adata, 5, np.nan), spoil(adata, 6, -1), spoil(adata, 7, np.inf), spoil(adata, 8, 2.0**31)
    adata.obs["cell_id"] = ids
    keys = write_iris(tmp_path / "in", adata)
    folder = tmp_path / "in/images"
    (folder / f"{ids[9]}.jpg").unlink()
    colour = np.stack([image_of(ids[11]), image_of(ids[12]), image_of(ids[13])], axis=-1)
    bad = {
        10: encoded(image_of(ids[10], 2 * SIDE)),
        11: encoded(colour),
        12: encoded(image_of(ids[12]).astype(np.uint16) * 200, "PNG"),
        13: encoded(image_of(ids[13]))[:200],
        14: b"",
        15: b"GIF89a, not an image",
        16: encoded(np.zeros((SIDE, SIDE), np.uint8)),
    }
    for row, data in bad.items():
        (folder / f"{ids[row]}.jpg").write_bytes(data)
    (folder / "again").mkdir()
    (folder / "again" / f"{ids[17]}.jpg").write_bytes(encoded(image_of(ids[17])))
    (folder / "stranger.jpg").write_bytes(encoded(image_of("stranger")))
    (folder / "notes.txt").write_text("not an image")
    (folder / "._stranger.jpg").write_bytes(b"what macOS leaves beside")
    results, store = run(tmp_path / "out", keys)
    assert results["cells_rejected"] == {
        "black image": 1,
        "duplicate id": 2,
        "empty image": 1,
        "negative values": 1,
        "no id": 1,
        "no image": 1,
        "not finite values": 2,
        "several images": 1,
        "too large values": 1,
        "truncated image": 1,
        "unsupported format image": 1,
        "wrong pixel type": 1,
        "wrong size or channels": 2,
    }
    assert results["images_rejected"] == {"no cell": 1} and results["cells"] == 100
    rows = pq.read_table(f"{store.uri}/rejected.parquet").to_pylist()
    cells = [row for row in rows if row["what"] == "cell"]
    assert [row["source_row"] for row in cells] == list(range(2, 18))
    assert [row["id"] for row in rows if row["what"] == "image"] == ["stranger.jpg"]
    assert next(row["detail"] for row in cells if row["source_row"] == 5) == "ENS00001: nan"
    assert sorted(store.obs(["source_row"])["source_row"].to_pylist()) == [0, 1, *range(18, 100)]
    assert verify_published(store.uri) == []


def test_images_of_several_channels(tmp_path: Path):
    """Three channels as they are; files of one and of four are no files of three."""
    adata = make_adata()
    keys = write_iris(tmp_path / "in", adata)
    ids = adata.obs["cell_id"].tolist()
    pictures = {}
    for cell_id in ids:
        pictures[cell_id] = np.stack([image_of(f"{cell_id}{channel}") for channel in "RGB"], axis=-1)
        (tmp_path / "in/images" / f"{cell_id}.png").write_bytes(encoded(pictures[cell_id], "PNG"))
    for cell_id, bad in ((ids[0], image_of("grey")), (ids[1], np.stack([image_of(c) for c in "RGBA"], axis=-1))):
        (tmp_path / "in/images" / f"{cell_id}.png").write_bytes(encoded(bad, "PNG"))
    keys["images"] |= {"name": "{cell_id}.png", "channels": ["DNA", "ER", "Mito"]}
    results, store = run(tmp_path / "out", keys)
    assert results["cells_rejected"] == {"wrong size or channels": 2}
    assert store.spec.channels == ("DNA", "ER", "Mito") and verify_published(store.uri) == []
    crops = store.crops.crops(np.arange(len(store)))
    for crop, cell_id in zip(crops, store.obs(["cell_id"])["cell_id"].to_pylist(), strict=True):
        assert np.array_equal(crop, np.moveaxis(pictures[cell_id], -1, 0))


def test_columns_keep_their_names_and_types(tmp_path: Path):
    """What the job names comes first; numbers, missing ones too, truth values and text stay what they are."""
    adata = make_adata()
    adata.obs["batch"] = "not the batch"
    adata.obs["age"] = pd.array([None, *range(39)], dtype="Int64")
    adata.obs["passage"] = pd.array(range(40), dtype="Int64")
    adata.obs["note"] = [None, *["text"] * 39]
    adata.uns["simulated"] = True
    results, store = run(tmp_path / "out", write_iris(tmp_path / "in", adata))
    obs = store.obs().to_pandas().sort_values("source_row")
    assert results["simulated"] is store.simulated is True
    assert obs["batch"].tolist() == adata.obs["plate"].tolist() and set(obs["obs_batch"]) == {"not the batch"}
    assert np.isnan(obs["age"].iloc[0]) and obs["age"].tolist()[1:] == list(range(39))
    assert obs["passage"].dtype == np.int64 and obs["note"].tolist() == ["", *["text"] * 39]
    assert obs["good"].dtype == bool and obs["size"].dtype == np.float64


@settings(deadline=None, max_examples=200)
@given(
    ids=st.lists(st.sampled_from(["a", "b", "c", "d/e", "f", ""]), max_size=12),
    names=st.lists(st.sampled_from(["a.jpg", "b.jpg", "x/b.jpg", "d/e.jpg", "z.jpg", "c.png"]), max_size=8),
)
def test_nothing_is_dropped_unsaid(ids: list[str], names: list[str]):
    """Every cell is joined to its one image or listed with a reason; every image is a cell's or listed."""
    source = Files("images", Images(uri="images"), names, lambda name: b"", 1)
    joined = join(pd.DataFrame({"cell_id": pd.Series(ids, dtype=object)}), source, seed=0)
    pictures = [name for name in names if name.endswith(".jpg")]
    for row, cell_id in enumerate(ids):
        alone = ids.count(cell_id) == 1 and cell_id != ""
        own = [name for name in pictures if name == f"{cell_id}.jpg" or name.endswith(f"/{cell_id}.jpg")]
        assert (row in joined.faults) == (not alone or len(own) != 1)
        if row not in joined.faults:
            assert joined.where[row] == own[0]
    known = {f"{cell_id}.jpg" for cell_id in ids}
    assert joined.images == len(pictures)
    assert sorted(joined.orphans) == sorted(n for n in pictures if n not in known and n.split("/")[-1] not in known)


def test_too_much_at_fault_ends_the_job(tmp_path: Path):
    adata = make_adata()
    keys = write_iris(tmp_path / "in", adata)
    for cell_id in adata.obs["cell_id"][:9]:
        (tmp_path / "in/images" / f"{cell_id}.jpg").unlink()
    with pytest.raises(CosmicError, match=r"9 of 40 cells are rejected.*0\.2: 9 no image; each is listed in"):
        run(tmp_path / "out", keys)
    assert len(rejected(tmp_path / "out")) == 9 and not (tmp_path / "out/manifest.json").exists()
    (tmp_path / "in/images" / f"{adata.obs['cell_id'].iloc[0]}.jpg").write_bytes(encoded(image_of("found")))
    assert run(tmp_path / "out", keys, max_rejected_share=0.3)[0]["rows"] == 32
    renamed = make_adata(prefix="other")
    keys["expression"]["uri"] = write_iris(tmp_path / "in2", renamed)["expression"]["uri"]
    with pytest.raises(CosmicError, match=r"40 of 40 cells are rejected.*40 no image"):
        run(tmp_path / "none", keys)


def normalised(adata: anndata.AnnData) -> None:
    adata.X = csr_matrix(np.log1p(adata.X.toarray() / adata.X.sum(axis=1) * 1e4))


def by_genes(adata: anndata.AnnData) -> None:
    adata.X = csc_matrix(adata.X)


def twin_genes(adata: anndata.AnnData) -> None:
    adata.var_names = ["ENS00000", "ENS00000", *adata.var_names[2:]]


def truth_values(adata: anndata.AnnData) -> None:
    adata.X = adata.X.toarray() > 0


@pytest.mark.parametrize(
    "change,keys,problem",
    [
        (truth_values, {}, r"X holds (bool|\|b1|enum)"),
        (normalised, {}, r"not raw counts: \d+% of the values read.*for ENS0000\d in cell 'cell-0-.*values=soft"),
        (by_genes, {}, r"X is stored by genes \(CSC\).*tocsr"),
        (twin_genes, {}, r"1 gene ids stand twice: ENS00000 \(use unique ids"),
        (None, {"counts": "umi"}, r"no counts 'umi' \(expression.counts is one of X\)"),
        (None, {"cell_id": "cell"}, r"no column 'cell' \(see expression.cell_id; columns there: cell_id, plate"),
        (None, {"batch": "experiment_ID"}, r"no column 'experiment_ID' \(see expression.batch"),
        (None, {"gene_id": "ensembl"}, r"no column 'ensembl' \(see expression.gene_id; columns there: symbol"),
    ],
)
def test_expression_that_is_refused(tmp_path: Path, change: Any, keys: dict[str, Any], problem: str):
    adata = make_adata()
    if change:
        change(adata)
    made = write_iris(tmp_path / "in", adata)
    made["expression"] |= keys
    with pytest.raises(DataError, match=problem) as error:
        run(tmp_path / "out", made)
    assert error.value.uri.endswith("cells.h5ad")
    assert not (tmp_path / "out/manifest.json").exists()


def test_files_that_are_no_anndata(tmp_path: Path):
    keys = write_iris(tmp_path / "in", make_adata())
    whole = Path(keys["expression"]["uri"]).read_bytes()
    for data in (b"", b"not HDF5 at all", whole[: len(whole) // 2]):
        Path(keys["expression"]["uri"]).write_bytes(data)
        with pytest.raises(DataError, match=r"cells\.h5ad: not an HDF5 file, or a damaged one"):
            run(tmp_path / "out", keys)
    Path(keys["expression"]["uri"]).write_bytes(whole)
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 and no more")
    keys["images"]["uri"] = str(tmp_path / "broken.zip")
    with pytest.raises(DataError, match=r"broken\.zip: not a zip file"):
        run(tmp_path / "zipped", keys)


def test_soft_values_are_declared(tmp_path: Path):
    adata = make_adata()
    normalised(adata)
    keys = write_iris(tmp_path / "in", adata)
    keys["expression"]["values"] = "soft"
    results, store = run(tmp_path / "out", keys)
    made = store.to_anndata()
    assert results["values"] == made.uns["cosmic_ray"]["values"] == "soft" and made.X.dtype == np.float32
    given = adata.X[made.obs["source_row"].to_numpy()].toarray()[:, :-1].astype(np.float32)
    assert np.array_equal(made.X.toarray(), given)
    assert verify_published(store.uri) == []


def test_counts_in_raw(tmp_path: Path):
    adata = make_adata()
    adata.raw = adata.copy()
    normalised(adata)
    adata = adata[:, :10].copy()
    keys = write_iris(tmp_path / "in", adata)
    keys["expression"]["counts"] = "raw"
    _, store = run(tmp_path / "out", keys)
    assert store.manifest.genes == 29


def test_a_killed_build_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stopped at each write in turn, and run again: the same store, and what was finished is not done again."""
    keys = write_iris(tmp_path / "in", make_adata())
    whole, _ = run(tmp_path / "whole", keys, chunk_cells=10)
    write, create = storage.write_bytes, storage.create_bytes
    left = [0]

    def failing(real: Callable[..., None]) -> Callable[..., None]:
        def call(uri: str, data: bytes) -> None:
            if "_lease" not in uri and "job.json" not in uri:
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1
            real(uri, data)

        return call

    monkeypatch.setattr(storage, "write_bytes", failing(write))
    monkeypatch.setattr(storage, "create_bytes", failing(create))
    read: list[str] = []
    chunk = build.Reader.read
    monkeypatch.setattr(build.Reader, "read", lambda self, span: read.append(span.name) or chunk(self, span))
    stops, results = 0, None
    while results is None and stops < 20:
        left[0] = 5
        try:
            results, store = run(tmp_path / "out", keys, chunk_cells=10)
        except KeyboardInterrupt:
            stops += 1
    assert 4 <= stops < 20 and len(read) <= 4 + stops
    assert results["content_hash"] == whole["content_hash"] and verify_published(store.uri) == []


def test_sources_that_changed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    keys = write_iris(tmp_path / "in", make_adata())
    with monkeypatch.context() as patch:
        patch.setattr(build, "_assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", keys)
    write_iris(tmp_path / "in", make_adata(seed=0).copy()[:39].copy())
    with pytest.raises(DataError, match="began here with other sources: the expression has changed"):
        run(tmp_path / "out", keys)


def test_a_plan_and_a_split_serve_both(tmp_path: Path):
    """One split of the cells is one of their crops; a batch's expression is found by row group and row."""
    results, store = run(tmp_path / "out", write_iris(tmp_path / "in", make_adata(64)))
    job = MakeSplit(store=store.uri, out=str(tmp_path / "split"), by=["cell_id"], stratify="cell_type")
    job.check()
    job.run()
    split, of_crops = Split.open(job.out, store), Split.open(job.out, store.crops)
    assert np.array_equal(split.codes, of_crops.codes)
    plan = Plan.fitted(store.crops.content_hash, Selection.of(store.crops, of_crops, "train"), 16, seed=1, lanes=2)
    step = plan.step(0)
    rows = store.group_starts[step.row_group] + step.row
    assert (split.codes[rows] == 0).all()
    ids = store.obs(["cell_id"], rows)["cell_id"].to_pylist()
    assert store.crops.metadata(["crop_id"], rows)["crop_id"].to_pylist() == ids
    by_part = [store.read_counts(int(g))[int(r)].toarray()[0] for g, r in zip(step.row_group, step.row, strict=True)]
    assert np.array_equal(store.counts(rows).toarray(), np.array(by_part))
    assert results["rows"] == 64


@pytest.mark.slow
def test_cells_on_s3(tmp_path: Path, s3: str):
    """Read from a bucket and written to one: the same content as on disk."""
    near, _ = run(tmp_path / "out", write_iris(tmp_path / "in", make_adata(), "zip"))
    keys = write_iris(tmp_path / "in", make_adata())
    for uri in storage.listing(str(tmp_path / "in")):
        storage.write_bytes(uri.replace(str(tmp_path), s3), storage.read_bytes(uri))
    keys = json.loads(json.dumps(keys).replace(str(tmp_path), s3))
    far, store = run(f"{s3}/out", keys)
    keys["images"]["uri"] = f"{s3}/in/images.zip"
    zipped, _ = run(f"{s3}/zipped", keys)
    assert near["content_hash"] == far["content_hash"] == zipped["content_hash"]
    assert verify_published(store.uri) == []
    MakeSplit(store=store.uri, out=f"{s3}/split", by=["donor"], fractions=HALVES).run()
    assert len(Split.open(f"{s3}/split", store).codes) == 40
    assert len(store.to_anndata(np.array([3, 1]))) == 2


@pytest.mark.parametrize(
    "keys,key,problem",
    [
        ({"expression": {"uri": "{in}/no.h5ad"}}, "expression.uri", "nothing is there"),
        ({"images": {"uri": "{in}/nowhere"}}, "images.uri", "nothing is there"),
        ({"expression": {"uri": "{in}/images"}}, "expression.uri", r"no file there matches '\*\*/\*\.h5ad'"),
    ],
)
def test_sources_that_are_not_there(tmp_path: Path, keys: dict[str, Any], key: str, problem: str):
    made = write_iris(tmp_path / "in", make_adata())
    made |= json.loads(json.dumps(keys).replace("{in}", str(tmp_path / "in")))
    with pytest.raises(JobError, match=problem) as error:
        run(tmp_path / "out", made)
    assert error.value.key == key


@pytest.mark.parametrize(
    "images,problem",
    [
        ({"holds": "labels"}, "`label` is for `holds: labels`, which needs it"),
        ({"label": "x"}, "`label` is for"),
        ({"holds": "crops", "crop_px": 64}, "not for a crop store"),
        ({"name": "cell.jpg"}, r"needs \{cell_id\} once"),
    ],
)
def test_keys_that_contradict_each_other(images: dict[str, Any], problem: str):
    with pytest.raises(ValueError, match=problem):
        BuildCells(out="x", expression={"uri": "x"}, images={"uri": "y", **images})


@pytest.mark.data
def test_the_real_sets(data_root: Path, tmp_path: Path):
    """fucci_ipsc: numbers beside RNA, no images. ca1_iss: masks beside soft counts, which are no raw counts."""
    paired = data_root / "paired"
    fucci = {"uri": str(paired / "fucci_ipsc_dev.h5ad"), "cell_id": None, "symbol": "hgnc"}
    fucci |= {"batch": "experiment", "donor": "chip_id"}
    results, store = run(tmp_path / "fucci", {"expression": fucci, "quality": {"min_genes": 50}}, rows_per_group=128)
    assert (results["rows"], results["images"], results["mitochondrial_genes"]) == (673, False, 0)
    original = anndata.read_h5ad(fucci["uri"])
    made = store.to_anndata()
    assert np.array_equal(made.X.toarray(), original[made.obs_names, made.var_names].X)
    assert made.obs["size"].tolist() == original.obs.loc[made.obs_names, "size"].tolist()
    for ours, theirs in (("donor", "chip_id"), ("batch", "experiment")):
        assert made.obs[ours].tolist() == original.obs.loc[made.obs_names, theirs].astype(str).tolist()

    ca1 = {"uri": str(paired / "ca1_iss_dev.h5ad"), "cell_id": None, "cell_type": "superclass"}
    images = {"uri": str(paired / "ca1_nuclei_labels_dev.png"), "holds": "labels", "label": "label", "crop_px": 64}
    keys = {"expression": ca1, "images": images, "quality": {"min_genes": 0, "min_cells": 0}}
    with pytest.raises(DataError, match="not raw counts"):
        run(tmp_path / "ca1", keys)
    keys["expression"] = {**ca1, "values": "soft"}
    results, store = run(tmp_path / "soft", keys, rows_per_group=128)
    assert results["rows"] + sum(results["cells_rejected"].values()) == 2390
    assert verify_published(store.uri) == []
    areas = store.crops.metadata(["area_px"])["area_px"].to_numpy()
    assert np.array_equal(areas, store.obs(["area"])["area"].to_numpy())
