"""Embedding a store with Ray Data: the numbers of one process, whatever happens on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import anndata
import numpy as np
import pyarrow as pa
import pytest
import timm
import torch
from making_cell_stores import cells_of
from scipy.sparse import csr_matrix
from tiny_encoder import SIDE, encoder, export

import cosmic_ray
from cosmic_ray import storage
from cosmic_ray.errors import DataError, JobError
from cosmic_ray.inference.embed import Embed
from cosmic_ray.inference.parts import Work, embed_part
from cosmic_ray.models.transcriptome import TranscriptomeSpec, build_transcriptome
from cosmic_ray.registry.package import read_model, write_model
from cosmic_ray.registry.register import register_model
from cosmic_ray.stores.embeddings import Embeddings
from cosmic_ray.stores.split import PARTS, MakeSplit, Split

ROWS = 75


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a worker of one CPU: over another number of threads sums round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model(tmp_path: Path) -> str:
    export(str(tmp_path / "model"))
    return str(tmp_path / "model")


def job(store, model: str, out: str, **keys: object) -> Embed:
    return Embed(
        **{"store": store.uri, "model": model, "out": out, "batch_size": 8, "part_rows": 20, "workers": 1} | keys
    )


def annotated(out: str, tmp_path: Path) -> anndata.AnnData:
    path = tmp_path / "read.h5ad"
    path.write_bytes(storage.read_bytes(f"{out}/embeddings.h5ad"))
    return anndata.read_h5ad(path)


def in_process(model: str, store) -> np.ndarray:
    return cosmic_ray.load_model(model, device="cpu").embed(store.crops(np.arange(len(store))), batch_size=8)


@pytest.mark.slow
def test_parts_and_anndata_hold_what_one_process_computes(ray_local, crop_store, model, tmp_path):
    store = crop_store(ROWS, columns={"q_focus": np.linspace(0, 1, ROWS, dtype=np.float32)})
    out, split = str(tmp_path / "out"), str(tmp_path / "split")
    MakeSplit(store=store.uri, out=split, seed=1, near_duplicates={"crops": None, "fields": None}).run()
    results = job(store, model, out, workers=2, split=split).run()
    wanted = in_process(model, store)
    about = store.metadata([name for name in store.columns if name != "image"])
    embeddings = Embeddings.open(out)
    np.testing.assert_array_equal(embeddings.vectors(), wanted)
    table = pa.concat_tables(embeddings.parts())
    assert table["crop_id"].to_pylist() == about["crop_id"].to_pylist()
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 24)
    found = annotated(out, tmp_path)
    np.testing.assert_array_equal(found.X, wanted)
    assert found.obs_names.tolist() == about["crop_id"].to_pylist()
    assert found.obs["plate"].tolist() == about["plate"].to_pylist()
    np.testing.assert_array_equal(found.obs["q_focus"], about["q_focus"])
    assert {key: results[key] for key in ("rows", "width", "parts", "simulated")} == {
        "rows": ROWS,
        "width": 24,
        "parts": 4,
        "simulated": True,
    }
    assert results["crops_per_s"] > 0
    assert 0 <= results["data_wait_share"] <= 1
    in_parts = [PARTS[code] for code in Split.open(split, store).codes]
    assert table["split"].to_pylist() == in_parts
    assert found.obs["split"].tolist() == in_parts
    assert embeddings.manifest["lineage"]["split"]["content_hash"] == Split.open(split, store).content_hash
    assert job(store, model, out, workers=1, split=split).run() == {
        key: value for key, value in results.items() if key not in ("crops_per_s", "data_wait_share")
    }
    part = Path(out, "part-00001.parquet")
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"part-00001\.parquet: its bytes"):
        embeddings.vectors()


@pytest.mark.slow
def test_a_registered_model_into_a_bucket_with_its_lineage(ray_local, crop_store, model, tmp_path, tracking, s3):
    store, out = crop_store(ROWS), f"{s3}/out"
    version = register_model(model, "embedder", tracking=tracking)
    embed = job(store, "models:/embedder@candidate", out, tracking_uri=tracking)
    embed.run()
    embeddings = Embeddings.open(out)
    config = json.loads(Path(model, "config.json").read_text())
    assert embeddings.manifest["lineage"] == {
        "store": {"uri": store.uri, "content_hash": store.content_hash},
        "model": {
            "uri": f"models:/embedder/{version}",
            "content_hash": config["digest"],
            "lineage": config["lineage"],
        },
    }
    uns = annotated(out, tmp_path).uns["cosmic_ray"]
    assert json.loads(uns["lineage"]) == embeddings.manifest["lineage"]
    assert uns["content_hash"] == embeddings.manifest["content_hash"]
    np.testing.assert_array_equal(embeddings.vectors(), in_process(model, store))
    for name in ("manifest.json", "part-00001.json"):
        storage.delete(f"{out}/{name}")
    export(model, seed=1)
    register_model(model, "embedder", tracking=tracking)
    with pytest.raises(DataError, match=f"began with model models:/embedder/{version}"):
        embed.run()


@pytest.mark.exhaustive
def test_damaged_input_is_named_and_what_was_done_is_kept(ray_local, crop_store, model, tmp_path):
    store, out = crop_store(ROWS), str(tmp_path / "out")
    group = store.row_groups[-1]
    shard = Path(group.shard)
    whole = shard.read_bytes()
    shard.write_bytes(whole[: group.offset] + b"damage" + whole[group.offset + 6 :])
    with pytest.raises(DataError, match=shard.name):
        job(store, model, out).run()
    done = {uri: Path(uri).stat().st_mtime_ns for uri in storage.listing(out, "part-*.parquet")}
    assert not Path(out, "manifest.json").exists()
    shard.write_bytes(whole)
    job(store, model, out).run()
    assert {uri: Path(uri).stat().st_mtime_ns for uri in done} == done, "a finished part is not made again"
    np.testing.assert_array_equal(Embeddings.open(out).vectors(), in_process(model, store))


KILLED = """
import sys
from cosmic_ray.inference.embed import Embed
Embed(store=sys.argv[1], model=sys.argv[2], out=sys.argv[3], batch_size=8, part_rows=8, workers=1).run()
"""


@pytest.mark.slow
def test_killed_outright_it_ends_with_the_same_bytes(ray_local, crop_store, model, tmp_path):
    import ray

    store, out = crop_store(800), str(tmp_path / "out")
    address = ray.get_runtime_context().gcs_address
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, store.uri, model, out],
        env={**os.environ, "RAY_ADDRESS": address},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not Path(out, "part-00002.json").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 3 <= len(storage.listing(out, "part-*.json")) < 100
    assert not Path(out, "manifest.json").exists()
    Embed(store=store.uri, model=model, out=out, batch_size=8, part_rows=8, workers=1).run()
    assert not list(Path(out).glob(".part*"))
    work = Work(store.uri, str(tmp_path / "whole"), model, "", None, 8, 8, "float32", "cpu")
    encoder = cosmic_ray.load_model(model, device="cpu")
    for part in range(100):
        embed_part(work, part, encoder, store, None)
        for end in ("parquet", "json"):
            name = f"part-{part:05}.{end}"
            assert Path(out, name).read_bytes() == Path(work.out, name).read_bytes()


@pytest.mark.slow
def test_more_workers_than_the_cluster_holds_are_refused(ray_local, crop_store, model, tmp_path):
    store = crop_store(8)
    with pytest.raises(JobError, match="at most 4 fit") as refused:
        Embed(store=store.uri, model=model, out=str(tmp_path / "out"), workers=5).run()
    assert refused.value.key == "workers"
    with pytest.raises(JobError, match="1 accelerators; the cluster has 4 CPUs and 0"):
        Embed(store=store.uri, model=model, out=str(tmp_path / "out2"), gpus_per_worker=1).run()


@pytest.mark.parametrize(
    ("keys", "key", "says"),
    [
        ({"store": "/no/store"}, "store", "nothing is published"),
        ({"model": "/no/model"}, "model", "no model is here"),
        ({"model": "models:/morphology-fm@latest"}, "model", "name an alias or a version"),
        ({"split": "/no/split"}, "split", "no split is published"),
    ],
)
def test_missing_inputs_are_refused_before_anything_starts(crop_store, model, tmp_path, keys, key, says):
    whole = {"store": crop_store(8).uri, "model": model, "out": str(tmp_path / "out")}
    Embed(**whole).check()
    with pytest.raises(JobError, match=says) as refused:
        Embed(**{**whole, **keys}).check()
    assert refused.value.key == key
    assert not Path(tmp_path, "out").exists()


@pytest.mark.parametrize("uri", ["models:/nobody@candidate", "models:/nobody/1", "models:/somebody@nobody"])
def test_a_model_that_nobody_registered_is_refused_by_name(crop_store, model, tmp_path, tracking, uri):
    register_model(model, "somebody", tracking=tracking)
    whole = {"store": crop_store(8).uri, "out": str(tmp_path / "out")}
    Embed(**whole, model="models:/somebody@candidate").check()
    with pytest.raises(
        JobError, match=r"(not found|No model version|Registered).*the registry is .*register it"
    ) as refused:
        Embed(**whole, model=uri).check()
    assert (refused.value.key, refused.value.value) == ("model", uri)


def test_without_a_registry_at_all_no_model_is_searched(crop_store, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(JobError, match=r"no tracking database at .* MLFLOW_TRACKING_URI") as refused:
        Embed(store=crop_store(8).uri, out="out").check()
    assert refused.value.key == "model" and not Path("runs").exists()
    away = Embed(store=crop_store(8).uri, out="out", tracking_uri="http://127.0.0.1:9")
    with pytest.raises(JobError, match="no tracking server answers"):
        away.check()


@pytest.mark.parametrize(
    ("store", "channels", "says"),
    [
        ({"size": SIDE * 2}, 1, r"takes crops of \(1, 16, 16\)"),
        ({"channels": 2}, 1, "takes crops"),
        ({}, 2, "takes crops"),
    ],
)
def test_a_model_that_does_not_take_the_stores_crops_is_refused(crop_store, tmp_path, store, channels, says):
    export(str(tmp_path / "model"), channels=channels)
    with pytest.raises(JobError, match=says):
        Embed(store=crop_store(4, **store).uri, model=str(tmp_path / "model"), out=str(tmp_path / "out")).check()


def test_of_several_channels_the_order_counts(crop_store, tmp_path):
    store, folder = crop_store(4, channels=2), str(tmp_path / "model")
    spec = {"height": SIDE, "width": SIDE}
    export(folder, channels=2, input={"channels": ["channel-0", "channel-1"], **spec})
    Embed(store=store.uri, model=folder, out=str(tmp_path / "out")).check()
    export(folder, channels=2, input={"channels": ["channel-1", "channel-0"], **spec})
    with pytest.raises(JobError, match="takes channels"):
        Embed(store=store.uri, model=folder, out=str(tmp_path / "out")).check()


def test_the_last_block_makes_the_embedding_of_the_tokens(crop_store, tmp_path):
    """What stage 1 of the published img2seq trains: block, norm, mean over the patches' tokens."""
    store, model = crop_store(20), str(tmp_path / "model")
    kwargs = {**encoder()[0], "fc_norm": False}  # as our training exports them
    export(model, network=kwargs, state_dict=timm.create_model(**kwargs).state_dict())
    tokens = cosmic_ray.load_model(model, device="cpu").tokens(store.crops(np.arange(20)), batch_size=8)
    assert tokens.dtype == np.float16 and tokens.shape == (20, 1 + 16, 24)
    network = read_model(model).network()
    with torch.no_grad():
        made = network.norm(network.blocks[-1](torch.from_numpy(tokens).float()))[:, 1:].mean(1).numpy()
    wanted = in_process(model, store)
    np.testing.assert_allclose(made, wanted, rtol=0, atol=2e-3)
    assert np.abs(wanted - wanted.mean(0)).max() > 0.1
    assert np.abs(tokens.astype(np.float32)[:, 1:].mean(1) - wanted).max() > 0.1


@pytest.mark.slow
def test_tokens_of_a_store_as_they_are_read(ray_local, crop_store, model, tmp_path):
    store, out = crop_store(ROWS), str(tmp_path / "out")
    job(store, model, out, output="tokens").run()
    found = Embeddings.open(out)
    assert found.shape == (17, 24) and found.width == 24 and len(found) == ROWS
    wanted = cosmic_ray.load_model(model, device="cpu").tokens(store.crops(np.arange(ROWS)), batch_size=8)
    np.testing.assert_array_equal(found.vectors(), wanted)
    rows = np.array([74, 3, 3, 40])
    np.testing.assert_array_equal(found.vectors(rows), wanted[rows])
    assert not Path(out, "embeddings.h5ad").exists()
    part = next(found.parts())
    assert part.schema.field("tokens").type == pa.list_(pa.float16(), 17 * 24)


def test_tokens_that_float16_cannot_hold_are_named(crop_store, model, tmp_path):
    weights = read_model(model).tensors()
    weights["pos_embed"] = weights["pos_embed"] + 1e6
    hot = str(tmp_path / "hot")
    export(hot, state_dict=weights)
    store = crop_store(20)
    work = Work(store.uri, str(tmp_path / "out"), hot, "", None, 16, 8, "float32", "cpu", "tokens")
    with pytest.raises(DataError, match=r"near row 0: the tokens of crop 0 is not finite"):
        embed_part(work, 0, cosmic_ray.load_model(hot, device="cpu"), store, None)
    assert not Path(tmp_path, "out").exists()


def test_an_anndata_holds_no_tokens(crop_store, model, tmp_path):
    with pytest.raises(ValueError, match="holds no tokens"):
        job(crop_store(8), model, str(tmp_path / "out"), output="tokens", anndata=True)


@pytest.fixture
def cell_store(crop_store, tmp_path):
    counts = csr_matrix(np.random.default_rng(3).poisson(1.5, (ROWS, 12)))
    return cells_of(str(tmp_path / "cells"), counts, crops=crop_store(ROWS))


def export_expression(folder: str, genes: list[str], method: str = "pca") -> str:
    """An untrained transcriptome encoder of width 5."""
    spec = TranscriptomeSpec(method, len(genes), 5, hidden=8, target_total=20.0)
    torch.manual_seed(0)
    network = build_transcriptome(spec)
    if method == "pca":
        network.axes.normal_()
    facts = {"network": asdict(spec), "genes": genes, "total_genes": None, "batches": ["a"]}
    about = {"lineage": {"job": "test"}, "card": "", "simulated": True}
    write_model(folder, "transcriptome-encoder", facts, network.state_dict(), **about)
    return folder


@pytest.mark.slow
def test_a_cell_store_by_its_images_and_by_its_expression(ray_local, cell_store, model, tmp_path):
    images = job(cell_store, model, str(tmp_path / "images"), workers=2)
    assert images.run()["cells_per_s"] > 0
    features = Embeddings.open(images.out)
    np.testing.assert_array_equal(features.vectors(), in_process(model, cell_store.crops))
    crops_hash = cell_store.crops.content_hash
    whole = {"uri": cell_store.uri, "content_hash": cell_store.content_hash, "crops_hash": crops_hash}
    assert features.lineage["store"] == whole
    features.require(cell_store)
    features.require(cell_store.crops)
    ids = cell_store.obs(["cell_id"])["cell_id"].to_pylist()
    assert pa.concat_tables(features.parts())["cell_id"].to_pylist() == ids
    found = annotated(images.out, tmp_path)
    assert found.obs_names.tolist() == ids
    assert found.obs["batch"].tolist() == cell_store.obs(["batch"])["batch"].to_pylist()
    assert found.obs["plate"].tolist() == cell_store.crops.metadata(["plate"])["plate"].to_pylist()
    folder = export_expression(str(tmp_path / "expression"), [f"g{gene}" for gene in (7, 2, 11)])
    expression = job(cell_store, folder, str(tmp_path / "latents"))
    expression.run()
    latents = Embeddings.open(expression.out)
    wanted = cosmic_ray.load_model(folder, device="cpu").embed(cell_store.to_anndata())
    np.testing.assert_allclose(latents.vectors(), wanted, rtol=0, atol=1e-6)
    assert wanted.std(0).min() > 0.1
    latents.require(cell_store)
    assert annotated(expression.out, tmp_path).shape == (ROWS, 5)


def test_models_that_do_not_take_the_stores_rows_are_refused(crop_store, cell_store, model, tmp_path):
    out, genes = str(tmp_path / "out"), [f"g{gene}" for gene in range(3)]
    pca = export_expression(str(tmp_path / "pca"), genes)
    scvi = export_expression(str(tmp_path / "scvi"), genes, "scvi")
    lacking = export_expression(str(tmp_path / "lacking"), [*genes, "g99"])
    counts = csr_matrix(np.ones((9, 12)) * 0.5)
    soft = cells_of(str(tmp_path / "soft"), counts, values="soft")
    job(cell_store, scvi, out).check()
    job(soft, pca, out).check()
    for store, folder, changes, key, says in (
        (crop_store(8), pca, {}, "model", "takes expression; this is a crop store"),
        (soft, scvi, {}, "model", "takes raw counts; the store holds soft"),
        (cell_store, lacking, {}, "model", "1 of 4 genes are missing: g99"),
        (soft, model, {}, "store", "these cells have no images"),
        (cell_store, pca, {"output": "tokens"}, "output", "has no tokens"),
    ):
        with pytest.raises(JobError, match=says) as refused:
            job(store, folder, out, **changes).check()
        assert refused.value.key == key
