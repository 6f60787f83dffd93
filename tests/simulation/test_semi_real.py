"""Semi-real pairs: real images and real counts, the link between them planted. The tests' own "real" data are drawn."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
from making import make_store
from scipy.sparse import csr_matrix

from cosmic_ray.config import validate
from cosmic_ray.errors import DataError, JobError
from cosmic_ray.jobs import make
from cosmic_ray.output import read_manifest
from cosmic_ray.simulation import thinning
from cosmic_ray.simulation.links import draw_factors, link
from cosmic_ray.simulation.measures import MEASURES, SHAPE, factors, measured
from cosmic_ray.simulation.morphology import draw_images
from cosmic_ray.simulation.oracle import Truth, normalised, within
from cosmic_ray.simulation.paired_spec import PairedSpec
from cosmic_ray.simulation.semi_real_job import SemiReal
from cosmic_ray.stores.cells import CellStore
from cosmic_ray.stores.columns import image_column
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.split import Split

CELLS = 320


@pytest.fixture(scope="module")
def crops() -> np.ndarray:
    spec = validate(PairedSpec, {})
    return np.concatenate([draw_images(spec, 9, chunk) for chunk in range(CELLS // 64)])


@pytest.fixture(scope="module")
def store(crops, tmp_path_factory) -> CropStore:
    columns = {"image": image_column(crops[:, None]), "source": ["one", "two"] * (CELLS // 2)}
    return make_store(str(tmp_path_factory.mktemp("crops")), CELLS, size=64, simulated=False, columns=columns)


@pytest.fixture(scope="module")
def counts(tmp_path_factory) -> str:
    rng = np.random.default_rng(0)
    depth = np.exp(0.3 * rng.standard_normal((400, 1)))
    mean = np.exp(rng.normal(3.2, 0.8, 80)) * depth
    values = rng.poisson(mean * rng.gamma(5, 0.2, mean.shape)).astype(np.float32)
    obs = pd.DataFrame({"line": ["a", "b"] * 200, "batch": ["p"] * 200 + ["q"] * 200}, index=map(str, range(400)))
    var = pd.DataFrame(index=[f"G{i}" for i in range(80)])
    uri = str(tmp_path_factory.mktemp("counts") / "real.h5ad")
    anndata.AnnData(csr_matrix(values), obs=obs, var=var).write_h5ad(uri)
    return uri


def job(out: object, store: CropStore, counts: str, **keys: object) -> SemiReal:
    tree = {
        "kind": "semi-real",
        "out": str(out),
        "crops": store.uri,
        "counts": {"uri": counts, "cell_type": "line", "genes": 70},
        "folds": 8,
        "planted": {"strengths": [0.4], "min_mean": 5},
    }
    return make({**tree, **keys})


@pytest.fixture(scope="module")
def made(store, counts, tmp_path_factory) -> str:
    return job(tmp_path_factory.mktemp("semi-real"), store, counts).run()["out"]


def test_measures_of_a_case_worked_by_hand():
    crop = np.zeros((20, 20), np.uint8)
    crop[4:14, 6:16] = np.where(np.indices((10, 10)).sum(axis=0) % 2, 150, 50)  # a chequered square
    found = dict(zip(MEASURES, measured(crop[None])[0], strict=True))
    assert (found["area"], found["eccentricity"], found["solidity"]) == (100, 0, 1)
    assert found["intensity"] == 100 and found["intensity_cv"] == pytest.approx(0.5)
    # At 1 px 180 pairs along rows and columns differ by 15 levels, 162 along diagonals by none; at 3 px 140 pairs along
    # rows and columns are opposite, 128 along diagonals (of 2 px each way) equal.
    assert found["roughness"] == pytest.approx(15**2 * 180 / 342)
    assert found["coarseness"] == pytest.approx((128 - 140) / 268)
    assert found["granularity"] > 0.95  # a blur of 1.5 px takes all of it
    flat = measured(np.where(crop > 0, 90, 0).astype(np.uint8)[None])[0]
    assert flat[MEASURES.index("intensity_cv")] == 0 and np.isfinite(flat).all()
    with pytest.raises(ValueError, match="pixels"):
        measured(np.ones((1, 3, 3), np.uint8))


def test_factors_have_one_law_in_each_source_and_texture_is_beyond_shape(crops):
    values, sources = measured(crops), np.array(["one", "two"] * (CELLS // 2))
    values[sources == "two", 0] *= 5  # another magnification
    z = factors(values, sources)
    for source in ("one", "two"):
        rows = sources == source
        assert np.abs(z[rows].mean(axis=0)).max() < 0.02
        assert z[rows].std(axis=0) == pytest.approx(np.full(len(MEASURES), 0.96), abs=0.03)
        order = np.argsort(values[rows, 0], kind="stable")
        assert (np.diff(z[rows, 0][order]) >= 0).all()
        shape = z[rows][:, : len(SHAPE)]
        design = np.c_[np.ones(len(shape)), shape, shape**2]
        texture = z[rows][:, len(SHAPE) :]
        explained = design @ np.linalg.lstsq(design, texture, rcond=None)[0]
        assert (explained.var(axis=0) / texture.var(axis=0)).max() < 0.06
    raw = np.corrcoef(values[sources == "one"][:, [0, 3]].T)[0, 1]
    assert abs(raw) > 0.3  # brightness falls with the area until shape is taken out


@pytest.mark.parametrize(("function", "sign"), [("linear", 1), ("u-shaped", -1), ("threshold", 1)])
def test_thinned_counts_have_the_correlation_asked_for(function, sign):
    rng = np.random.default_rng(1)
    counts = rng.poisson(30 * rng.gamma(6, 1 / 6, 900))
    scale, groups = np.exp(0.1 * rng.standard_normal(900)), np.repeat(["a", "b", "c"], 300)
    slope = thinning.slope_for(counts, scale, groups, function, sign, 0.4, np.random.default_rng(2))
    z, cell = draw_factors(rng, (60_000,)), rng.integers(0, 900, 60_000)
    y = np.log1p(rng.binomial(counts[cell], thinning.kept_share(slope, function, z)) * scale[cell])
    found = within(link(function, z)[:, None], y[:, None], groups[cell])[0]
    assert found == pytest.approx(0.4 * sign, abs=0.02)
    means = thinning.conditional_means(counts, scale, groups, slope, function, np.random.default_rng(3))
    best = within(thinning.predicted(means, z, groups[cell])[:, None], y[:, None], groups[cell])[0]
    assert abs(found) - 0.01 < best < 0.6


def test_thinning_keeps_poisson_counts_poisson():
    rng = np.random.default_rng(4)
    kept = rng.binomial(rng.poisson(40, 200_000), thinning.kept_share(0.5, "linear", np.array(0.3)))
    assert kept.var() == pytest.approx(kept.mean(), rel=0.02)
    share = thinning.kept_share(0.5, "linear", np.linspace(-2.5, 2.5, 50))
    assert share[-1] == pytest.approx(1) and (np.diff(share) > 0).all()


def test_planted_genes_follow_the_crop_and_controls_do_not(made, crops):
    data, truth = anndata.read_h5ad(f"{made}/expression.h5ad"), Truth.open(made)
    groups = (data.obs["cell_type"].astype(str) + data.obs["batch"].astype(str)).to_numpy()
    scores = within(truth.oracle(data.obs["cell_id"], data.var_names), normalised(data.X.toarray()), groups)
    role, genes = truth.genes["role"].to_numpy(), truth.genes
    assert scores[role == "planted"].mean() == pytest.approx(0.4, abs=0.06)
    assert scores[role == "control"].mean() == pytest.approx(0, abs=0.06)
    planted = genes[genes["planted"]]
    np.testing.assert_allclose(np.abs(planted["reached"]), scores[role == "planted"], atol=1e-9)
    assert (planted["ceiling"] - planted["reached"].abs()).mean() == pytest.approx(0, abs=0.05)
    assert np.exp(np.log(planted["mean"] / genes.loc[planted["matched"], "mean"].to_numpy()).abs().max()) < 2


def test_counts_are_those_of_the_real_cell_but_for_thinning(made, counts):
    data, real, truth = anndata.read_h5ad(f"{made}/expression.h5ad"), anndata.read_h5ad(counts), Truth.open(made)
    before = real[data.obs["background"], data.var_names].X.toarray()
    after, kept = data.X.toarray(), (truth.genes["role"] == "background").to_numpy()
    np.testing.assert_array_equal(after[:, kept], before[:, kept])
    assert (after <= before).all() and (after[:, ~kept].sum(axis=0) < before[:, ~kept].sum(axis=0)).all()
    np.testing.assert_array_equal(data.obs["cell_type"], real.obs.loc[data.obs["background"], "line"])


def test_whole_fields_and_whole_real_cells_lie_in_one_fold(made):
    obs = anndata.read_h5ad(f"{made}/expression.h5ad").obs
    for what in ("field", "background"):
        assert (obs.groupby(what, observed=True)["fold"].nunique() == 1).all()
    assert obs["fold"].nunique() == 8 and obs["field"].nunique() > 8


def test_the_chain_holds_out_fields_and_nothing_of_the_truth_goes_along(made, store, tmp_path):
    expression = {"uri": f"{made}/expression.h5ad", "batch": "batch", "cell_type": "cell_type"}
    build = {"kind": "build-cells", "out": str(tmp_path / "cells"), "expression": expression}
    build |= {"images": {"uri": store.uri, "holds": "crops"}, "quality": {"min_genes": 5, "max_mito_share": None}}
    assert make(build).run()["rows"] == CELLS
    cells = CellStore.open(build["out"])
    assert cells.simulated  # its expression is
    assert not set(cells.obs().column_names) & {*MEASURES, "planted", "slope", "strength", "role"}
    split = {"kind": "split", "out": str(tmp_path / "split"), "store": cells.uri, "by": ["fold"]}
    make({**split, "near_duplicates": {"crops": None, "fields": None}, "fractions": {"train": 0.6, "val": 0.2,
          "test": 0.2}}).run()  # fmt: skip
    parts = Split.open(split["out"], cells)
    field, real = (np.array(cells.obs([name])[name].to_pylist()) for name in ("field", "background"))
    for names in (field, real):
        assert not set(names[parts.rows("train")]) & set(names[parts.rows("test")])


def test_everything_says_what_it_is(made):
    about = read_manifest(made)
    assert about["simulated"] is True and about["about"] == "semi-real: real images, simulated expression"
    assert anndata.read_h5ad(f"{made}/expression.h5ad").uns["about"] == about["about"]


def test_the_same_seed_gives_the_same_and_another_seed_another(made, store, counts, tmp_path):
    same, other = (job(tmp_path / str(seed), store, counts, seed=seed).run() for seed in (0, 1))
    assert same["content"] == read_manifest(made)["content"] != other["content"]


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"folds": 900}, "folds"),
        ({"channel": 1}, "channel"),
        ({"planted": {"strengths": [0.4], "min_mean": 400}}, "planted.min_mean"),
        ({"planted": {"strengths": [0.94], "min_mean": 5}}, "planted.strengths"),
        ({"planted": {"effects": {}}}, "planted.effects"),
        ({"crops": "/nowhere"}, "crops"),
    ],
)
def test_a_job_that_cannot_be_is_refused_by_its_key(keys, named, store, counts, tmp_path):
    with pytest.raises(JobError) as error:
        it = job(tmp_path, store, counts, **keys)
        it.check()
        it.run()
    assert error.value.key == named


def test_values_that_are_no_counts_are_refused(store, counts, tmp_path):
    data = anndata.read_h5ad(counts)
    data.X = data.X * 0.5
    data.write_h5ad(tmp_path / "half.h5ad")
    with pytest.raises(DataError, match="raw counts"):
        job(tmp_path / "out", store, str(tmp_path / "half.h5ad")).run()


def test_an_unknown_measure_is_named(store, counts, tmp_path):
    with pytest.raises(JobError, match="eccentricity"):
        job(tmp_path, store, counts, planted={"effects": {"a": {"factor": "excentricity"}}})
