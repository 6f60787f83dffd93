"""The network in whole numbers: float32 computes it exactly, whatever the tiles and threads."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from cosmic_ray.imaging import nucleus_net
from cosmic_ray.imaging.nucleus_net import LAYERS, UNIT, Layer, load_layers, predict


@pytest.fixture(scope="module")
def layers() -> dict[str, Layer]:
    return load_layers()


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    smooth = gaussian_filter(np.random.default_rng(seed).normal(size=(height, width)), 4)
    return np.clip(100 + 900 * smooth, 0, 255).astype(np.uint8)


def in_integers(image: np.ndarray, layers: dict[str, Layer]) -> np.ndarray:
    """The network once more, in int64 and without torch. (H, W) uint8, sides multiples of 8."""

    def layer(name: str, x: np.ndarray) -> np.ndarray:
        one = layers[name]
        size = one.weight.shape[-1]
        x = np.pad(x, ((0, 0), (size // 2, size // 2), (size // 2, size // 2)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
        sums = np.tensordot(one.weight.astype(np.int64), windows, ((1, 2, 3), (0, 3, 4)))
        sums = (sums + one.bias[:, None, None]) >> one.shift[:, None, None].astype(np.int64)
        return sums if name == "out" else np.clip(sums, 0, 255)

    def block(names: list[str], x: np.ndarray) -> np.ndarray:
        for name in names:
            x = layer(name, x)
        return x

    def halved(x: np.ndarray) -> np.ndarray:
        channels, height, width = x.shape
        return x.reshape(channels, height // 2, 2, width // 2, 2).max((2, 4))

    def doubled(x: np.ndarray) -> np.ndarray:
        return x.repeat(2, 1).repeat(2, 2)

    x = image.astype(np.int64)
    fine = block(["e1.0", "e1.1"], np.stack([x[::2, ::2], x[::2, 1::2], x[1::2, ::2], x[1::2, 1::2]]))
    middle = block(["e2.0", "e2.1"], halved(fine))
    coarse = block(["e3.0", "e3.1", "e3.2"], halved(middle))
    middle = block(["d2.0", "d2.1"], np.concatenate([doubled(layer("u2", coarse)), middle]))
    fine = block(["d1.0", "d1.1"], np.concatenate([doubled(layer("u1", middle)), fine]))
    parts = layer("out", fine)
    output = np.empty(image.shape, np.int64)
    output[::2, ::2], output[::2, 1::2], output[1::2, ::2], output[1::2, 1::2] = parts
    return np.clip(output, -UNIT, UNIT)


def test_float32_computes_what_integers_do(layers):
    image = picture(24, 32)
    padded = np.pad(image, ((8, 8), (8, 8)), mode="symmetric")
    np.testing.assert_array_equal(predict(image, layers), in_integers(padded, layers)[8:-8, 8:-8])


def test_tiles_and_threads_change_nothing(layers, monkeypatch):
    import torch

    image = picture(333, 410)
    whole = predict(image, layers)
    assert whole.dtype == np.int16
    assert np.abs(whole).max() <= UNIT
    assert len(np.unique(whole)) > 50
    monkeypatch.setattr(nucleus_net, "_TILE", 128)
    np.testing.assert_array_equal(predict(image, layers), whole)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        np.testing.assert_array_equal(predict(image, layers), whole)
    finally:
        torch.set_num_threads(threads)


def test_a_network_whose_sums_float32_cannot_hold_is_refused(tmp_path):
    stored = load_file(nucleus_net.WEIGHTS)
    stored["d2.1.bias"] = np.full_like(stored["d2.1.bias"], 2**24)
    save_file(stored, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"d2\.1"):
        load_layers(tmp_path / "w.safetensors")


def test_the_bound_is_worked_by_hand():
    weight = np.zeros((2, 1, 3, 3), np.int8)
    weight[0, 0, 0, 0], weight[0, 0, 1, 1], weight[1, 0, 0, 0] = -3, 4, 5
    layer = Layer(weight, np.array([10, -1000], np.int32), np.zeros(2, np.int8))
    assert layer.bound() == max(7 * 255 + 10, 5 * 255 + 1000)
    assert dataclasses.replace(layer, bias=np.zeros(2, np.int32)).bound() == 7 * 255


def test_the_shipped_network_is_whole_and_small(layers):
    assert tuple(layers) == LAYERS
    assert nucleus_net.WEIGHTS.stat().st_size < 1_000_000


def test_the_shipped_network_says_what_it_was_fitted_on():
    with safe_open(nucleus_net.WEIGHTS, "np") as stored:
        card = stored.metadata()
    assert card["fitted_by"].startswith("python -m cosmic_ray.imaging.fit.train --sets dsb2018_train_fluo ")
    assert card["fitted_on"] == "dsb2018_train_fluo and drawn patches (35%)"
    assert "CC0" in card["source"]


def test_whole_numbers_say_what_the_float_network_says(tmp_path):
    import torch

    from cosmic_ray.imaging.fit.patches import PatchSource
    from cosmic_ray.imaging.fit.train import NucleusNet, quantisable, quantise

    torch.manual_seed(0)
    source = PatchSource([], 1.0, np.random.default_rng(0))
    pool = [source.draw() for _ in range(4)]
    images = torch.from_numpy(np.stack([patch[0] for patch in pool]).astype(np.float32) / 255)[:, None]
    net = NucleusNet().to(memory_format=torch.channels_last)
    with torch.no_grad():
        for _ in range(20):
            net(images)
    save_file(quantise(quantisable(net, pool)), tmp_path / "w.safetensors")
    image = np.pad(pool[0][0], ((8, 16), (8, 16)), mode="symmetric").astype(np.float32) / 255
    with torch.inference_mode():
        exact = net(torch.from_numpy(image)[None, None])[0].numpy()[8:-16, 8:-16].clip(-1, 1)
    rounded = predict(pool[0][0], load_layers(tmp_path / "w.safetensors")) / UNIT
    assert exact.std() > 0.1
    assert np.abs(rounded - exact).mean() < 0.15 * exact.std()
