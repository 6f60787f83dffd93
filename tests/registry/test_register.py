"""A model folder becomes a version of a registered model, once, in a real MLflow store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import mlflow
import numpy as np
import pytest
from tiny_encoder import SIDE, export

import cosmic_ray
from cosmic_ray.errors import DataError, JobError, NotFoundError
from cosmic_ray.registry import server
from cosmic_ray.registry.register import register_model
from cosmic_ray.registry.tracking import Tracker


@pytest.fixture
def name() -> str:
    """A registered model that no other test knows."""
    return f"morphology-fm-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def client(tracking: str) -> mlflow.MlflowClient:
    return server.connect(tracking)


def crops(count: int, channels: int | None = None) -> np.ndarray:
    shape = (count, SIDE, SIDE) if channels is None else (count, channels, SIDE, SIDE)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def test_a_version_says_what_it_is_and_what_it_was_made_from(client, model_folder, name):
    assert register_model(model_folder, name) == "1"
    version = client.get_model_version_by_alias(name, "candidate")
    config = json.loads(Path(model_folder, "config.json").read_text())
    assert version.description == "# a card\n"
    assert version.tags["cosmic_ray.model_digest"] == config["digest"]
    assert version.tags["cosmic_ray.store_hash"] == "5" * 64
    assert version.tags["cosmic_ray.split_hash"] == "7" * 64
    assert version.tags["cosmic_ray.job"] == "0123456789abcdef"
    assert version.tags["cosmic_ray.simulated"] == "true"
    with server.globally(server.tracking_uri()):
        info = mlflow.models.get_model_info(f"models:/{name}/1")
        folder = Path(mlflow.artifacts.download_artifacts(f"models:/{name}/1"))
    assert info.signature.inputs.to_dict() == [
        {"type": "tensor", "tensor-spec": {"dtype": "uint8", "shape": (-1, SIDE, SIDE)}}
    ]
    assert info.signature.outputs.to_dict() == [
        {"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": (-1, 24)}}
    ]
    assert np.array(json.loads((folder / "input_example.json").read_text())).shape == (2, SIDE, SIDE)
    assert not [path for path in folder.rglob("*") if path.suffix in {".pkl", ".pickle", ".pt", ".pth", ".bin"}]


def test_the_same_model_of_the_same_run_is_one_version(client, tmp_path, model_folder, name):
    assert [register_model(model_folder, name), register_model(model_folder, name)] == ["1", "1"]
    export(str(tmp_path / "other"), seed=1)
    assert register_model(str(tmp_path / "other"), name) == "2"
    assert register_model(model_folder, name) == "1"
    assert int(client.get_model_version_by_alias(name, "candidate").version) == 2, "an old run must not take it back"


def test_a_registration_that_was_cut_short_is_completed(client, model_folder, name, monkeypatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "set_registered_model_alias", killed)
        with pytest.raises(KeyboardInterrupt):
            register_model(model_folder, name)
    assert register_model(model_folder, name) == "1"
    assert int(client.get_model_version_by_alias(name, "candidate").version) == 1


@pytest.mark.parametrize("alias", ["latest", "Latest"])
def test_the_alias_latest_is_refused(model_folder, name, alias):
    with pytest.raises(JobError, match="MLflow reserves this alias"):
        register_model(model_folder, name, alias=alias)


def test_a_registered_model_embeds_as_the_trainers_network(tracking, model_folder, name):
    register_model(model_folder, name)
    model = cosmic_ray.load_model(f"models:/{name}@candidate")
    assert model.uri == f"models:/{name}/1"
    found = model.embed(crops(5))
    np.testing.assert_array_equal(found, cosmic_ray.load_model(model_folder).embed(crops(5)))
    with server.globally(tracking):
        loaded = mlflow.pyfunc.load_model(f"models:/{name}/1")
    np.testing.assert_array_equal(loaded.predict(crops(5)), found)
    for bad in (crops(5).astype(np.float32), crops(5)[:, :8]):
        with pytest.raises(mlflow.exceptions.MlflowException):
            loaded.predict(bad)


@pytest.mark.slow
def test_mlflow_alone_loads_it_in_a_clean_process(tracking, model_folder, name, tmp_path):
    register_model(model_folder, name)
    np.save(tmp_path / "crops.npy", crops(4))
    code = (
        "import mlflow, numpy as np; "
        f"model = mlflow.pyfunc.load_model('models:/{name}@candidate'); "
        "np.save('embeddings.npy', model.predict(np.load('crops.npy')))"
    )
    environment = {**os.environ, "MLFLOW_TRACKING_URI": tracking}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment, capture_output=True)
    np.testing.assert_array_equal(
        np.load(tmp_path / "embeddings.npy"), cosmic_ray.load_model(model_folder).embed(crops(4))
    )


def test_several_channels_have_a_signature_of_their_own(client, tmp_path, name):
    export(str(tmp_path / "model"), channels=5)
    register_model(str(tmp_path / "model"), name)
    with server.globally(server.tracking_uri()):
        loaded = mlflow.pyfunc.load_model(f"models:/{name}/1")
    assert loaded.metadata.signature.inputs.inputs[0].shape == (-1, 5, SIDE, SIDE)
    assert loaded.predict(crops(3, 5)).shape == (3, 24)


def test_a_model_belongs_to_the_run_that_made_it(client, model_folder, name, tmp_path):
    with Tracker(str(tmp_path / "run"), {"kind": "test"}, name="test", lineage={}, simulated=True) as tracker:
        tracker.register(model_folder, name)
    assert tracker.registered == {name: "1"}
    assert client.get_model_version(name, "1").run_id == tracker.run_id
    outputs = client.get_run(tracker.run_id).outputs.model_outputs
    assert [client.get_logged_model(output.model_id).name for output in outputs] == [name]


@pytest.mark.parametrize(
    ("uri", "error", "says"),
    [
        ("models:/morphology-fm", JobError, "write models:/NAME@ALIAS"),
        ("models:/morphology-fm@latest", JobError, "name an alias or a version"),
        ("models:/morphology-fm/latest", JobError, "name an alias or a version"),
        ("models:/morphology-fm/three", JobError, "versions are numbers"),
        ("models:/no-such-model@candidate", DataError, "no-such-model"),
        ("models:/no-such-model/3", DataError, "no-such-model"),
        ("/no/such/folder", NotFoundError, "no model is here"),
    ],
)
def test_a_model_that_is_not_there_is_named(tracking, uri, error, says):
    with pytest.raises(error, match=says):
        cosmic_ray.load_model(uri)


def test_no_database_is_made_by_looking_for_a_model(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError, match="no tracking database at"):
        cosmic_ray.load_model("models:/morphology-fm@candidate")
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_points_to_its_model(model_folder):
    with pytest.raises(NotFoundError, match=r"did you mean .*/run/model\?"):
        cosmic_ray.load_model(str(Path(model_folder).parent))
