"""img2seq as its user has it: the network's own numbers, the same in any batch, and no features of another FM."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
import torch
from making import MakeTestStore
from tiny_encoder import SIDE, export
from tiny_models import FM, GENES, TOKENS, export_img2seq, img2seq

import cosmic_ray
from cosmic_ray.errors import DataError
from cosmic_ray.ingest.cell_draws import CellDraws
from cosmic_ray.ingest.cell_noise import cell_keys
from cosmic_ray.models.img2seq import Calibration
from cosmic_ray.output import claim
from cosmic_ray.registry.kinds.img2seq import Img2Seq
from cosmic_ray.stores.embeddings import Embeddings, write_embeddings

CELLS = [f"cell-{number}" for number in range(7)]
NETWORKS = [("better", "normalised"), ("better", "negative binomial"), ("paper", "normalised")]


@pytest.fixture
def features() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(7, 8)).astype(np.float32)


@pytest.fixture
def model(tmp_path) -> Img2Seq:
    export_img2seq(str(tmp_path / "img2seq"))
    return cosmic_ray.load_model(str(tmp_path / "img2seq"), device="cpu")


@pytest.mark.parametrize(("recipe", "counts"), NETWORKS)
def test_expression_is_the_networks_own(tmp_path, features, recipe, counts):
    if recipe == "paper":
        features = np.random.default_rng(0).normal(size=(7, TOKENS, 8)).astype(np.float16)
    export_img2seq(str(tmp_path), recipe=recipe, counts=counts)
    network = img2seq(recipe=recipe, counts=counts)[1]
    draws = [CellDraws(3, cell_keys(CELLS), number) for number in range(4)]
    wanted = network.predict(torch.from_numpy(features).float(), draws)
    found = cosmic_ray.load_model(str(tmp_path), device="cpu").sample(features, CELLS, samples=4, seed=3)
    np.testing.assert_array_equal(found.mean, wanted.mean.numpy())
    np.testing.assert_array_equal(found.samples, wanted.samples.numpy())
    for limit, theirs in zip(found.interval(0.8), wanted.interval(0.8), strict=True):
        np.testing.assert_array_equal(limit, theirs.numpy())
    assert found.samples.shape == (7, 4, len(GENES))
    assert (found.genes, found.cell_ids) == (GENES, tuple(CELLS))
    assert found.values == ("counts" if counts == "negative binomial" else "log1p of normalised counts")


@pytest.mark.parametrize("counts", ["normalised", "negative binomial"])
def test_a_cell_gets_the_same_in_any_batch_and_order(tmp_path, features, counts):
    export_img2seq(str(tmp_path), counts=counts)
    model = cosmic_ray.load_model(str(tmp_path), device="cpu")
    wanted, order = model.sample(features, CELLS, samples=3), [4, 0, 6]
    again = model.sample(features, CELLS, samples=3)
    np.testing.assert_array_equal(again.samples, wanted.samples)
    cut = model.sample(features, CELLS, samples=3, batch_size=2)
    few = model.sample(features[order], [CELLS[i] for i in order], samples=2)
    for found, same in ((cut.samples, wanted.samples), (few.samples, wanted.samples[order, :2])):
        np.testing.assert_allclose(found, same, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(few.mean, wanted.mean[order], rtol=1e-5, atol=1e-6)


def test_seed_cell_and_features_each_make_other_samples(model, features):
    wanted = model.sample(features, CELLS, samples=2)
    assert not np.allclose(wanted.samples[:, 0], wanted.samples[:, 1])
    for other in (
        model.sample(features, CELLS, samples=2, seed=1),
        model.sample(features, [f"{cell}'" for cell in CELLS], samples=2),
        model.sample(features + 1, CELLS, samples=2),
    ):
        assert not np.allclose(other.samples, wanted.samples)
    assert model.sample(features[:0]).samples.shape == (0, 20, len(GENES))


def test_wider_intervals_hold_more(model, features):
    found = model.sample(features, samples=1)
    (low, high), (lower, higher) = found.interval(0.5), found.interval(0.95)
    assert (lower <= low).all()
    assert (high <= higher).all()
    assert (lower < higher).any()
    for level in (0.0, 1.0):
        with pytest.raises(ValueError, match="an interval's level"):
            found.interval(level)


def test_a_library_scales_counts_alone(tmp_path, model, features):
    export_img2seq(str(tmp_path / "counts"), counts="negative binomial")
    counts = cosmic_ray.load_model(str(tmp_path / "counts"))
    library = np.full(7, 1000.0)
    np.testing.assert_allclose(counts.sample(features, library=library).mean.sum(1), 1000.0, rtol=1e-4)
    with pytest.raises(ValueError, match="library is for models that count"):
        model.sample(features, library=library)
    for bad in (library[:3], -library, library * np.nan):
        with pytest.raises(ValueError, match="library must be"):
            counts.sample(features, library=bad)


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        (lambda x: x[:, 1:], ValueError, r"takes \(N, 8\)"),
        (lambda x: np.repeat(x[:, None], TOKENS, axis=1), ValueError, r"takes \(N, 8\)"),
        (lambda x: x.astype(int), TypeError, "must be floating"),
        (lambda x: np.where(np.arange(7)[:, None] == 2, np.inf, x), ValueError, "row 2 are not finite"),
    ],
)
def test_features_that_the_model_does_not_take_are_refused(model, features, bad, error, says):
    with pytest.raises(error, match=says):
        model.sample(bad(features))


@pytest.mark.parametrize("settings", [{"samples": 0}, {"samples": 2.5}, {"batch_size": 0}])
def test_settings_out_of_range_are_refused(model, features, settings):
    with pytest.raises(ValueError, match="must be a whole number of at least 1"):
        model.sample(features, **settings)


@pytest.fixture
def published(tmp_path, crop_store, features) -> Callable[[str], Embeddings]:
    """`published(digest)`: the features as published embeddings that the FM of that digest made."""

    def publish(digest: str) -> Embeddings:
        store, out = crop_store(7), str(tmp_path / "features")
        with claim(MakeTestStore(out=out)) as target:
            lineage = {"model": {"uri": "models:/morphology-fm/1", "content_hash": digest, "lineage": {}}}
            told = {"store": store, "lineage": lineage, "simulated": True, "job": {}}
            write_embeddings(target.inside("vectors"), pa.array(CELLS), features, **told)
        return Embeddings.open(f"{out}/vectors")

    return publish


def test_published_features_of_its_fm_are_taken(model, features, published):
    found = model.sample(published(FM), samples=1)
    assert found.cell_ids == tuple(CELLS)
    np.testing.assert_array_equal(found.mean, model.sample(features, CELLS, samples=1).mean)


def test_published_features_of_another_fm_are_refused(model, published):
    with pytest.raises(DataError, match=r"of the model f{12}; .* was trained on those of the model d{12}"):
        model.sample(published("f" * 64))


def test_an_encoder_that_is_not_its_fm_is_refused(tmp_path):
    digest = export(str(tmp_path / "fm")).digest
    export(str(tmp_path / "other"), seed=1)
    own, other = (cosmic_ray.load_model(str(tmp_path / name), device="cpu") for name in ("fm", "other"))
    network = {"recipe": "better", "genes": 12, "feature_size": 24, "counts": "negative binomial", "hidden": 4}
    network |= {"depth": 1, "programs": 4, "heads": 0, "prefix_tokens": 1}
    weights = _weights(network)
    told = {"features": {"width": 24, "model": digest, "tokens": None}, "network": network, "state_dict": weights}
    export_img2seq(str(tmp_path / "img2seq"), **told)
    model = cosmic_ray.load_model(str(tmp_path / "img2seq"), device="cpu")
    features = own.embed(np.zeros((3, SIDE, SIDE), np.uint8))
    assert model.sample(features, encoder=own, samples=1).mean.shape == (3, 12)
    with pytest.raises(DataError, match="was trained on those of the model"):
        model.sample(features, encoder=other)


def test_a_model_without_calibrated_intervals_is_not_written(tmp_path):
    weights = img2seq()[1].state_dict()
    weights["calibration.quantiles"] = torch.zeros_like(weights["calibration.quantiles"])
    with pytest.raises(ValueError, match="not calibrated"):
        export_img2seq(str(tmp_path / "model"), state_dict=weights)
    assert not (tmp_path / "model").exists()


def test_expression_that_is_not_finite_is_refused(model, features):
    with torch.no_grad():
        next(model._network.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="predicted expression is not finite"):
        model.sample(features)


def _weights(network: dict) -> dict[str, torch.Tensor]:
    from cosmic_ray.models.img2seq import Img2SeqConfig

    made = Img2SeqConfig(**network).build()
    assert isinstance(made.calibration, Calibration)
    made.calibration.fit(torch.randn(50, network["genes"]))
    return made.state_dict()
