"""The job: what it leaves, for whom, and that it is done once; and ready embeddings, joined by cell id."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from making_transcriptomes import Cells, expression

import cosmic_ray
from cosmic_ray import jobs, storage
from cosmic_ray.errors import DataError, JobError
from cosmic_ray.output import read_manifest
from cosmic_ray.registry.package import read_config
from cosmic_ray.stores.embeddings import Embeddings
from cosmic_ray.transcriptome.job import FitTranscriptome


@pytest.fixture(scope="module")
def cells(tmp_path_factory) -> Cells:
    return Cells.make(str(tmp_path_factory.mktemp("transcriptome")))


@pytest.mark.slow
def test_scvi_leaves_a_registered_model_and_latents(ray_local, cells, tmp_path, tracking, capfd):
    job = cells.job(out=str(tmp_path / "out"), tracking={"register_as": "scvi-for-a-test"})
    results = job.run()
    log = capfd.readouterr().err
    assert "30 genes, of 60; 190 cells of 3 batches to fit on" in log and "3/3 epochs" in log
    latents = Embeddings.open(results["latents"])
    latents.require(cells.store)
    config = read_config(results["model"])
    split = cells.opened_split()
    made_of = {"uri": cells.store.uri, "content_hash": cells.store.content_hash}
    by = {"uri": split.uri, "content_hash": split.content_hash}
    assert config.lineage == {"store": made_of, "split": by, "job": job.fingerprint()}
    model = {"uri": results["model"], "content_hash": config.digest, "lineage": config.lineage}
    assert latents.lineage == {"store": made_of, "model": model, "split": by}
    assert config.simulated and latents.simulated and config.batches == ("batch-0", "batch-1", "batch-2")
    assert read_manifest(job.out)["lineage"] == config.lineage
    registered = cosmic_ray.load_model("models:/scvi-for-a-test@candidate", device="cpu")
    adata = cells.store.to_anndata()[:, ::-1]
    np.testing.assert_allclose(registered.embed(adata), latents.vectors(), rtol=0, atol=1e-5)
    assert latents.vectors().std() > 0.01
    weights = {Path(uri).name for uri in storage.listing(results["model"])}
    assert weights == {"config.json", "card.md", "transcriptome-encoder.safetensors"}
    assert "val/negative_elbo" in Path(results["model"], "card.md").read_text()
    assert _history(tracking, results["run_id"], "val/reconstruction") == [1, 2, 3]
    assert job.run() == results, "it is done once"


def _history(tracking: str, run: str, key: str) -> list[int]:
    from mlflow import MlflowClient

    return [metric.step for metric in MlflowClient(tracking).get_metric_history(run, key)]


@pytest.mark.exhaustive
def test_pca_into_a_bucket(ray_local, cells, s3):
    results = cells.job(method="pca", out=f"{s3}/out").run()
    latents = Embeddings.open(f"{s3}/out/latents").vectors()
    model = cosmic_ray.load_model(results["model"], device="cpu")
    np.testing.assert_allclose(model.embed(cells.store.to_anndata()), latents, rtol=0, atol=1e-5)
    assert results["train/explained_variance"] > 0.5


@pytest.mark.exhaustive
def test_a_fit_that_fails_says_why_and_leaves_the_output_free(ray_local, cells, tmp_path):
    scvi = {"hidden": 16, "epochs": 3, "batch_size": 32, "lr": 1e20}
    with pytest.raises(Exception, match="no number any more in epoch 1") as failed:
        cells.job(out=str(tmp_path / "out"), scvi=scvi).run()
    assert isinstance(failed.value, cosmic_ray.errors.CosmicError)
    assert not Path(tmp_path, "out", "manifest.json").exists()
    with pytest.raises(JobError, match="no node has so many; the largest has 4"):
        cells.job(out=str(tmp_path / "wide"), cpus=64).run()


INTERRUPTED = """
import sys
from cosmic_ray.transcriptome.job import FitTranscriptome
scvi = {"hidden": 16, "epochs": 100000, "batch_size": 32}
cells, split, out = sys.argv[1:]
FitTranscriptome(cells=cells, split=split, out=out, genes=30, latent=5, tracking=None, scvi=scvi).run()
"""


@pytest.mark.exhaustive
def test_ctrl_c_ends_the_worker_too_and_the_job_can_be_done_again(ray_local, cells, tmp_path):
    import ray

    out, log = str(tmp_path / "out"), tmp_path / "log"
    address = ray.get_runtime_context().gcs_address
    free = ray.cluster_resources()["CPU"]
    with open(log, "w") as written:
        process = subprocess.Popen(
            [sys.executable, "-c", INTERRUPTED, cells.store.uri, cells.split, out],
            env={**os.environ, "RAY_ADDRESS": address},
            stderr=written,
        )
        while process.poll() is None and "train/kl" not in log.read_text():
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) != 0
    assert "KeyboardInterrupt" in log.read_text()
    while ray.available_resources().get("CPU", 0) < free:
        time.sleep(0.2)  # the test's own time limit ends this where the worker lives on
    assert not Path(out, "manifest.json").exists()
    again = cells.job(out=out, genes=30, scvi={"hidden": 16, "epochs": 1, "batch_size": 32})
    with pytest.raises(JobError, match="holds another job"):
        again.run()


def test_keys_that_contradict_each_other(cells):
    for changes, says in (
        ({"method": "obsm"}, "needs it"),
        ({"method": "pca", "obsm": {"adata": "a.h5ad", "key": "X"}}, "needs it"),
        ({"split": None}, "needed to fit"),
        ({"method": "obsm", "obsm": {"adata": "a.h5ad", "key": "X"}}, "takes none"),
    ):
        tree = {**cells.job().resolved(), **changes}
        with pytest.raises(JobError, match=says):
            jobs.make(tree)


@pytest.mark.parametrize(
    ("changes", "key", "says"),
    [
        ({"cells": "/no/cells"}, "cells", "nothing is published"),
        ({"split": "/no/split"}, "split", "no split is published"),
        ({"method": "obsm", "split": None, "obsm": {"adata": "/no/file", "key": "X"}}, "obsm.adata", "nothing is"),
    ],
)
def test_missing_inputs_are_refused_before_anything_starts(cells, tmp_path, changes, key, says):
    with pytest.raises(JobError, match=says) as refused:
        cells.job(out=str(tmp_path / "out"), **changes).check()
    assert refused.value.key == key
    assert not Path(tmp_path, "out").exists()


def test_a_split_of_other_cells_is_refused(cells, tmp_path):
    other = Cells.make(str(tmp_path), cells=60)
    with pytest.raises(DataError, match="this split is of another store"):
        cells.job(out=str(tmp_path / "out"), split=other.split).run()


class Ready:
    """An h5ad with an embedding of the store's cells, in another order and with one cell more."""

    def __init__(self, cells: Cells, folder: Path):
        ids = cells.store.obs(["cell_id"])["cell_id"].to_pylist()
        rng = np.random.default_rng(4)
        self.order = rng.permutation(len(ids))
        self.values = rng.normal(size=(len(ids) + 1, 6)).astype(np.float32)
        self.ids = [*[ids[row] for row in self.order], "another"]
        self.uri, self._cells = str(folder / "uce.h5ad"), cells

    def job(self, out: str, **changes: Any) -> FitTranscriptome:
        obs = pd.DataFrame({"name": self.ids}, index=[f"row-{row}" for row in range(len(self.ids))])
        anndata.AnnData(obs=obs, obsm={"X_uce": self.values}).write_h5ad(self.uri)
        source = {"adata": self.uri, "key": "X_uce", "cell_id": "name"} | changes
        return self._cells.job(out=out, method="obsm", split=None, obsm=source)


@pytest.fixture
def ready(cells, tmp_path) -> Ready:
    return Ready(cells, tmp_path)


def test_a_ready_embedding_is_joined_by_cell_id(cells, ready, tmp_path):
    results = ready.job(str(tmp_path / "out")).run()
    latents = Embeddings.open(results["latents"])
    wanted = np.empty((len(cells.store), 6), np.float32)
    wanted[ready.order] = ready.values[:-1]
    np.testing.assert_array_equal(latents.vectors(), wanted)
    latents.require(cells.store)
    assert latents.lineage["model"] is None
    assert latents.lineage["ready"]["fitted_on"] == "unknown"
    assert results["model"] is None and (results["rows"], results["width"]) == (240, 6)


def test_ready_embeddings_that_are_refused(cells, ready, tmp_path):
    out, whole, ids = str(tmp_path / "out"), ready.values, ready.ids
    with pytest.raises(DataError, match=r"obsm has no 'X_pca' \(it has X_uce\)"):
        ready.job(out, key="X_pca").run()
    with pytest.raises(DataError, match=r"obs has no column 'id' \(it has name\)"):
        ready.job(f"{out}-1", cell_id="id").run()
    with pytest.raises(DataError, match=r"240 of 240 cells of .* are missing"):
        ready.job(f"{out}-2", cell_id=None).run()
    ready.values, ready.ids = whole[2:], ids[2:]
    with pytest.raises(DataError, match=r"2 of 240 cells of .* are missing: cell-\d+, cell-\d+ "):
        ready.job(f"{out}-3").run()
    ready.values, ready.ids = whole, [*ids[:-1], ids[7]]
    with pytest.raises(DataError, match=f"1 of 241 cells stand twice: {ids[7]}"):
        ready.job(f"{out}-4").run()
    spoilt = whole.copy()
    spoilt[3, 2] = np.nan
    ready.values, ready.ids = spoilt, ids
    with pytest.raises(DataError, match=f"1 of 240 cells have numbers that are not finite: {ids[3]}"):
        ready.job(f"{out}-5").run()
    ready.values = whole[:, :, None]
    with pytest.raises(DataError, match=r"obsm\['X_uce'\] is float32 \(241, 6, 1\); expected numbers \(241, D\)"):
        ready.job(f"{out}-6").run()
    Path(ready.uri).write_bytes(b"no HDF5")
    with pytest.raises(DataError, match="not an HDF5 file"):
        cells.job(out=f"{out}-7", method="obsm", split=None, obsm={"adata": ready.uri, "key": "X"}).run()


def test_the_files_of_the_house_are_valid():
    for name in ("fit-transcriptome", "fit-transcriptome-obsm", "fit-transcriptome-tiny"):
        assert isinstance(jobs.load(str(Path(__file__).parents[2] / "jobs" / f"{name}.yaml")), FitTranscriptome)


def test_the_simulated_types_can_be_told_apart():
    """Or the tests of latents would test nothing."""
    counts, kinds = expression(200, 60)
    means = np.stack([np.asarray(counts[kinds == kind].mean(0)).ravel() for kind in range(3)])
    assert (means.max(0) / (means.min(0) + 0.1) > 2).sum() > 20
