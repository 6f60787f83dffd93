"""Generation with Ray Data: what one process gives, whatever the workers; the cycle; what does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pyarrow as pa
import pytest
import torch
from making import MakeTestStore, make_store
from making_cell_stores import cells_of
from scipy.sparse import csr_matrix
from tiny_encoder import SIDE, export
from tiny_models import GENES, LATENT, LATENTS_BY, export_seq2img, shaken

import cosmic_ray
from cosmic_ray import jobs
from cosmic_ray.errors import DataError, JobError
from cosmic_ray.inference.generate import Generate
from cosmic_ray.models.img2seq import Img2SeqConfig
from cosmic_ray.output import claim, read_manifest
from cosmic_ray.registry.kinds.img2seq import Img2SeqModelConfig
from cosmic_ray.registry.package import read_config, write_model
from cosmic_ray.stores.cells import CellStore
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.embeddings import Embeddings, write_embeddings
from cosmic_ray.stores.split import MakeSplit, Split

CELLS = 50


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a worker of one CPU: over another number of threads sums round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Cells with images of 16 px, their split and latents, and three untrained models."""
    folder = str(tmp_path_factory.mktemp("generate"))
    random = np.random.default_rng(3)
    crops = make_store(f"{folder}/crops", CELLS, size=SIDE)
    store = cells_of(f"{folder}/cells", csr_matrix(random.poisson(1, (CELLS, 5))), crops=crops)
    near = {"crops": None, "fields": None}
    MakeSplit(store=store.uri, by=["cell_id"], out=f"{folder}/split", near_duplicates=near, seed=2).run()
    for name, digest in (("scvi", LATENTS_BY), ("other", "9" * 64)):
        ids, values = store.obs(["cell_id"])["cell_id"].combine_chunks(), random.normal(size=(CELLS, LATENT))
        lineage = {"model": {"uri": f"models:/{name}/1", "content_hash": digest, "lineage": {}}}
        with claim(MakeTestStore(out=f"{folder}/{name}")) as target:
            about = {"store": store, "lineage": lineage, "simulated": True, "job": {}}
            write_embeddings(target.inside("latents"), pa.array(ids), values.astype(np.float32), **about)
    export_seq2img(f"{folder}/seq2img")
    export(f"{folder}/fm")
    export(f"{folder}/fm-other", seed=1)
    _export_img2seq(f"{folder}/img2seq", read_config(f"{folder}/fm").digest)
    return {name: f"{folder}/{name}" for name in ("cells", "split", "seq2img", "fm", "fm-other", "img2seq")} | {
        "latents": f"{folder}/scvi/latents",
        "other": f"{folder}/other/latents",
    }


def _export_img2seq(folder: str, fm: str) -> None:
    config = Img2SeqConfig("better", len(GENES), 24, hidden=16, depth=1, programs=4)
    torch.manual_seed(0)
    network = shaken(config.build(), 0)
    network.calibration.fit(torch.randn(50, len(GENES), generator=torch.Generator().manual_seed(0)))
    features = {"width": 24, "model": fm, "tokens": None}
    facts = Img2SeqModelConfig.facts(config, genes=list(GENES), features=features)
    lineage = {"store": {"uri": "s3://bucket/cells", "content_hash": "5" * 64}}
    write_model(folder, "img2seq", facts, network.state_dict(), lineage=lineage, card="#", simulated=True)


def drawing(made: dict[str, str], out: str, **keys: Any) -> Generate:
    given = {key: made[key] for key in ("cells", "latents", "seq2img")}
    images = {"samples": 2, "rows_per_group": 8, "steps": 2}
    return Generate(**{"out": out, **given, "images": images, "batch_size": 7, "workers": 1} | keys)


def predicting(made: dict[str, str], out: str, **keys: Any) -> Generate:
    given = {"crops": made["cells"], "fm": made["fm"], "img2seq": made["img2seq"]}
    expression = {"samples": 3, "level": 0.8, "keep_samples": True}
    return Generate(**{"out": out, **given, "expression": expression, "workers": 1} | keys)


@pytest.mark.slow
def test_images_are_those_of_the_model_for_each_cell_and_seed(made, ray_local, tmp_path: Path) -> None:
    job = drawing(made, str(tmp_path / "images"), split=made["split"], part="train", seed=4)
    job.check()
    results = job.run()
    assert json.loads(json.dumps(results)) == results
    cells, store = CellStore.open(made["cells"]), CropStore.open(job.out)
    rows = Split.open(made["split"], cells).rows("train")
    about = store.metadata(["crop_id", "cell_id", "sample", "source", "plate", "cell_type", "area_px"])
    ids = cells.obs(["cell_id"], rows)["cell_id"].to_pylist()
    assert about["cell_id"].to_pylist() == ids * 2 and results["images"]["rows"] == 2 * len(rows) > 64
    assert about["sample"].to_pylist() == [0] * len(rows) + [1] * len(rows)
    assert about["crop_id"][len(rows)].as_py() == f"{ids[0]}#1" and set(about["source"].to_pylist()) == {"generated"}
    assert about["plate"].to_pylist()[: len(rows)] == cells.crops.metadata(["plate"], rows)["plate"].to_pylist()
    model, latents = cosmic_ray.load_model(made["seq2img"], device="cpu"), Embeddings.open(made["latents"])
    drawn = np.concatenate([model.sample(latents.vectors(rows), ids, seed=seed, steps=2) for seed in (4, 5)])
    crops = store.crops(np.arange(len(store)))
    assert np.abs(crops.astype(int) - drawn).max() <= 1, "whatever the batches"
    assert (crops == drawn).mean() > 0.99 and not np.array_equal(drawn[: len(rows)], drawn[len(rows) :])
    assert np.array_equal(about["area_px"].to_numpy(), (crops > 0).any(1).sum((1, 2)))
    lineage = store.manifest.lineage
    assert lineage[made["seq2img"]] == read_config(made["seq2img"]).digest
    assert lineage[made["latents"]] == latents.content_hash and store.simulated
    assert job.run()["images"]["content_hash"] == results["images"]["content_hash"], "a finished job is looked at"


@pytest.mark.slow
def test_a_run_that_lost_a_part_ends_alike_with_other_workers(made, ray_local, tmp_path: Path) -> None:
    whole = drawing(made, str(tmp_path / "whole")).run()["images"]
    job = drawing(made, str(tmp_path / "killed"), workers=2)
    job.run()
    out = Path(job.out)
    (out / "manifest.json").unlink()
    kept = (out / "shards" / "shard-00000.parquet").stat().st_mtime_ns
    for path in (out / "shards").glob("shard-00001.*"):
        path.unlink()
    assert job.run()["images"]["content_hash"] == whole["content_hash"]
    assert (out / "shards" / "shard-00000.parquet").stat().st_mtime_ns == kept, "what is there is not made again"


@pytest.mark.slow
def test_expression_is_that_of_the_model(made, ray_local, tmp_path: Path) -> None:
    job = predicting(made, str(tmp_path / "expression"), seed=3)
    job.check()
    results = job.run()["expression"]
    found, cells = anndata.read_h5ad(results["uri"]), CellStore.open(made["cells"])
    ids = cells.obs(["cell_id"])["cell_id"].to_pylist()
    assert found.shape == (CELLS, len(GENES)) and list(found.var_names) == list(GENES)
    assert list(found.obs_names) == list(found.obs["cell_id"]) == ids
    features = cosmic_ray.load_model(made["fm"], device="cpu").embed(cells.crops.crops(np.arange(CELLS)))
    wanted = cosmic_ray.load_model(made["img2seq"], device="cpu").sample(features, ids, samples=3, seed=3)
    assert np.allclose(found.X, wanted.mean, atol=1e-5)
    for layer, values in zip(("lower", "upper"), wanted.interval(0.8), strict=True):
        assert np.allclose(found.layers[layer], values, atol=1e-5)
    assert all(np.allclose(found.layers[f"sample_{k}"], wanted.samples[:, k], atol=1e-5) for k in range(3))
    about = found.uns["cosmic_ray"]
    lineage = json.loads(about["lineage"])
    assert about["simulated"] and lineage["img2seq"]["content_hash"] == read_config(made["img2seq"]).digest
    assert lineage["fm"]["lineage"]["store"]["content_hash"] == "5" * 64
    assert read_manifest(job.out)["content_hash"] == results["content_hash"]
    assert not (Path(job.out) / "scratch").exists()


@pytest.mark.slow
def test_the_cycle_tells_the_expression_of_the_images_that_it_drew(made, ray_local, tmp_path: Path) -> None:
    given = {"fm": made["fm"], "img2seq": made["img2seq"], "split": made["split"], "part": "val"}
    job = drawing(made, str(tmp_path / "cycle"), **given)
    results = job.run()
    images, found = CropStore.open(results["images"]["uri"]), anndata.read_h5ad(results["expression"]["uri"])
    assert len(images) == len(found) == results["expression"]["rows"] and "sample_0" not in found.layers
    assert list(found.obs_names) == images.metadata(["crop_id"])["crop_id"].to_pylist()
    assert list(found.obs["cell_id"]) == images.metadata(["cell_id"])["cell_id"].to_pylist()
    features = cosmic_ray.load_model(made["fm"], device="cpu").embed(images.crops(np.arange(len(images))))
    wanted = cosmic_ray.load_model(made["img2seq"], device="cpu").sample(features, samples=1).mean
    assert np.allclose(found.X, wanted, atol=1e-5)
    assert {"store", "split", "latents", "seq2img", "fm", "img2seq"} == set(read_manifest(job.out)["lineage"])


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"seq2img": None, "cells": None, "latents": None}, "give seq2img, for images; img2seq, for expression"),
        ({"latents": None}, "give cells and latents"),
        ({"part": "val"}, "split and part go together"),
        ({"img2seq": "m"}, "give fm"),
        ({"img2seq": "m", "fm": "f", "crops": "c"}, "give crops, or seq2img to draw them first"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(made, keys: dict, text: str) -> None:
    tree = {"kind": "generate", **drawing(made, "o").model_dump()} | keys
    with pytest.raises(JobError, match=text):
        jobs.make(tree)


def test_what_is_not_there_or_of_another_kind_is_refused(made, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"seq2img = .*a model of kind encoder.*wanted here: seq2img"):
        drawing(made, "o", seq2img=made["fm"]).check()
    with pytest.raises(JobError, match=r"latents = '.*nowhere'"):
        drawing(made, "o", latents=str(tmp_path / "nowhere")).check()
    with pytest.raises(JobError, match=r"cells = '.*nowhere'"):
        drawing(made, "o", cells=str(tmp_path / "nowhere")).check()


def test_another_encoder_or_another_fm_is_refused(made, tmp_path: Path) -> None:
    """Before Ray is started."""
    with pytest.raises(JobError, match=r"latents = .*of model 999999999999; .* was trained with .*eeeeeeeeeeee"):
        drawing(made, str(tmp_path / "a"), latents=made["other"]).run()
    with pytest.raises(JobError, match=r"fm = .*its digest is .*; .* was trained with"):
        predicting(made, str(tmp_path / "b"), fm=made["fm-other"]).run()


def test_guidance_of_a_model_that_cannot_be_guided_is_refused(made, tmp_path: Path) -> None:
    sampling = {"sampler": "unipc", "steps": 2, "guidance": 1.0}
    export_seq2img(str(tmp_path / "plain"), condition_drop=0.0, sampling=sampling)
    job = drawing(made, str(tmp_path / "out"), seq2img=str(tmp_path / "plain"), images={"guidance": 2.0})
    with pytest.raises(JobError, match=r"images.guidance = 2.0: .*never trained without latents"):
        job.run()


@pytest.mark.slow
def test_a_continued_run_refuses_other_inputs(made, ray_local, tmp_path: Path) -> None:
    model = str(tmp_path / "seq2img")
    export_seq2img(model)
    job = drawing(made, str(tmp_path / "out"), seq2img=model)
    job.run()
    (Path(job.out) / "manifest.json").unlink()
    export_seq2img(model, seed=1)
    with pytest.raises(DataError, match="began with seq2img"):
        job.run()
