"""The exported model folder: what is written is what is read; anything else is refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tiny_encoder import encoder, export

from cosmic_ray import storage
from cosmic_ray.errors import DataError, JobError, NotFoundError
from cosmic_ray.registry.package import read_config, read_model, write_model


def test_the_weights_load_into_plain_timm_and_give_the_same_embedding(model_folder):
    _, network = encoder()
    images = torch.rand(3, 1, 32, 32)
    config = json.loads(Path(model_folder, "config.json").read_text())
    plain = timm.create_model(**config["network"]).eval()
    plain.load_state_dict(load_file(Path(model_folder, "encoder.safetensors")))
    with torch.no_grad():
        torch.testing.assert_close(plain(images), network(images), rtol=0, atol=0)
        torch.testing.assert_close(read_model(model_folder).network()(images), network(images), rtol=0, atol=0)


def test_a_folder_round_trips_in_a_bucket_as_on_disk(home):
    written = export(f"{home}/model")
    stored = read_model(f"{home}/model")
    assert stored.config == written
    assert stored.card == "# a card\n"
    assert stored.config.embedding_width == 24
    assert stored.config.simulated


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        export(str(tmp_path / name))
    for part in ("encoder.safetensors", "config.json", "card.md"):
        assert Path(tmp_path, "a", part).read_bytes() == Path(tmp_path, "b", part).read_bytes()


def test_the_digest_covers_what_decides_the_embeddings_and_nothing_else(tmp_path):
    digest = export(str(tmp_path / "a")).digest
    assert export(str(tmp_path / "b"), card="# another", lineage={}, simulated=False).digest == digest
    assert export(str(tmp_path / "c"), seed=1).digest != digest
    assert export(str(tmp_path / "d"), input={"channels": ["c"], "height": 8, "width": 8}).digest != digest


def test_the_digest_is_the_sha256_of_what_it_covers(model_folder):
    config = json.loads(Path(model_folder, "config.json").read_text())
    weights = hashlib.sha256(Path(model_folder, "encoder.safetensors").read_bytes()).hexdigest()
    covered = {key: config[key] for key in ("kind", "network", "input", "preprocessing")} | {"weights_sha256": weights}
    text = json.dumps(covered, sort_keys=True, separators=(",", ":"))
    assert config["digest"] == hashlib.sha256(text.encode()).hexdigest()


def test_no_secret_is_written_into_a_model(tmp_path):
    lineage = {"store": {"uri": "s3://KEY:SECRET@bucket/crops", "content_hash": "5"}}
    assert export(str(tmp_path), lineage=lineage).lineage["store"]["uri"] == "s3://***@bucket/crops"


def test_fixed_buffers_that_are_not_stored_survive(tmp_path):
    kwargs = {
        "model_name": "eva02_tiny_patch14_224",
        "img_size": 28,
        "in_chans": 1,
        "embed_dim": 24,
        "depth": 1,
        "num_heads": 2,
        "num_classes": 0,
    }
    network = timm.create_model(**kwargs).eval()
    facts = {
        "network": kwargs,
        "input": {"channels": ["dna"], "height": 16, "width": 16},
        "preprocessing": {"recipe": "better", "size": 28},
        "embedding_width": 24,
    }
    write_model(str(tmp_path), "encoder", facts, network.state_dict(), lineage={}, card="", simulated=True)
    images = torch.rand(2, 1, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(read_model(str(tmp_path)).network()(images), network(images), rtol=0, atol=0)


def test_damaged_weights_are_refused_by_name(model_folder):
    path = Path(model_folder, "encoder.safetensors")
    tensors = load_file(path)
    tensors["cls_token"] += 1
    save_file(tensors, path)
    with pytest.raises(DataError, match=r"encoder\.safetensors: its sha256 is"):
        read_model(model_folder)


def test_a_changed_config_is_refused(model_folder):
    path = Path(model_folder, "config.json")
    config = json.loads(path.read_text())
    config["preprocessing"]["size"] = 40
    path.write_text(json.dumps(config))
    with pytest.raises(DataError, match="digest does not match"):
        read_model(model_folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"format": "other"}, "not a cosmic-ray/model"), ({"version": 2}, "version 2"), ({"extra": 1}, "unknown key")],
)
def test_another_format_is_refused(model_folder, change, says):
    path = Path(model_folder, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=says):
        read_config(model_folder)


@pytest.mark.parametrize(
    "network",
    [
        {"pretrained": True},
        {"checkpoint_path": "weights.bin"},
        {"model_name": "hf-hub:someone/model"},
        {"model_name": "local-dir:/elsewhere"},
        {"pretrained_cfg": {"file": "x.pth"}},
    ],
)
def test_a_config_that_would_load_something_else_is_refused(model_folder, network):
    path = Path(model_folder, "config.json")
    config = json.loads(path.read_text())
    config["network"] |= network
    path.write_text(json.dumps(config))
    with pytest.raises(DataError, match="network"):
        read_model(model_folder)


def test_without_its_config_there_is_no_model(model_folder):
    storage.delete(f"{model_folder}/config.json")
    with pytest.raises(NotFoundError, match="no model is here"):
        read_model(model_folder)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"state_dict": {}}, ValueError, "Missing key"),
        (
            {"state_dict": {key: value * float("nan") for key, value in encoder()[1].state_dict().items()}},
            ValueError,
            "not finite",
        ),
        ({"preprocessing": {"recipe": "paper", "size": 32}}, ValueError, "does not take"),
        ({"preprocessing": {"recipe": "better", "size": 30}}, ValueError, "does not take"),
        ({"preprocessing": {"recipe": "best", "size": 32}}, JobError, r"preprocessing\.recipe"),
        ({"input": {"channels": ["a"], "height": 16, "width": 8}}, JobError, "must be square"),
        ({"network": {**encoder()[0], "global_pool": ""}}, ValueError, "not one vector a crop|Missing|Unexpected"),
    ],
)
def test_what_does_not_fit_together_is_not_written(tmp_path, change, error, says):
    with pytest.raises(error, match=says):
        export(str(tmp_path / "model"), **change)
    assert not Path(tmp_path, "model", "config.json").exists()


def test_reading_a_config_needs_neither_torch_nor_mlflow(model_folder):
    code = (
        "import sys; from cosmic_ray.registry.package import read_config; "
        f"read_config({model_folder!r}); print({{'torch', 'mlflow', 'ray', 'timm'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
