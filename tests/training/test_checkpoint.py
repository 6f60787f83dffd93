"""Checkpoints: whole or absent, verified, retained, refused where the disk is full."""

from __future__ import annotations

import pytest
import torch

from cosmic_ray import storage
from cosmic_ray.errors import DataError, FencedError, NotFoundError
from cosmic_ray.training import checkpoint

TENSORS = {"net.weight": torch.arange(12.0).view(3, 4), "net.bias": torch.tensor([1, 2], dtype=torch.bfloat16)}


def publish(home, step, tensors=TENSORS):
    files = {checkpoint.WEIGHTS: lambda: tensors, checkpoint.OPTIMIZER: lambda: {"net.weight/step": torch.tensor(3.0)}}
    return checkpoint.publish(f"{home}/checkpoints", step, files, {"step": step, "cursor": {"position": 9}}, 1000)


def test_round_trip(home):
    assert checkpoint.newest(f"{home}/checkpoints") is None
    uri = publish(home, 7)
    assert checkpoint.newest(f"{home}/checkpoints") == uri
    assert checkpoint.read_state(uri) == {"step": 7, "cursor": {"position": 9}}
    found = checkpoint.read_tensors(uri, checkpoint.WEIGHTS)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[key], TENSORS[key]) and found[key].dtype == TENSORS[key].dtype for key in found)
    assert checkpoint.names(uri) == sorted([checkpoint.WEIGHTS, checkpoint.OPTIMIZER, checkpoint.STATE])
    with pytest.raises(NotFoundError, match="no such file"):
        checkpoint.read_tensors(uri, checkpoint.EMA)


def test_nothing_is_pickled(tmp_path):
    """A pickle begins with byte 0x80; a safetensors file with the length of its JSON header."""
    uri = publish(tmp_path, 1)
    for name in checkpoint.names(uri):
        data = storage.read_bytes(storage.join(uri, name))
        assert data[:1] == b"{" or data[8:9] == b"{", name


def test_equal_weights_have_equal_digests(tmp_path):
    one, other = publish(tmp_path / "a", 1), publish(tmp_path / "b", 5)
    moved = publish(tmp_path / "c", 1, {**TENSORS, "net.weight": TENSORS["net.weight"] + 1e-6})
    assert checkpoint.digest(one) == checkpoint.digest(other) != checkpoint.digest(moved)


def test_a_killed_publication_is_ignored_and_removed(home):
    whole = publish(home, 10)
    for name in (checkpoint.WEIGHTS, checkpoint.STATE):
        storage.write_bytes(f"{home}/checkpoints/step-00000020/{name}", b"half")
    assert checkpoint.newest(f"{home}/checkpoints") == whole
    checkpoint.retain(f"{home}/checkpoints", 2)
    assert not storage.listing(f"{home}/checkpoints/step-00000020")
    assert checkpoint.newest(f"{home}/checkpoints") == whole


def test_the_newest_are_kept(home):
    for step in (10, 20, 100, 200):
        publish(home, step)
    checkpoint.retain(f"{home}/checkpoints", 2)
    left = {uri.split("/step-")[1].split("/")[0] for uri in storage.listing(f"{home}/checkpoints")}
    assert left == {"00000100", "00000200"}


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.STATE])
def test_damage_is_refused_with_its_uri(tmp_path, name, damage):
    uri = publish(tmp_path, 3)
    path = storage.local_path(storage.join(uri, name))
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flipped" else data[:-1])
    read = checkpoint.read_state if name == checkpoint.STATE else lambda uri: checkpoint.read_tensors(uri, name)
    with pytest.raises(DataError, match=name):
        read(uri)


def test_an_unknown_version_is_refused(tmp_path):
    uri = publish(tmp_path, 3)
    path = storage.local_path(storage.join(uri, "manifest.json"))
    path.write_text(path.read_text().replace('"version": 1', '"version": 9'))
    with pytest.raises(DataError, match="version 9"):
        checkpoint.read_state(uri)


def test_one_checkpoint_is_published_once(tmp_path):
    publish(tmp_path, 3)
    with pytest.raises(FencedError):
        publish(tmp_path, 3)


def test_a_full_disk_is_seen_before_writing(tmp_path, monkeypatch):
    kept = publish(tmp_path, 3)
    monkeypatch.setattr(checkpoint, "room", lambda path: 60_000_000)
    with pytest.raises(DataError, match=r"60 MB are free here and a checkpoint takes about 0 MB.*older checkpoints"):
        publish(tmp_path, 4)
    assert checkpoint.newest(f"{tmp_path}/checkpoints") == kept
    assert not storage.exists(f"{tmp_path}/checkpoints/step-00000004")
