"""A store at a glance."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.show import describe_store, montage

CAPTION_PX = 16


def picture(store: CropStore, count: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(montage(store, count))))


@pytest.mark.parametrize("channels", [1, 5])
def test_a_montage_holds_the_crops(crop_store: Callable[..., CropStore], channels: int):
    store = crop_store(40, channels=channels, size=20)
    shown = picture(store, 9)
    assert shown.shape == (CAPTION_PX + 3 * 22, 3 * 22, 3) and shown.dtype == np.uint8
    first, last = shown[CAPTION_PX : CAPTION_PX + 20, :20], shown[CAPTION_PX + 44 : CAPTION_PX + 64, 44:64]
    for tile, row in ((first, 0), (last, 39)):
        crop = store.crops(np.array([row]))[0]
        lit, nucleus = tile.any(axis=2), crop.any(axis=0)
        assert not (lit & ~nucleus).any() and lit.sum() > 0.95 * nucleus.sum()
    assert (shown == shown[..., :1]).all() == (channels == 1)
    assert montage(store, 9) == montage(store, 9)


def test_simulated_is_written_on_it(crop_store: Callable[..., CropStore]):
    made = {"size": 64, "simulated": True}
    simulated, real = crop_store(9, **made), crop_store(9, **{**made, "simulated": False})
    one, other = picture(simulated, 9), picture(real, 9)
    assert not np.array_equal(one[:CAPTION_PX], other[:CAPTION_PX])
    assert np.array_equal(one[CAPTION_PX:], other[CAPTION_PX:])


def test_fewer_crops_than_asked_for(crop_store: Callable[..., CropStore]):
    assert picture(crop_store(3, size=8), 100).shape == (CAPTION_PX + 20, 20, 3)


def test_a_description_says_what_it_is(crop_store: Callable[..., CropStore]):
    about = json.loads(json.dumps(describe_store(crop_store(40, channels=2, size=20)), allow_nan=False))
    assert (about["rows"], about["shards"], about["row_groups"]) == (40, 3, 5)
    assert about["spec"] == {"channels": ["channel-0", "channel-1"], "height": 20, "width": 20, "dtype": "uint8"}
    assert about["simulated"] is True and about["intensity"]["masked"] is True
    assert about["statistics"]["rows_by_pixel_size_um"] == {"nan": 40}
