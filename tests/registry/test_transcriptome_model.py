"""A transcriptome encoder as its user has it: genes in any order, and refusals at the door."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csc_matrix, csr_matrix
from tiny_models import GENES, LATENT, export_transcriptome, transcriptome

import cosmic_ray
from cosmic_ray.errors import JobError
from cosmic_ray.registry.kinds.transcriptome_encoder import TranscriptomeEncoder


@pytest.fixture
def counts() -> np.ndarray:
    return np.random.default_rng(0).poisson(3.0, (9, len(GENES))).astype(np.int32)


@pytest.fixture(params=["scvi", "pca"])
def method(request) -> str:
    return request.param


@pytest.fixture
def model(tmp_path, method) -> TranscriptomeEncoder:
    export_transcriptome(str(tmp_path / method), method=method)
    return cosmic_ray.load_model(str(tmp_path / method), device="cpu")


def test_latents_are_the_networks_on_the_counts_of_its_genes(model, method, counts):
    network = transcriptome(method=method)[1]
    totals = torch.from_numpy(counts.sum(1, keepdims=True)).float()
    with torch.no_grad():
        wanted = network(torch.from_numpy(counts[:, :8]).float(), totals)
    found = model.embed(csr_matrix(counts), GENES)
    assert found.dtype == np.float32
    assert found.shape == (9, LATENT)
    np.testing.assert_array_equal(found, wanted.numpy())


def test_genes_may_stand_in_any_order_in_any_container_with_others_between(model, counts):
    wanted = model.embed(csr_matrix(counts), GENES)
    wide = np.concatenate([counts, np.full((9, 2), 50, np.int32)], axis=1)
    genes = np.array([*GENES, "other-1", "other-2"])
    order = np.random.default_rng(1).permutation(len(genes))
    frame = pd.DataFrame(index=genes[order])
    cells = anndata.AnnData(np.zeros(wide.shape), var=frame, layers={"counts": csr_matrix(wide[:, order])})
    for found in (
        model.embed(wide[:, order], list(genes[order])),
        model.embed(csc_matrix(wide[:, order].astype(np.float64)), genes[order]),
        model.embed(cells, layer="counts"),
        model.embed(anndata.AnnData(wide[:, order].astype(np.float32), var=frame)),
        model.embed(csr_matrix(wide[:, order]), genes[order], batch_size=4),
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert model.embed(counts[:0], GENES).shape == (0, LATENT)


def test_a_backed_file_is_read(model, counts, tmp_path):
    frame = pd.DataFrame(index=list(GENES))
    anndata.AnnData(csr_matrix(counts.astype(np.float32)), var=frame).write_h5ad(tmp_path / "cells.h5ad")
    found = model.embed(anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r"))
    np.testing.assert_allclose(found, model.embed(counts, GENES), rtol=1e-5, atol=1e-6)


def test_missing_genes_are_named(model, counts):
    with pytest.raises(ValueError, match=r"2 of \d+ genes are missing: ENSG003, ENSG005"):
        kept = [gene not in ("ENSG003", "ENSG005") for gene in GENES]
        model.embed(counts[:, kept], [gene for gene in GENES if gene not in ("ENSG003", "ENSG005")])
    with pytest.raises(ValueError, match="1 genes stand twice: ENSG000"):
        model.embed(np.concatenate([counts, counts[:, :1]], axis=1), [*GENES, GENES[0]])
    for genes in (None, GENES[:5]):
        with pytest.raises(ValueError, match="genes must name each of the 12 columns"):
            model.embed(counts, genes)


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_counts_that_are_none_are_refused(model, counts, bad):
    counts = counts.astype(np.float32)
    counts[4, 2] = bad
    with pytest.raises(ValueError, match="negative or not finite"):
        model.embed(csr_matrix(counts), GENES)


def test_normalised_values_are_refused_where_raw_counts_are_expected(tmp_path, counts):
    export_transcriptome(str(tmp_path))
    model = cosmic_ray.load_model(str(tmp_path))
    for normalised in (np.log1p(counts), counts / counts.sum(1, keepdims=True)):
        with pytest.raises(ValueError, match="takes raw counts, neither normalised nor logged"):
            model.embed(normalised, GENES)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"genes": [*GENES[:7], GENES[0]]}, JobError, "1 genes stand twice"),
        ({"genes": GENES[:7]}, JobError, "network takes 8 genes; 7 are named"),
        ({"total_genes": GENES[1:]}, JobError, "total_genes does not hold all"),
        ({"state_dict": {}}, ValueError, "Missing key"),
    ],
)
def test_what_does_not_fit_together_is_not_written(tmp_path, change, error, says):
    with pytest.raises(error, match=says):
        export_transcriptome(str(tmp_path / "model"), **change)
    assert not (tmp_path / "model" / "config.json").exists()
