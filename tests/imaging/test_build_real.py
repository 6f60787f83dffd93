"""`build-crops` on real fields: hand-made label images, and our own segmentation against them."""

from __future__ import annotations

import numpy as np
import pytest

from cosmic_ray import storage
from cosmic_ray.config import validate
from cosmic_ray.imaging.fields import read_labels
from cosmic_ray.imaging.job import BuildCrops
from cosmic_ray.imaging.segment import measure
from cosmic_ray.stores.columns import images
from cosmic_ray.stores.crops import CropStore

U2OS = "images/coelho2009_U2OS"


def build(out: str, source: dict, **keys) -> tuple[dict, CropStore]:
    results = validate(BuildCrops, {"out": out, "source": source, "workers": 0, **keys}).run()
    return results, CropStore.open(out)


def hand_made(data_root, uri: str) -> np.ndarray:
    at = str(data_root / U2OS / "labels" / storage.name(uri))
    return read_labels(storage.read_bytes(at), at)


@pytest.mark.data
def test_hand_made_labels_become_crops_of_exactly_those_nuclei(data_root, tmp_path):
    source = {"uri": str(data_root / U2OS), "pattern": "images/U2OS_dna-1[0-3].png", "labels": "labels/{stem}.png"}
    everything = {"area": {"low": 0, "high": 100}, "quality": {"enabled": False}, "crop_px": 256}
    results, store = build(str(tmp_path / "out"), source, **everything)
    fields, wanted = 0, 0
    for uri in storage.listing(source["uri"], source["pattern"]):
        labels = hand_made(data_root, uri)
        columns = measure(labels, labels)
        fields, wanted = fields + 1, wanted + int((~columns["touches_border"]).sum())
    too_large = results["objects_rejected"].get("larger than the crop", 0)
    assert (results["fields"], results["rows"]) == (fields, wanted - too_large)
    table = next(store.batches(10**6))
    assert ((images(table, store.spec) > 0).sum((1, 2, 3)) == table["area_px"].to_numpy()).all()


@pytest.mark.data
def test_crops_of_our_segmentation_lie_on_hand_marked_nuclei(data_root, tmp_path):
    source = {"uri": str(data_root / U2OS), "pattern": "images/U2OS_dna-[23].png"}
    results, store = build(str(tmp_path / "out"), source, crop_px=256)
    rows = store.metadata(["field_uri", "centroid_x", "centroid_y"]).to_pylist()
    marked = {row["field_uri"]: hand_made(data_root, row["field_uri"]) for row in rows}
    hit = {
        (row["field_uri"], int(marked[row["field_uri"]][round(row["centroid_y"]), round(row["centroid_x"])]))
        for row in rows
    }
    hit = {(uri, label) for uri, label in hit if label}
    assert len(hit) / len(rows) > 0.9, "crops that are one nucleus each"
    assert results["rows"] > 25
