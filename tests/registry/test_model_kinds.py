"""What holds for a model folder of every kind: digests, tampering, typed networks, the registry."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tiny_models import FM, GENES, LATENT, export_img2seq, export_seq2img, export_transcriptome

import cosmic_ray
from cosmic_ray.errors import DataError, JobError
from cosmic_ray.models import img2seq, seq2img, transcriptome, unet, unet_imagen
from cosmic_ray.registry import server
from cosmic_ray.registry.card import model_card
from cosmic_ray.registry.kinds import KINDS
from cosmic_ray.registry.kinds.img2seq import Img2SeqFields
from cosmic_ray.registry.kinds.seq2img import ImagenFields, Sampling, UNetFields
from cosmic_ray.registry.kinds.transcriptome_encoder import TranscriptomeFields
from cosmic_ray.registry.lineage import lineage_tags
from cosmic_ray.registry.load import require_model
from cosmic_ray.registry.package import read_config, read_model, weights_name, write_model
from cosmic_ray.registry.register import register_model

EXPORTS: dict[str, Callable[..., Any]] = {
    "seq2img": export_seq2img,
    "transcriptome-encoder": export_transcriptome,
    "img2seq": export_img2seq,
}
OTHER: list[tuple[str, dict[str, Any]]] = [
    ("seq2img", {"seed": 1}),
    ("seq2img", {"recipe": "paper"}),
    ("seq2img", {"condition_drop": 0.2}),
    ("seq2img", {"latents": {"width": LATENT, "model": "f" * 64}}),
    ("seq2img", {"latents": {"width": LATENT, "model": None}}),
    ("seq2img", {"input": {"channels": ["dna"], "height": 16, "width": 16}}),
    ("seq2img", {"sampling": {"sampler": "ddim", "steps": 4, "guidance": 1.5}}),
    ("transcriptome-encoder", {"seed": 1}),
    ("transcriptome-encoder", {"method": "pca"}),
    ("transcriptome-encoder", {"genes": GENES[1:9]}),
    ("transcriptome-encoder", {"total_genes": GENES}),
    ("img2seq", {"seed": 1}),
    ("img2seq", {"recipe": "paper"}),
    ("img2seq", {"counts": "negative binomial"}),
    ("img2seq", {"genes": GENES[::-1]}),
    ("img2seq", {"features": {"width": 8, "model": "f" * 64, "tokens": None}}),
]


@pytest.fixture(params=EXPORTS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def folder(tmp_path, kind) -> str:
    """An exported model folder of that kind."""
    EXPORTS[kind](str(tmp_path / "run" / "model"))
    return str(tmp_path / "run" / "model")


def test_a_folder_round_trips_bit_for_bit(tmp_path, home, kind):
    written = EXPORTS[kind](f"{home}/model")
    stored = read_model(f"{home}/model")
    assert stored.config == written
    again = write_model(
        str(tmp_path / "again"),
        kind,
        {key: value for key, value in stored.config.model_dump(mode="json").items() if key not in COMMON},
        stored.network().state_dict(),
        lineage=stored.config.lineage,
        card=stored.card,
        simulated=stored.config.simulated,
    )
    assert again == written
    assert Path(tmp_path, "again", weights_name(kind)).read_bytes() == stored.weights


COMMON = {"format", "version", "kind", "weights_sha256", "digest", "lineage", "simulated"}


@pytest.mark.parametrize(("kind", "change"), OTHER)
def test_the_digest_changes_with_all_that_decides_what_it_gives(tmp_path, kind, change):
    digest = EXPORTS[kind](str(tmp_path / "a")).digest
    assert EXPORTS[kind](str(tmp_path / "b"), **change).digest != digest


def test_the_digest_changes_with_nothing_else(tmp_path, kind, folder):
    other = EXPORTS[kind](str(tmp_path / "b"), card="# another", lineage={}, simulated=False)
    assert other.digest == read_config(folder).digest


def test_every_key_is_decided_on():
    """A key that a kind adds is covered by the digest, or is one of those that are known not to change anything."""
    for kind, model in KINDS.items():
        left = set(model.config_type.model_fields) - COMMON - set(model.config_type.decides)
        assert left == {"encoder": {"embedding_width"}, "transcriptome-encoder": {"batches"}}.get(kind, set())


def test_damaged_weights_are_refused_by_name(folder, kind):
    path = Path(folder, weights_name(kind))
    tensors = load_file(path)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, path)
    with pytest.raises(DataError, match=rf"{kind}\.safetensors: its sha256 is"):
        read_model(folder)


@pytest.mark.parametrize(
    ("kind", "change"), [pair for pair in OTHER if not {"seed", "recipe", "method", "counts"} & set(pair[1])]
)
def test_a_changed_config_is_refused(tmp_path, kind, change):
    EXPORTS[kind](str(tmp_path))
    edit(str(tmp_path), change)
    with pytest.raises(DataError, match="digest does not match"):
        read_model(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("seq2img", {"network": {"class": "os.system"}}, "network"),
        ("seq2img", {"network": {"image_size": 10**9}}, "less than or equal to 4096"),
        ("seq2img", {"network": {"widths": [8] * 1000}}, "at most 8"),
        ("seq2img", {"network": {"depths": [1, 10**6]}}, "less than or equal to 64"),
        ("seq2img", {"network": {"condition_size": 7}}, "network takes latents of 7"),
        ("seq2img", {"network": {"channels": 3}}, "network makes 3 channels"),
        ("seq2img", {"recipe": "paper"}, "not one of recipe 'paper'"),
        ("seq2img", {"sampling": {"sampler": "mine"}}, "sampling.sampler"),
        ("seq2img", {"sampling": {"guidance": float("inf")}}, "sampling.guidance"),
        ("seq2img", {"callback": "os.system"}, "unknown key"),
        ("seq2img", {"kind": "pickle"}, "kind 'pickle'; this code reads encoder"),
        ("seq2img", {"kind": ["encoder"]}, "this code reads encoder"),
        ("transcriptome-encoder", {"network": {"method": "eval"}}, "network.method"),
        ("transcriptome-encoder", {"network": {"layers": 10**6}}, "network.layers"),
        ("transcriptome-encoder", {"network": {"target_total": 0}}, "network.target_total"),
        ("img2seq", {"network": {"recipe": "paper"}}, "recipe 'paper', and it alone, takes tokens"),
        ("img2seq", {"network": {"hidden": 10**9}}, "network.hidden"),
        ("img2seq", {"network": {"genes": 11}}, "network tells 11 genes; 12 are named"),
        ("img2seq", {"genes": ["A"] * 12}, "11 genes stand twice"),
        ("img2seq", {"features": {"width": 9, "model": FM}}, "network takes features of 8, not 9"),
    ],
)
def test_a_config_says_known_networks_and_typed_settings_only(tmp_path, kind, change, says):
    EXPORTS[kind](str(tmp_path))
    edit(str(tmp_path), change)
    with pytest.raises(DataError, match=says):
        read_config(str(tmp_path))


def test_a_network_larger_than_its_weights_is_refused_before_it_is_made(tmp_path):
    config = export_seq2img(str(tmp_path))
    huge = config.network.model_copy(update={"widths": (4096,) * 8, "depths": (4,) * 8, "image_size": 4096})
    weights = read_model(str(tmp_path)).tensors()
    with pytest.raises(ValueError, match=r"size mismatch|Missing key"):
        config.model_copy(update={"network": huge}).build(weights)  # would be 100 GB


@pytest.mark.parametrize(
    ("fields", "network"),
    [
        (UNetFields, unet.UNetConfig),
        (ImagenFields, unet_imagen.ImagenConfig),
        (TranscriptomeFields, transcriptome.TranscriptomeSpec),
        (Img2SeqFields, img2seq.Img2SeqConfig),
    ],
)
def test_a_section_says_all_that_its_network_takes(fields, network):
    assert set(fields.model_fields) == {field.name for field in dataclasses.fields(network)}


def test_samplers_are_those_there_are():
    from typing import get_args

    from cosmic_ray.models.sampling import Sampler

    assert get_args(Sampling.model_fields["sampler"].annotation) == get_args(Sampler)
    assert {field.name for field in dataclasses.fields(seq2img.Seq2ImgConfig)} == {
        "recipe",
        "network",
        "condition_drop",
    }


def test_reading_a_config_needs_no_torch(folder):
    code = (
        "import sys; from cosmic_ray.registry.package import read_config; "
        f"read_config({folder!r}); print({{'torch', 'mlflow', 'ray', 'scipy', 'anndata'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_registered_model_says_what_it_is_and_gives_the_same(tracking, folder, kind):
    name = f"{kind}-{uuid.uuid4().hex[:8]}"
    register_model(folder, name)
    client = server.connect(tracking)
    version = client.get_model_version_by_alias(name, "candidate")
    config = read_config(folder)
    assert client.get_registered_model(name).description == KINDS[kind].about
    assert version.tags["cosmic_ray.model_digest"] == config.digest
    assert version.tags["cosmic_ray.store_hash"] == "5" * 64
    assert version.tags["cosmic_ray.encoder_hash"] == "e" * 64
    model = cosmic_ray.load_model(f"models:/{name}@candidate")
    assert type(model) is KINDS[kind]
    with server.globally(tracking):
        loaded = mlflow.pyfunc.load_model(f"models:/{name}/1")
    served = config.served()
    for said, (dtype, shape) in (
        (loaded.metadata.signature.inputs, served.takes),
        (loaded.metadata.signature.outputs, served.gives),
    ):
        assert (said.inputs[0].type.name, said.inputs[0].shape) == (dtype, shape)
    found = loaded.predict(served.example)
    np.testing.assert_array_equal(found, model.predict(served.example))
    assert found.dtype == served.gives[0]
    assert found.shape == (len(served.example), *served.gives[1][1:])
    with pytest.raises(mlflow.exceptions.MlflowException):
        loaded.predict(served.example[:, :-1])


def test_a_model_of_another_kind_is_refused_before_anything_starts(tracking, folder, kind):
    name = f"{kind}-{uuid.uuid4().hex[:8]}"
    register_model(folder, name)
    for uri in (folder, f"models:/{name}@candidate"):
        require_model(uri, "fm", kinds=("encoder", kind))
        with pytest.raises(JobError, match=rf"fm = .*: a model of kind {kind} \(wanted here: encoder\)"):
            require_model(uri, "fm")


def test_tags_tell_the_whole_chain_that_a_model_was_made_from():
    fm = {"content_hash": "3", "lineage": {"store": {"content_hash": "4"}, "split": {"content_hash": "5"}}}
    features = {"uri": "x", "content_hash": "2", "lineage": {"model": fm}}
    lineage = {"store": {"uri": "y", "content_hash": "1"}, "features": features, "job": "abc", "none": None, "list": []}
    assert lineage_tags(lineage) == {
        "job": "abc",
        "store_hash": "1",
        "features_hash": "2",
        "features_model_hash": "3",
        "features_model_store_hash": "4",
        "features_model_split_hash": "5",
    }


def test_parameters_of_a_registered_model_are_its_samplers(tracking, tmp_path):
    name = f"seq2img-{uuid.uuid4().hex[:8]}"
    export_seq2img(str(tmp_path))
    register_model(str(tmp_path), name)
    model = cosmic_ray.load_model(f"models:/{name}@candidate")
    with server.globally(tracking):
        loaded = mlflow.pyfunc.load_model(f"models:/{name}/1")
    latents = np.random.default_rng(0).normal(size=(3, LATENT)).astype(np.float32)
    given = {"seed": 5, "guidance": 2.0, "sampler": "ddim", "steps": 3}
    np.testing.assert_array_equal(loaded.predict(latents, given), model.sample(latents, **given))
    np.testing.assert_array_equal(loaded.predict(latents), model.sample(latents))


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_says_what_made_it_and_what_was_simulated(kind):
    told = {"recipe": "better", "facts": {"parameters": "12"}, "lineage": {"store": {"uri": "s3://u:SECRET@b/cells"}}}
    card = model_card(kind, "name", **told, metrics={"val/loss": 0.5}, simulated=True, job={"kind": "train"})
    for part in (
        "# name",
        "Trained on simulated",
        "models:/name@candidate",
        "| val/loss | 0.5 |",
        "## Limits",
        "| kind |",
    ):
        assert part in card
    assert "SECRET" not in card
    assert "simulated" not in model_card(kind, "name", **told, metrics={}, simulated=False, job={})


def edit(folder: str, change: dict[str, Any]) -> None:
    """Lay `change` over `config.json`, one level deep."""
    path = Path(folder, "config.json")
    config = json.loads(path.read_text())
    for key, value in change.items():
        config[key] = config[key] | value if isinstance(value, dict) and key in config else value
    path.write_text(json.dumps(config))
