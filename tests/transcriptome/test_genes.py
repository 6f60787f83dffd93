"""The choice of genes: scanpy's own, made of sums by row group; what cannot say anything has no say."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from making_cell_stores import cells_of
from making_transcriptomes import expression
from scipy.sparse import csr_matrix

from cosmic_ray.errors import DataError
from cosmic_ray.transcriptome.genes import highly_variable, of_columns


def of_scanpy(counts: csr_matrix, codes: np.ndarray, count: int) -> np.ndarray:
    import anndata
    import pandas as pd
    import scanpy as sc

    adata = anndata.AnnData(counts.astype(np.float32), obs=pd.DataFrame({"batch": codes.astype(str)}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sc.pp.highly_variable_genes(adata, flavor="seurat_v3", n_top_genes=count, batch_key="batch")
    return np.flatnonzero(adata.var["highly_variable"])


@pytest.mark.parametrize("batches", [1, 3])
def test_it_is_scanpys(tmp_path, batches):
    counts, _ = expression(300, 200, seed=batches)
    counts = counts.tolil()
    counts[:, 7] = 0
    counts[:, 8] = 3
    counts = csr_matrix(counts)
    store = cells_of(str(tmp_path / "cells"), counts, 37)
    rows = np.flatnonzero(np.arange(300) % 5)
    codes = np.random.default_rng(0).integers(0, batches, len(rows))
    wanted = of_scanpy(counts[rows], codes, 40)
    found = highly_variable(store, rows, codes, [str(batch) for batch in range(batches)], 40)
    np.testing.assert_array_equal(found.columns, wanted)
    assert found.left_out == {}
    assert not {7, 8} & set(found.columns), "a gene that does not vary is never among the best"


def test_a_batch_of_one_cell_has_no_say_and_says_so(tmp_path):
    counts, _ = expression(120, 80)
    store = cells_of(str(tmp_path / "cells"), counts, 50)
    rows, codes = np.arange(120), np.zeros(120, np.int64)
    codes[17] = 1
    found = highly_variable(store, rows, codes, ["many", "one"], 20)
    assert found.left_out == {"one": "1 cells"}
    without = np.delete(rows, 17)
    wanted = highly_variable(store, without, codes[without], ["many"], 20)
    np.testing.assert_array_equal(found.columns, wanted.columns)


def test_where_no_batch_has_a_say_the_remedy_is_named(tmp_path):
    counts, _ = expression(4, 80)
    store = cells_of(str(tmp_path / "cells"), counts, 50)
    with pytest.raises(DataError, match=r"no batch can say.*a: 1 cells.*batch: null"):
        highly_variable(store, np.arange(4), np.arange(4), list("abcd"), 20)


def test_where_there_are_no_more_genes_all_are_taken(tmp_path):
    counts, _ = expression(10, 50)
    store = cells_of(str(tmp_path / "cells"), counts, 50)
    for asked in (50, 1024):
        assert len(highly_variable(store, np.arange(10), np.zeros(10, int), ["all"], asked).columns) == 50


def test_counts_of_some_cells_in_some_genes(tmp_path):
    counts, _ = expression(53, 40)
    store = cells_of(str(tmp_path / "cells"), counts, 8)
    rows, columns = np.array([0, 7, 8, 9, 30, 52]), np.array([39, 3, 20])
    found, totals = of_columns(store, rows, columns)
    np.testing.assert_array_equal(found.toarray(), counts[rows][:, columns].toarray())
    np.testing.assert_array_equal(totals, counts[rows].toarray().sum(1))
    none, no_totals = of_columns(store, rows[:0], columns)
    assert none.shape == (0, 3) and len(no_totals) == 0
