"""From uint8 crops to what the model sees, on the device: keyed flips, then scale, then resize, then channels.

Crops travel as uint8 (16 KB at 1x128x128; float32 at 3x224x224 is 36 times that), so all of this runs after the copy.
Flips come first, on uint8: that moves fewer bytes, and resizing a flipped crop gives the flipped resized crop (up to
rounding). App. A states resize and flips; it states no mean and standard deviation, and none is applied.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from cosmic_ray.ingest import keyed

Recipe = Literal["paper", "better"]


def augment(
    crops: torch.Tensor, seed: int, positions: torch.Tensor, size: int, recipe: Recipe = "better"
) -> torch.Tensor:
    """For training: `flip`, then `prepare`. Arguments, returns and errors as theirs."""
    return prepare(flip(crops, seed, positions), size, recipe)


def flip(crops: torch.Tensor, seed: int, positions: torch.Tensor) -> torch.Tensor:
    """Flip each crop left-right and, independently, top-bottom, each with probability 0.5 (App. A).

    `crops`: (N, C, H, W) of any dtype. `positions`: int64 (N,) global sample positions; the draw is keyed by
    (seed, position), so a crop's flips do not depend on its batch. Returns the shape and dtype of `crops`.
    """
    draws = keyed.bits(seed, positions, "flip", 2) >> 31
    horizontal, vertical = (draws.bool()[:, :, None, None, None]).unbind(1)
    crops = torch.where(horizontal, crops.flip(-1), crops)
    return torch.where(vertical, crops.flip(-2), crops)


def prepare(crops: torch.Tensor, size: int, recipe: Recipe = "better") -> torch.Tensor:
    """For evaluation, and the second half of `augment`: uint8 (N, C, H, H) to float32 (N, C', size, size) in [0, 1].

    Values are divided by 255. Resizing is bilinear with half-pixel centres, antialiased where it shrinks; background
    (0) stays exactly 0 away from a nucleus. `paper`: one grey channel repeated to three (C' = 3, a view that shares
    its memory); `better`: the channels as they are (C' = C).

    Raises TypeError for another dtype; ValueError for crops that are not square (resizing would change the shape of
    the nuclei) and, under `paper`, for more than one channel.
    """
    if crops.dtype != torch.uint8:
        raise TypeError(f"crops must be uint8, not {crops.dtype}")
    if crops.ndim != 4 or crops.shape[2] != crops.shape[3]:
        raise ValueError(f"crops must be (N, C, H, H), not {tuple(crops.shape)}")
    if recipe == "paper" and crops.shape[1] != 1:
        raise ValueError(f"recipe 'paper' repeats one grey channel to three; these crops have {crops.shape[1]}")
    images = crops.to(torch.float32) / 255
    if crops.shape[2] != size:
        shrinks = crops.shape[2] > size
        images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=shrinks)
    return images.expand(-1, 3, -1, -1) if recipe == "paper" else images
