"""`simulate-cells`: files that build-cells reads, the same bytes at any parallelism and after a stop, and no truth in
what is trained on."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cosmic_ray import storage
from cosmic_ray.errors import JobError
from cosmic_ray.jobs import make
from cosmic_ray.output import read_manifest
from cosmic_ray.simulation.files import parquet_table
from cosmic_ray.simulation.morphology import draw_images
from cosmic_ray.simulation.oracle import Truth, normalised, within
from cosmic_ray.simulation.paired_job import SimulateCells, write_chunk
from cosmic_ray.simulation.paired_spec import FACTORS
from cosmic_ray.simulation.population import CHUNK
from cosmic_ray.stores.cells import CellStore

SMALL = {
    "kind": "simulate-cells",
    "seed": 3,
    "cells": 150,
    "processes": 1,
    "transcriptome": {"genes": 60},
    "planted": {"strengths": [0.3, 0.6]},
}
FILES = ("expression.h5ad", "images.zip", "truth.parquet", "factors.parquet")


def job(out: object, **keys: object) -> SimulateCells:
    return make({**SMALL, "out": str(out), **keys})


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> str:
    return job(tmp_path_factory.mktemp("simulated")).run()["out"]


@pytest.fixture(scope="module")
def cells(simulated: str, tmp_path_factory: pytest.TempPathFactory) -> CellStore:
    """The cell store that build-cells makes of them."""
    expression = {"uri": f"{simulated}/expression.h5ad", "batch": "batch", "cell_type": "cell_type", "donor": "donor"}
    tree = {
        "kind": "build-cells",
        "out": str(tmp_path_factory.mktemp("cells")),
        "expression": expression,
        "images": {"uri": f"{simulated}/images.zip", "name": "{cell_id}.png", "crop_px": 64},
        "quality": {"min_genes": 5, "max_mito_share": None, "min_cells": 1},
    }  # fmt: skip
    found = make(tree).run()
    assert found["rows"] == 150 and not found["cells_rejected"] and not found["images_rejected"]
    return CellStore.open(found["out"])


def contents(uri: str) -> dict[str, bytes]:
    return {name: storage.read_bytes(storage.join(uri, name)) for name in FILES}


def test_a_cell_has_its_own_image_and_counts(simulated, cells):
    import anndata

    data = anndata.read_h5ad(storage.local_path(f"{simulated}/expression.h5ad"))
    place = {cell: row for row, cell in enumerate(data.obs["cell_id"])}
    rows = [place[cell] for cell in cells.obs()["cell_id"].to_pylist()]
    genes = [list(data.var_names).index(gene) for gene in cells.genes["gene_id"].to_pylist()]
    np.testing.assert_array_equal(cells.counts().toarray(), data.X.toarray()[rows][:, genes])
    drawn = np.concatenate([draw_images(job(simulated), 3, chunk) for chunk in range(3)])
    np.testing.assert_array_equal(cells.crops.crops(np.arange(150))[:, 0], drawn[rows])


def test_nothing_of_the_truth_reaches_the_store(cells):
    known = {"cell_id", "source_row", "batch", "cell_type", "donor", "q_counts", "q_genes", "q_mito_share"}
    assert set(cells.obs().column_names) == known
    assert not set(cells.columns) & {*FACTORS, "planted", "role", "strength", "slope", "function", "matched"}
    assert cells.genes.column_names == ["gene_id", "symbol"] and set(cells.genes["symbol"].to_pylist()) == {""}


def test_everything_says_simulated(simulated, cells):
    assert read_manifest(simulated)["simulated"] is True and cells.simulated and cells.crops.simulated
    for name in ("truth.parquet", "factors.parquet"):
        table = parquet_table(storage.read_bytes(storage.join(simulated, name)))
        assert table.schema.metadata[b"simulated"] == b"true"
    with zipfile.ZipFile(storage.local_path(f"{simulated}/images.zip")) as archive:
        image = Image.open(io.BytesIO(archive.read("sim-000007.png")))
    assert image.text["Comment"] == "simulated"


@pytest.mark.slow
def test_the_same_bytes_from_two_processes(tmp_path, simulated, monkeypatch):
    monkeypatch.setattr("cosmic_ray.simulation.parallel._FEW", 0)
    job(tmp_path, processes=2).run()
    assert contents(str(tmp_path)) == contents(simulated)


def test_a_stopped_run_goes_on_where_it_was(tmp_path, simulated, monkeypatch):
    done = []

    def stops(here: SimulateCells, uri: str, chunk: int) -> None:
        if chunk == 2 and len(done) == 2:
            done.append("stopped")
            raise KeyboardInterrupt
        done.append(chunk)
        write_chunk(here, uri, chunk)

    monkeypatch.setattr("cosmic_ray.simulation.paired_job.write_chunk", stops)
    with pytest.raises(KeyboardInterrupt):
        job(tmp_path).run()
    assert not (tmp_path / "manifest.json").exists()
    job(tmp_path).run()
    assert done == [0, 1, "stopped", 2]
    assert contents(str(tmp_path)) == contents(simulated)
    assert read_manifest(str(tmp_path))["content"] == read_manifest(simulated)["content"]
    job(tmp_path).run()
    assert len(done) == 4 and not (tmp_path / "parts").exists()


def test_more_cells_leave_the_first_ones_as_they_were(tmp_path, simulated):
    job(tmp_path, cells=CHUNK).run()
    first, all_of_them = Truth.open(str(tmp_path)), Truth.open(simulated)
    assert first.genes.equals(all_of_them.genes)
    assert first.cells.equals(all_of_them.cells.iloc[:CHUNK])


def test_another_seed_is_refused_in_the_same_folder(simulated):
    with pytest.raises(JobError, match="seed"):
        job(simulated, seed=4).run()


def test_the_oracle_reads_the_truth_of_published_cells(tmp_path):
    import anndata

    cells = {"cells": 640, "seed": 1, "planted": {"strengths": [0.5], "replicates": 4}}
    job(tmp_path, **cells).run()
    data, truth = anndata.read_h5ad(tmp_path / "expression.h5ad"), Truth.open(str(tmp_path))
    groups = (data.obs["cell_type"].astype(str) + data.obs["batch"].astype(str)).to_numpy()
    scores = within(truth.oracle(data.obs["cell_id"], data.var_names), normalised(data.X.toarray()), groups)
    told = truth.genes["role"].to_numpy()
    assert np.isnan(scores[told == "background"]).all()
    assert scores[told == "planted"].mean() == pytest.approx(0.5, abs=0.03)
    assert scores[told == "control"].mean() == pytest.approx(0, abs=0.03)
    assert truth.auroc(pd.Series(scores, data.var_names)).loc[0.5].to_list() == [1, 24]
