"""Embedding crops: the network's own numbers, and refusals at the door."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_encoder import SIDE, encoder, export

import cosmic_ray
from cosmic_ray.ingest.augment import prepare


@pytest.fixture
def crops() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (23, 1, SIDE, SIDE), np.uint8)


@pytest.mark.parametrize("recipe", ["better", "paper"])
def test_embeddings_are_the_networks_on_prepared_crops(tmp_path, crops, recipe):
    export(str(tmp_path), recipe=recipe)
    with torch.no_grad():
        wanted = encoder(channels=3 if recipe == "paper" else 1)[1](prepare(torch.from_numpy(crops), 32, recipe))
    found = cosmic_ray.load_model(str(tmp_path), device="cpu").embed(crops)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, wanted.numpy())


def test_batches_change_only_the_rounding_and_runs_nothing(model_folder, crops):
    model = cosmic_ray.load_model(model_folder, device="cpu")
    np.testing.assert_array_equal(model.embed(crops, batch_size=4), model.embed(crops, batch_size=4))
    np.testing.assert_allclose(model.embed(crops, batch_size=4), model.embed(crops), rtol=1e-5, atol=1e-6)


def test_one_channel_may_go_without_its_axis(model_folder, crops):
    model = cosmic_ray.load_model(model_folder)
    np.testing.assert_array_equal(model.embed(crops[:, 0]), model.embed(crops))
    assert model.embed(crops[:0]).shape == (0, 24)


def test_bfloat16_is_close(model_folder, crops):
    model = cosmic_ray.load_model(model_folder)
    exact, close = model.embed(crops), model.embed(crops, precision="bfloat16")
    assert close.dtype == np.float32
    assert 0 < np.abs(close - exact).max() < 0.05 * np.abs(exact).max()


def test_a_model_is_read_from_a_bucket(s3, crops, model_folder):
    export(f"{s3}/model")
    np.testing.assert_array_equal(
        cosmic_ray.load_model(f"{s3}/model").embed(crops), cosmic_ray.load_model(model_folder).embed(crops)
    )


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        (np.zeros((2, 1, SIDE, SIDE), np.float32), TypeError, "must be uint8"),
        (np.zeros((2, 1, SIDE, SIDE), np.uint16), TypeError, "must be uint8"),
        (np.zeros((2, 3, SIDE, SIDE), np.uint8), ValueError, r"takes \(N, 1, 16, 16\) or \(N, 16, 16\)"),
        (np.zeros((2, 1, SIDE, SIDE + 1), np.uint8), ValueError, "takes"),
        (np.zeros((SIDE, SIDE), np.uint8), ValueError, "takes"),
        (np.zeros((2, SIDE, SIDE, 1), np.uint8), ValueError, "takes"),
    ],
)
def test_crops_that_the_model_does_not_take_are_refused(model_folder, bad, error, says):
    with pytest.raises(error, match=says):
        cosmic_ray.load_model(model_folder).embed(bad)


def test_a_model_of_several_channels_wants_their_axis(tmp_path):
    export(str(tmp_path), channels=3)
    with pytest.raises(ValueError, match="channel-0, channel-1, channel-2"):
        cosmic_ray.load_model(str(tmp_path)).embed(np.zeros((3, SIDE, SIDE), np.uint8))


def test_tokens_are_those_that_enter_the_last_block(tmp_path, crops):
    export(str(tmp_path))
    network = encoder()[1]
    with torch.no_grad():
        tokens = network.patch_embed(prepare(torch.from_numpy(crops), 32, "better"))
        tokens = network.norm_pre(network._pos_embed(tokens))
        for block in network.blocks[:-1]:
            tokens = block(tokens)
        ended = network.forward_head(network.norm(network.blocks[-1](tokens)))
    model = cosmic_ray.load_model(str(tmp_path), device="cpu")
    found = model.tokens(crops, batch_size=4)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, tokens.numpy(), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(model.embed(crops), ended.numpy(), rtol=1e-5, atol=1e-6)
    assert model.tokens(crops[:0]).shape == (0, *found.shape[1:])
    with pytest.raises(TypeError, match="must be uint8"):
        model.tokens(crops.astype(np.float32))


def test_embeddings_that_are_not_finite_are_refused(tmp_path, crops):
    state = encoder()[1].state_dict()
    state["patch_embed.proj.weight"] = torch.full_like(state["patch_embed.proj.weight"], 1e38)
    export(str(tmp_path), state_dict=state)
    with pytest.raises(ValueError, match="embedding of crop 0 is not finite"):
        cosmic_ray.load_model(str(tmp_path)).embed(crops)


def test_import_is_cheap_and_a_store_opens_without_torch(crop_store):
    store = crop_store(4)
    code = (
        "import sys, cosmic_ray; print({'torch', 'mlflow', 'ray', 'numpy', 'pydantic'} & set(sys.modules)); "
        f"print(len(cosmic_ray.open_store({store.uri!r}))); "
        "print({'torch', 'mlflow', 'ray'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:3] == ["set()", "4", "set()"]
