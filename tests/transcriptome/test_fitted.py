"""Fits in one process: scVI's own latents in plain torch, PCA against scikit-learn, and only `train` has a say."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from making_cell_stores import cells_of
from making_transcriptomes import Cells, expression
from scipy.sparse import csr_matrix, vstack

from cosmic_ray.errors import CosmicError, JobError
from cosmic_ray.models.transcriptome import build_transcriptome, columns_of, encode
from cosmic_ray.stores.split import MakeSplit
from cosmic_ray.transcriptome import fit_scvi
from cosmic_ray.transcriptome.fitted import Fitted, fit


@pytest.fixture(scope="module")
def cells(tmp_path_factory) -> Cells:
    return Cells.make(str(tmp_path_factory.mktemp("transcriptome")))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def quiet(_: Any) -> None:
    pass


def accuracy(latents: np.ndarray, kinds: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(5).fit(latents[train], kinds[train]).score(latents[test], kinds[test])


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_the_latents_are_scvi_tools_own(cells, monkeypatch, layers):
    """The encoder in plain torch gives what `SCVI.get_latent_representation` gives, seen batch or not."""
    kept = {}
    real = fit_scvi.fitted_model

    def keeping(job, train, val, report):
        kept["model"], kept["train"] = real(job, train, val, report), train
        return kept["model"]

    monkeypatch.setattr(fit_scvi, "fitted_model", keeping)
    scvi = {"hidden": 16, "layers": layers, "epochs": 2, "batch_size": 32}
    fitted = fit(cells.job(scvi=scvi), quiet)
    rows = cells.opened_split().rows("train")
    theirs = kept["model"].get_latent_representation(indices=np.arange(len(kept["train"])))
    np.testing.assert_allclose(fitted.latents[rows], theirs, rtol=0, atol=1e-6)
    assert np.abs(theirs).max() > 0.01


@pytest.mark.slow
def test_the_same_seed_gives_the_same_and_val_and_test_give_nothing(cells, tmp_path):
    said: list[dict[str, Any]] = []
    first = fit(cells.job(), said.append)
    again = fit(cells.job(), quiet)
    np.testing.assert_array_equal(first.latents, again.latents)
    other = fit(cells.job(seed=1), quiet)
    assert not np.array_equal(first.latents, other.latents)
    spoilt = _with_other_held_out(cells, str(tmp_path))
    changed = fit(spoilt, quiet)
    assert changed.genes == first.genes
    for name, weight in first.weights.items():
        torch.testing.assert_close(changed.weights[name], weight, rtol=0, atol=0)
    epochs = [one for one in said if "epoch" in one]
    assert [one["epoch"] for one in epochs] == [1, 2, 3]
    assert all({"val/negative_elbo", "val/reconstruction", "train/negative_elbo"} <= set(one) for one in epochs)
    assert first.facts["val/negative_elbo"] == epochs[-1]["val/negative_elbo"]
    without_val = str(tmp_path / "without-val")
    shares, near = {"train": 0.8, "val": 0, "test": 0.2}, {"crops": None, "fields": None}
    MakeSplit(store=cells.store.uri, by=["cell_id"], fractions=shares, out=without_val, near_duplicates=near).run()
    blind = fit(cells.job(split=without_val), quiet)
    assert blind.facts["val_cells"] == 0 and blind.facts["cells_fitted"] == first.facts["cells_fitted"]
    np.testing.assert_array_equal(blind.latents, first.latents)


def _with_other_held_out(cells: Cells, folder: str) -> Any:
    """The job on a store in which all but `train` has other counts, in a batch of its own; the same split."""
    from making_transcriptomes import Cells as Made

    split, counts = cells.opened_split(), cells.store.counts().tolil()
    held_out = np.flatnonzero(split.codes)
    counts[held_out] = np.random.default_rng(9).poisson(20, (len(held_out), counts.shape[1]))
    batch = np.array(cells.store.obs(["batch"])["batch"].to_pylist(), object)
    batch[held_out] = "unseen"
    store = cells_of(f"{folder}/cells", csr_matrix(counts), 50, batch=batch.tolist())
    MakeSplit(
        store=store.uri, by=["cell_id"], out=f"{folder}/split", near_duplicates={"crops": None, "fields": None}
    ).run()
    made = Made(store, f"{folder}/split", cells.kinds, folder)
    np.testing.assert_array_equal(made.opened_split().codes, split.codes)
    return made.job()


def test_pca_is_scikit_learns_and_tells_types_apart(cells):
    from sklearn.decomposition import PCA

    fitted = fit(cells.job(method="pca"), quiet)
    split = cells.opened_split()
    train, test = split.rows("train"), split.rows("test")
    columns = columns_of(fitted.genes, cells.store.genes["gene_id"].to_pylist())
    every = cells.store.counts().toarray().astype(np.float64)
    total = every.sum(1, keepdims=True)
    values = np.log1p(every / total * np.median(total[train]))[:, columns]
    assert fitted.facts["target_total"] == np.median(total[train])
    wanted = PCA(5, svd_solver="full").fit(values[train])
    theirs = wanted.transform(values)
    signs = np.sign((theirs * fitted.latents).sum(0))
    np.testing.assert_allclose(fitted.latents * signs, theirs, rtol=0, atol=2e-5)
    assert fitted.facts["train/explained_variance"] == pytest.approx(wanted.explained_variance_ratio_.sum())
    assert 0.1 < fitted.facts["val/explained_variance"] < 1
    assert accuracy(fitted.latents, cells.kinds, train, test) > 0.8


def test_pca_takes_soft_values_and_scvi_does_not(tmp_path):
    counts, kinds = expression(90, 40)
    soft = cells_of(str(tmp_path / "cells"), csr_matrix(counts * 0.37), 50, values="soft")
    MakeSplit(
        store=soft.uri, by=["cell_id"], out=str(tmp_path / "split"), near_duplicates={"crops": None, "fields": None}
    ).run()
    made = Cells(soft, str(tmp_path / "split"), kinds, str(tmp_path))
    assert np.isfinite(fit(made.job(method="pca"), quiet).latents).all()
    with pytest.raises(JobError, match=r"scVI needs raw counts.*holds soft") as refused:
        made.job().check()
    assert refused.value.key == "method"


def test_a_batch_column_that_is_missing_is_refused_with_those_there_are(cells):
    cells.job().check()
    cells.job(batch=None).check()
    with pytest.raises(JobError, match=r"no such column.*batch, cell_type.*null: one batch") as refused:
        cells.job(batch="plate").check()
    assert refused.value.key == "batch"


def test_fewer_genes_than_asked_for_are_all_taken_and_said(cells):
    said: list[dict[str, Any]] = []
    fitted = fit(cells.job(method="pca", genes=1024), said.append)
    assert len(fitted.genes) == 60 == fitted.spec.genes
    assert "all 60 genes, which is fewer than the 1,024 asked for" in said[0]["say"]


def test_more_components_than_there_are_is_refused(cells):
    with pytest.raises(JobError, match="30 at most") as refused:
        fit(cells.job(method="pca", latent=31), quiet)
    assert refused.value.key == "latent"


@pytest.mark.slow
def test_batches_that_leave_one_cell_over_and_cells_without_counts(tmp_path):
    """BatchNorm has no statistics of one cell, and scVI no logarithm of no counts: both are left out, and training is
    sound."""
    counts, kinds = expression(97, 30)
    empty = csr_matrix((3, 30), dtype=counts.dtype)
    store = cells_of(str(tmp_path / "cells"), vstack([counts, empty], format="csr"), 50)
    MakeSplit(
        store=store.uri,
        by=["cell_id"],
        out=str(tmp_path / "split"),
        fractions={"train": 1, "val": 0, "test": 0},
        near_duplicates={"crops": None, "fields": None},
    ).run()
    made = Cells(store, str(tmp_path / "split"), kinds, str(tmp_path))
    fitted = fit(made.job(scvi={"hidden": 8, "epochs": 1, "batch_size": 32}), quiet)
    assert fitted.facts["cells_without_counts"] == 3
    assert 97 % 32 == 1
    assert np.isfinite(fitted.latents).all()
    assert not any(key.startswith("val/") for key in fitted.facts), "there is no val"


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_the_fit_and_says_where(cells):
    scvi = {"hidden": 16, "epochs": 3, "batch_size": 32, "lr": 1e20}
    with pytest.raises(CosmicError, match=r"no number any more in epoch 1 \(lower scvi.lr"):
        fit(cells.job(scvi=scvi), quiet)


@pytest.fixture(scope="module")
def fitted(cells) -> Fitted:
    """By PCA."""
    return fit(cells.job(method="pca"), quiet)


@pytest.fixture
def network(fitted) -> torch.nn.Module:
    network = build_transcriptome(fitted.spec)
    network.load_state_dict(fitted.weights)
    return network.eval()


def test_genes_in_another_order_are_found_and_missing_ones_named(cells, fitted, network):
    counts, ids = cells.store.counts(), cells.store.genes["gene_id"].to_pylist()
    order = np.random.default_rng(0).permutation(len(ids))
    columns = columns_of(fitted.genes, [ids[place] for place in order])
    found = encode(network, fitted.spec, counts[:, order], columns, batch_size=17)
    np.testing.assert_allclose(found, fitted.latents, atol=1e-5)
    with pytest.raises(ValueError, match=f"1 of 30 genes are missing: {fitted.genes[3]}"):
        columns_of(fitted.genes, [gene for gene in ids if gene != fitted.genes[3]])
    with pytest.raises(ValueError, match="1 genes stand twice"):
        columns_of(fitted.genes, [*ids, fitted.genes[0]])


def test_an_empty_cell_has_a_latent_and_values_that_are_no_counts_have_none(fitted, network):
    columns = np.arange(30)
    assert np.isfinite(encode(network, fitted.spec, csr_matrix((2, 30)), columns)).all()
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="negative or not finite"):
            encode(network, fitted.spec, csr_matrix(np.full((2, 30), bad)), columns)
    counted = dataclasses.replace(fitted.spec, method="scvi")
    with pytest.raises(ValueError, match="no whole numbers"):
        encode(network, counted, csr_matrix(np.full((2, 30), 0.5)), columns)
