"""`train-img2seq`: its keys, what it refuses, what its runs leave, of every recipe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import timm
import torch
from making import MakeTestStore
from making_cell_stores import cells_of
from scipy.sparse import csr_matrix
from tiny_encoder import encoder, export
from training_cells import DIGEST, Cells
from training_jobs import plain, undisturbed

import cosmic_ray
from cosmic_ray import jobs, storage
from cosmic_ray.errors import DataError, JobError
from cosmic_ray.ingest.stream import plain_batches
from cosmic_ray.output import claim, read_manifest
from cosmic_ray.stores.cells import CellStore
from cosmic_ray.stores.embeddings import Embeddings, write_embeddings
from cosmic_ray.training import checkpoint, run
from cosmic_ray.training.img2seq_job import TrainImg2Seq
from cosmic_ray.training.img2seq_stage import STATISTICS
from cosmic_ray.training.record import METRICS, MetricsFile

FILES = {"out": "o", "cells": "c", "split": "s", "features": "f"}
ROWS, TOKENS, WIDTH = 400, 17, 24


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Cells:
    return Cells.make(str(tmp_path_factory.mktemp("img2seq")), rows=ROWS, genes=12)


@pytest.fixture(scope="module")
def fm(cells: Cells) -> tuple[str, str]:
    """URI and digest of a morphology FM as pretraining leaves it."""
    kwargs = encoder()[0] | {"fc_norm": False}
    torch.manual_seed(0)
    weights = timm.create_model(**kwargs).state_dict()
    return f"{cells.folder}/fm", export(f"{cells.folder}/fm", network=kwargs, state_dict=weights).digest


@pytest.fixture(scope="module")
def tokens(cells: Cells, fm: tuple[str, str]) -> str:
    return embed(cells, "tokens", np.random.default_rng(3).normal(size=(ROWS, TOKENS, WIDTH)).astype(np.float16), fm)


def embed(cells: Cells, name: str, values: np.ndarray, fm: tuple[str, str] | None) -> str:
    model = {"model": {"uri": fm[0], "content_hash": fm[1], "lineage": {}}} if fm else {}
    ids = pa.array(cells.store.obs(["cell_id"])["cell_id"].combine_chunks())
    with claim(MakeTestStore(out=f"{cells.folder}/{name}")) as target:
        write_embeddings(target.inside("made"), ids, values, store=cells.store, lineage=model, simulated=True, job={})
    return f"{cells.folder}/{name}/made"


def job_of(made: Cells, name: str = "run", **changes: Any) -> TrainImg2Seq:
    keys = made.keys(name, features=made.latents, model={"preset": "tiny"}, eval={"every": 3, "crops": 40})
    return TrainImg2Seq(**(keys | changes))


def finish(job: Any) -> dict[str, Any]:
    """The job done without Ray: the plain loop, then everything that follows it."""
    with claim(job) as output:
        lineage = job.stage().lineage(output)
        steps = job.loop([MetricsFile(storage.join(job.out, METRICS))], stream=plain_batches).run()[1]
        return run._finish(job.stage(), output, lineage | {"step": steps}, None)


class TestKeys:
    def test_paper_is_appendix_a(self) -> None:
        job = TrainImg2Seq(**FILES, recipe="paper")
        first = job.first()
        for each, epochs in ((job, 10), (first, 30)):
            assert (each.epochs, each.global_batch, each.optim.rate(32), each.optim.weight_decay) == (
                epochs,
                32,
                1e-4,
                0,
            )
            assert (each.schedule.kind, each.ema, each.optim.clip) == ("constant", None, None)
        assert first.out == "o/regression" and first.tracking.register_as is None and first.recipe == "paper"
        assert job.tracking.register_as == "img2seq"

    def test_a_key_of_the_job_reaches_both_stages(self) -> None:
        job = TrainImg2Seq(**FILES, recipe="paper", epochs=2, regression={"steps": 5}, seed=7, optim={"lr": 1e-3})
        first = job.first()
        assert (job.epochs, first.steps, job.steps, first.seed, first.optim.lr) == (2, 5, None, 7, 1e-3)

    def test_better_is_the_default(self) -> None:
        job = jobs.make({"kind": "train-img2seq", **FILES})
        assert job.recipe == "better" and job.model.counts == "normalised" and job.ema == 0.999

    def test_paper_does_not_count(self) -> None:
        with pytest.raises(ValueError, match="use recipe: better for counts"):
            TrainImg2Seq(**FILES, recipe="paper", model={"counts": "negative binomial"})


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"cells": "nowhere"}, r"cells = 'nowhere'.*run the build-cells job"),
            ({"split": "nowhere"}, r"split = 'nowhere'.*run the split job"),
            ({"features": "nowhere"}, r"features = 'nowhere'.*run the embed job"),
            ({"recipe": "paper"}, r"recipe 'paper' takes the tokens of the FM.*output: tokens"),
            ({"global_batch": 1000}, r"global_batch = 1000"),
        ],
    )
    def test_what_does_not_fit(self, cells: Cells, changes: dict, text: str) -> None:
        with pytest.raises(JobError, match=text):
            job_of(cells, **changes).check()

    def test_tokens_for_better(self, cells: Cells, tokens: str) -> None:
        with pytest.raises(JobError, match="recipe 'better' takes embeddings of the FM"):
            job_of(cells, features=tokens).check()

    def test_features_of_other_cells(self, cells: Cells, tmp_path) -> None:
        other = Cells.make(str(tmp_path), rows=60, genes=5)
        with pytest.raises(JobError, match=r"features = .*made of another store"):
            job_of(cells, features=other.latents).check()

    def test_too_few_cells_to_calibrate_by(self, tmp_path) -> None:
        few = Cells.make(str(tmp_path), rows=60, genes=5)
        with pytest.raises(JobError, match=r"split = .* cells in val; intervals need 20"):
            job_of(few).check()

    @pytest.mark.parametrize(
        ("made_by", "text"),
        [
            (None, "no model of ours made these"),
            (("nowhere", DIGEST), "the FM that made them: .*nowhere"),
            ("other", "is not the FM that made them any more"),
            ("pooled", "no ViT whose tokens are normed, then averaged"),
        ],
    )
    def test_tokens_of_another_fm(self, cells: Cells, fm: tuple[str, str], tmp_path, made_by: Any, text: str) -> None:
        if made_by == "other":
            made_by = (fm[0], DIGEST)
        elif made_by == "pooled":
            made_by = (f"{tmp_path}/pooled", export(f"{tmp_path}/pooled").digest)
        values = np.zeros((ROWS, TOKENS, WIDTH), np.float16)
        features = embed(replace(cells, folder=str(tmp_path)), "tokens", values, made_by)
        with pytest.raises(JobError, match=text):
            job_of(cells, recipe="paper", features=features).check()

    def test_counts_of_soft_values(self, cells: Cells, tmp_path) -> None:
        random = np.random.default_rng(0)
        soft = cells_of(str(tmp_path / "soft"), csr_matrix(random.random((ROWS, 5)).astype(np.float32)), values="soft")
        other = Cells.make(str(tmp_path / "made"), rows=ROWS, genes=5)
        other = replace(other, store=soft, folder=str(tmp_path))
        from cosmic_ray.stores.split import MakeSplit

        near = {"crops": None, "fields": None}
        MakeSplit(store=soft.uri, by=["cell_id"], out=f"{tmp_path}/split", near_duplicates=near).run()
        features = embed(other, "features", random.normal(size=(ROWS, 4)).astype(np.float32), None)
        job = job_of(replace(other, split=f"{tmp_path}/split"), features=features)
        job.check()
        counts = job.model.model_copy(update={"counts": "negative binomial"})
        with pytest.raises(JobError, match="soft values, not counts"):
            job.model_copy(update={"model": counts}).check()

    def test_features_that_are_not_finite(self, cells: Cells, monkeypatch) -> None:
        values = Embeddings.open(cells.latents).vectors()
        values[7] = np.nan
        monkeypatch.setattr(Embeddings, "vectors", lambda self, rows=None: values)
        name = cells.store.obs(["cell_id"], np.array([7]))["cell_id"][0].as_py()
        stage = job_of(cells).stage()
        data = stage.data(plain_batches, 0, 1)
        with pytest.raises(DataError, match=f"features of 1 cells is not finite: {name}"):
            for _ in data.shares(0, 30):
                pass
            list(data.held_out())


@pytest.mark.parametrize("counts", ["normalised", "negative binomial"])
def test_better_leaves_a_model_that_says_how_sure_it_is(cells: Cells, counts: str) -> None:
    job = job_of(cells, f"finished-{counts[:3]}", model={"preset": "tiny", "counts": counts})
    results = finish(job)
    model = cosmic_ray.load_model(results["model"], device="cpu")
    stage = job.stage()
    averages = checkpoint.read_tensors(checkpoint.newest(f"{job.out}/checkpoints"), checkpoint.EMA)
    weights = model._network.state_dict()
    name = "base.1.weight" if counts == "normalised" else "head.weight"
    assert torch.equal(weights[name], averages[f"img2seq.{name}"]), "the averages are what is exported"
    train = cells.opened_split().rows("train")
    assert weights["total"].item() == np.median(cells.store.counts(train).toarray().sum(1))
    np.testing.assert_allclose(weights["feature_scale.mean"], stage.features[train].mean(0), atol=1e-5)
    assert model.config.features.model == DIGEST and model.config.features.tokens is None
    assert model.config.lineage["features"]["lineage"]["model"]["content_hash"] == DIGEST
    assert list(model.genes) == cells.store.genes["gene_id"].to_pylist() and model.config.simulated
    assert 0.8 < results["coverage_90"] <= 1 and -1 <= results["val_r"] <= 1
    assert "val coverage of 90% intervals" in model.card and "simulated" in model.card
    found = model.sample(Embeddings.open(cells.latents), samples=3)
    lower, upper = found.interval(0.9)
    assert found.samples.shape == (ROWS, 3, 12) and (lower <= upper).all() and (upper > lower).any()
    val = stage.held_out[:40]
    if counts == "normalised":
        raw = cells.store.counts(val).toarray()
        values = np.log1p(raw / raw.sum(1, keepdims=True) * weights["total"].item())
        covered = ((values >= lower[val] - 1e-6) & (values <= upper[val] + 1e-6)).mean()
        assert covered >= 0.85, "of the very cells that calibrated it"


def test_paper_runs_its_two_stages(cells: Cells, tokens: str, fm: tuple[str, str]) -> None:
    job = job_of(cells, "paper", recipe="paper", features=tokens, model={"hidden": 32}, regression={"steps": 4})
    first = job.first()
    first.check()
    begun = first.stage().objective(begins=True).whole.base
    encoder_weights = cosmic_ray.load_model(fm[0], device="cpu")._network.state_dict()
    assert torch.equal(begun.block.attn.qkv.weight, encoder_weights["blocks.1.attn.qkv.weight"])
    assert finish(first)["steps"] == 4
    results = finish(job)
    model = cosmic_ray.load_model(results["model"], device="cpu")
    weights = model._network.state_dict()
    assert not torch.equal(weights["base.block.attn.qkv.weight"], encoder_weights["blocks.1.attn.qkv.weight"])
    assert torch.equal(weights["base.norm.weight"], encoder_weights["norm.weight"])
    regression = checkpoint.read_tensors(checkpoint.newest(f"{first.out}/checkpoints"), checkpoint.WEIGHTS)
    for name, value in regression.items():
        assert torch.equal(weights[f"base.{name.removeprefix('img2seq.')}"], value), "stage 1 stays as it was"
    assert model.config.features.tokens == TOKENS and model.config.features.model == fm[1]
    assert model.config.lineage["regression"]["uri"] == first.out
    assert "abar ends at 0.997" in model.card
    found = model.sample(Embeddings.open(tokens), samples=2)
    assert found.mean.shape == (ROWS, 12) and np.isfinite(found.interval(0.8)[1]).all()


def test_two_ranks_train_what_one_does(cells: Cells) -> None:
    """Float64, on a real store and the real network: lanes give the ranks unequal shares."""
    one, two = (job_of(cells, name, precision="fp64", data={"lanes": 3}, steps=3) for name in ("one", "two"))
    plain(0, 1, one)
    undisturbed(two, 2)
    newest = (checkpoint.newest(f"{each.out}/checkpoints") for each in (one, two))
    wanted, found = (checkpoint.read_tensors(uri, checkpoint.WEIGHTS) for uri in newest)
    assert all(torch.allclose(found[key], value, rtol=0, atol=1e-9) for key, value in wanted.items())


def test_statistics_are_made_once(cells: Cells, monkeypatch) -> None:
    """Every rank begins with what the driver left; what a rank would compute may differ in a last bit."""
    job = job_of(cells, "statistics")
    with claim(job) as output:
        job.stage().lineage(output)
    assert storage.exists(f"{job.out}/{STATISTICS}")
    monkeypatch.setattr(CellStore, "read_counts", lambda *_: pytest.fail("computed again"))
    job.stage().objective(begins=True)


@pytest.mark.slow
def test_a_ray_worker_trains_registers_and_publishes(cells: Cells, tokens: str, ray_local, tmp_path) -> None:
    tracking = {"uri": f"sqlite:///{tmp_path}/mlflow.db"}
    changes = {"recipe": "paper", "model": {"hidden": 32}, "regression": {"steps": 2}, "steps": 2}
    job = job_of(cells, "ray", features=tokens, tracking=tracking, **changes)
    job.check()
    results = job.run()
    manifest = read_manifest(job.out)
    assert manifest["format"] == "cosmic-ray/train-img2seq" and manifest["simulated"]
    assert manifest["lineage"]["features"]["content_hash"] == Embeddings.open(tokens).content_hash
    model = cosmic_ray.load_model("models:/img2seq@candidate", tracking=tracking["uri"])
    assert model.config.digest == results["content_hash"]
    assert job.run() == results, "a finished job is only looked at"
