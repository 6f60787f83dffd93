"""A small U-Net that tells nuclei from what lies between them, evaluated in whole numbers.

Activations are 0..255, weights -127..127, and every sum stays below 2**24: float32 holds all of it exactly, in whatever
order it is added. So the output is the same on every machine, at any number of threads, in any tiling.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WEIGHTS = Path(__file__).with_name("nucleus_net.safetensors")

DIAMETER_PX = 16.0
"""The diameter of a nucleus in the image that the network was trained to see."""

UNIT = 100
"""The output's steps to 1: `UNIT` is well inside a nucleus, 0 its outline, `-UNIT` well outside."""

LAYERS = ("e1.0", "e1.1", "e2.0", "e2.1", "e3.0", "e3.1", "e3.2", "u2", "d2.0", "d2.1", "u1", "d1.0", "d1.1", "out")
_TILE, _HALO = 1024, 64


@dataclass(frozen=True)
class Layer:
    """One convolution: floor((weight * x + bias) / 2**shift), clipped to 0..255 except in the last layer."""

    weight: np.ndarray
    """(out, in, k, k) int8."""

    bias: np.ndarray
    """(out,) int32, half a step for rounding included."""

    shift: np.ndarray
    """(out,) int8."""

    def bound(self) -> int:
        """The largest magnitude that any partial sum can reach."""
        return int((np.abs(self.weight.astype(np.int64)).sum((1, 2, 3)) * 255 + np.abs(self.bias)).max())


def load_layers(path: Path = WEIGHTS) -> dict[str, Layer]:
    """Read the network.

    Raises:
        ValueError: if a sum could leave the range in which float32 is exact.
    """
    from safetensors.numpy import load_file

    stored = load_file(path)
    layers = {name: Layer(*(stored[f"{name}.{part}"] for part in ("weight", "bias", "shift"))) for name in LAYERS}
    for name, layer in layers.items():
        if layer.bound() >= 2**24:
            raise ValueError(f"{path}: sums of {name} reach {layer.bound()}, float32 counts exactly to {2**24}")
    return layers


@functools.lru_cache(maxsize=1)
def _shipped() -> dict[str, Layer]:
    return load_layers()


def predict(image: np.ndarray, layers: dict[str, Layer] | None = None) -> np.ndarray:
    """How far inside a nucleus each pixel lies.

    Args:
        image: (H, W) uint8, normalised as `segment_better.normalise` does, nuclei about `DIAMETER_PX` wide.
        layers: the network; None for the one that is shipped.

    Returns:
        (H, W) int16, -`UNIT`..`UNIT`: distance to the outline (outside: negative) over 4 px, less in small nuclei, and
        zero where two nuclei touch.
    """
    import torch

    prepared = _prepared(layers or _shipped())
    height, width = image.shape
    bottom, right = -(-height // 8) * 8 + 8, -(-width // 8) * 8 + 8
    padded = np.pad(image, ((8, bottom - height), (8, right - width)), mode="symmetric")
    result = np.empty(padded.shape, np.int16)
    with torch.inference_mode():
        for top in range(0, padded.shape[0], _TILE):
            for left in range(0, padded.shape[1], _TILE):
                y, x = max(top - _HALO, 0), max(left - _HALO, 0)
                tile = padded[y : top + _TILE + _HALO, x : left + _TILE + _HALO]
                output = _forward(torch.from_numpy(tile.astype(np.float32))[None, None], prepared)
                inner = output[top - y : top - y + _TILE, left - x : left - x + _TILE]
                result[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
    return result[8 : 8 + height, 8 : 8 + width]


def _prepared(layers: dict[str, Layer]) -> dict:
    import torch

    def column(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.float32))[:, None, None]

    return {
        name: (torch.from_numpy(layer.weight.astype(np.float32)), column(layer.bias), column(2.0**-layer.shift))
        for name, layer in layers.items()
    }


def _forward(x, layers: dict) -> np.ndarray:
    import torch
    from torch.nn import functional

    def layer(name: str, x):
        weight, bias, scale = layers[name]
        x = functional.conv2d(x, weight, padding=weight.shape[-1] // 2).add_(bias).mul_(scale).floor_()
        return x if name == "out" else x.clamp_(0, 255)

    def block(name: str, x, depth: int = 2):
        for index in range(depth):
            x = layer(f"{name}.{index}", x)
        return x

    def joined(low, high):
        return torch.cat([functional.interpolate(low, scale_factor=2, mode="nearest"), high], 1)

    fine = block("e1", functional.pixel_unshuffle(x, 2))
    middle = block("e2", functional.max_pool2d(fine, 2))
    coarse = block("e3", functional.max_pool2d(middle, 2), 3)
    middle = block("d2", joined(layer("u2", coarse), middle))
    fine = block("d1", joined(layer("u1", middle), fine))
    output = functional.pixel_shuffle(layer("out", fine), 2)[0, 0]
    return output.clamp_(-UNIT, UNIT).numpy().astype(np.int16)
