"""seq2img as its user has it: the sampler's own images, the same in any batch, and refusals at the door."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
import torch
from making import MakeTestStore
from tiny_models import LATENT, LATENTS_BY, SIDE, export_seq2img, seq2img

import cosmic_ray
from cosmic_ray.errors import DataError, JobError
from cosmic_ray.ingest.cell_noise import cell_keys, cell_noise
from cosmic_ray.models.sampling import sample
from cosmic_ray.output import claim
from cosmic_ray.registry.kinds.seq2img import Seq2Img
from cosmic_ray.stores.embeddings import Embeddings, write_embeddings

CELLS = [f"cell-{number}" for number in range(7)]


@pytest.fixture
def latents() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(7, LATENT)).astype(np.float32)


@pytest.fixture
def crops() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (7, 1, SIDE, SIDE), np.uint8)


@pytest.fixture
def model(tmp_path) -> Seq2Img:
    export_seq2img(str(tmp_path / "seq2img"))
    return cosmic_ray.load_model(str(tmp_path / "seq2img"), device="cpu")


def close(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Equal but for rounding: a grey level here and there."""
    apart = np.abs(found.astype(int) - wanted.astype(int))
    return bool(apart.max() <= 1 and (apart > 0).mean() < 0.01)


@pytest.mark.parametrize("recipe", ["better", "paper"])
def test_images_are_the_samplers_own(tmp_path, latents, recipe):
    export_seq2img(str(tmp_path), recipe=recipe)
    config, network = seq2img(recipe=recipe)
    noise = cell_noise(3, cell_keys(CELLS), config.shape)
    settings = {"sampler": "unipc", "steps": 4, "guidance": 1.5}
    wanted = config.to_crops(sample(network, config.diffusion, torch.from_numpy(latents), noise, **settings).images)
    found = cosmic_ray.load_model(str(tmp_path), device="cpu").sample(latents, CELLS, seed=3)
    assert found.dtype == np.uint8
    assert found.shape == (7, 1, SIDE, SIDE)
    np.testing.assert_array_equal(found, wanted.numpy())
    assert found.std() > 10, "an image that is all one grey tests nothing"


def test_several_channels_come_out(tmp_path, latents):
    export_seq2img(str(tmp_path), channels=3)
    model = cosmic_ray.load_model(str(tmp_path))
    assert model.sample(latents).shape == (7, *model.config.output.shape) == (7, 3, SIDE, SIDE)


@pytest.mark.parametrize("sampler", ["unipc", "ddpm"])
def test_a_cell_gets_the_same_image_in_any_batch_and_order(model, latents, sampler):
    wanted = model.sample(latents, CELLS, sampler=sampler)
    np.testing.assert_array_equal(model.sample(latents, CELLS, sampler=sampler), wanted)
    for size in (1, 3):
        assert close(model.sample(latents, CELLS, sampler=sampler, batch_size=size), wanted)
    order = [4, 0, 6]
    assert close(model.sample(latents[order], [CELLS[i] for i in order], sampler=sampler), wanted[order])


def test_seed_cell_and_latent_each_make_another_image(model, latents):
    wanted = model.sample(latents, CELLS)
    others = [
        model.sample(latents, CELLS, seed=1),
        model.sample(latents, [f"{cell}'" for cell in CELLS]),
        model.sample(latents + 1, CELLS),
        model.sample(latents, CELLS, guidance=3.0),
        model.sample(latents, CELLS, steps=6),
    ]
    assert not any(close(other, wanted) for other in others)
    np.testing.assert_array_equal(model.sample(latents), model.sample(latents, [str(row) for row in range(7)]))
    np.testing.assert_array_equal(model.sample(latents, guidance=0.0), model.sample(latents + 1, guidance=0.0))
    assert model.sample(latents[:0]).shape == (0, 1, SIDE, SIDE)


def test_a_refined_image_keeps_more_the_less_strength(model, latents, crops):
    changed = [
        np.abs(model.refine(crops, latents, CELLS, strength=strength, steps=20).astype(int) - crops).mean()
        for strength in (0.02, 0.3, 1.0)
    ]
    assert changed == sorted(changed)
    assert changed[0] < 0.2 * changed[2]
    from_noise = model.sample(latents, CELLS).astype(int)
    assert np.abs(model.refine(crops[:, 0], latents, CELLS, strength=1.0) - from_noise).mean() < 0.1


def test_bfloat16_is_close(model, latents):
    exact, close = (model.sample(latents, precision=name).astype(int) for name in ("float32", "bfloat16"))
    assert 0 < np.abs(close - exact).mean() < 10


@pytest.mark.parametrize("recipe", ["better", "paper"])
def test_refined_images_are_the_samplers_own(tmp_path, latents, crops, recipe):
    export_seq2img(str(tmp_path), recipe=recipe)
    config, network = seq2img(recipe=recipe)
    start = torch.from_numpy(crops).float().expand(-1, config.shape[0], -1, -1) / 127.5 - 1
    settings = {"sampler": "ddim", "steps": 6, "guidance": 1.0, "start": start, "strength": 0.6}
    noise = cell_noise(0, cell_keys(CELLS), config.shape)
    wanted = config.to_crops(sample(network, config.diffusion, torch.from_numpy(latents), noise, **settings).images)
    model = cosmic_ray.load_model(str(tmp_path), device="cpu")
    found = model.refine(crops, latents, CELLS, strength=0.6, sampler="ddim", steps=6, guidance=1.0)
    assert close(found, wanted.numpy())


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        (lambda x: x[:, 1:], ValueError, r"takes \(N, 6\)"),
        (lambda x: x[0], ValueError, r"takes \(N, 6\)"),
        (lambda x: (100 * x).astype(int), TypeError, "must be floating, not int64"),
        (lambda x: np.where(np.arange(7)[:, None] == 2, np.nan, x), ValueError, "row 2 are not finite"),
        (lambda x: x.astype(np.float64) + 1e300, ValueError, "row 0 are not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_latents_that_the_model_does_not_take_are_refused(model, latents, bad, error, says):
    with pytest.raises(error, match=says):
        model.sample(bad(latents))


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        (lambda x: x.astype(np.float32), TypeError, "must be uint8"),
        (lambda x: x[:, :, :8], ValueError, "takes"),
        (lambda x: np.repeat(x, 3, axis=1), ValueError, "with channels channel-0"),
        (lambda x: x[:5], ValueError, "5 crops for 7 latents"),
    ],
)
def test_crops_that_the_model_does_not_take_are_refused(model, latents, crops, bad, error, says):
    with pytest.raises(error, match=says):
        model.refine(bad(crops), latents)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"cell_ids": CELLS[:3]}, ValueError, "3 cell ids for 7 cells"),
        ({"cell_ids": list(range(7))}, TypeError, "cell ids are text"),
        ({"steps": 0}, ValueError, "steps must be"),
        ({"guidance": float("nan")}, ValueError, "guidance must be"),
        ({"guidance": -1.0}, ValueError, "guidance must be"),
        ({"sampler": "best"}, ValueError, "unknown sampler"),
        ({"batch_size": 0}, ValueError, "batch_size must be"),
    ],
)
def test_settings_out_of_range_are_refused(model, latents, settings, error, says):
    with pytest.raises(error, match=says):
        model.sample(latents, **settings)


@pytest.mark.parametrize("strength", [0.0, 1.5, float("nan")])
def test_a_strength_out_of_range_is_refused(model, latents, crops, strength):
    with pytest.raises(ValueError, match="strength must be"):
        model.refine(crops, latents, strength=strength)


def test_guidance_wants_a_model_that_knows_what_no_latent_is(tmp_path, latents):
    with pytest.raises(JobError, match="guidance needs a model"):
        export_seq2img(str(tmp_path), condition_drop=0.0)
    sampling = {"sampler": "unipc", "steps": 2, "guidance": 1.0}
    export_seq2img(str(tmp_path), condition_drop=0.0, sampling=sampling)
    with pytest.raises(ValueError, match="guidance needs a model"):
        cosmic_ray.load_model(str(tmp_path)).sample(latents, guidance=2.0)


def test_images_that_are_not_finite_are_refused(model, latents):
    with torch.no_grad():
        next(model._network.parameters()).fill_(1e38)
    with pytest.raises(ValueError, match="a sampled image is not finite"):
        model.sample(latents)


@pytest.fixture
def published(tmp_path, crop_store, latents) -> Callable[[str | None], Embeddings]:
    """`published(digest)`: the latents as published embeddings that the model of that digest made."""

    def publish(digest: str | None) -> Embeddings:
        store, out = crop_store(7), str(tmp_path / "latents")
        with claim(MakeTestStore(out=out)) as target:
            lineage = {"model": {"uri": "models:/scvi/1", "content_hash": digest, "lineage": {}}}
            told = {"store": store, "lineage": lineage if digest else {}, "simulated": True, "job": {}}
            write_embeddings(target.inside("vectors"), pa.array(CELLS), latents, **told)
        return Embeddings.open(f"{out}/vectors")

    return publish


def test_published_latents_are_taken_from_their_encoder_alone(model, latents, published):
    np.testing.assert_array_equal(model.sample(published(LATENTS_BY)), model.sample(latents, CELLS))
    other = [f"{cell}'" for cell in CELLS]
    np.testing.assert_array_equal(model.sample(published(LATENTS_BY), other), model.sample(latents, other))


@pytest.mark.parametrize(("digest", "says"), [("f" * 64, "of the model ffffffffffff"), (None, "no registered model")])
def test_published_latents_of_another_encoder_are_refused(model, published, digest, says):
    with pytest.raises(DataError, match=says):
        model.sample(published(digest))
