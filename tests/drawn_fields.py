"""Fields drawn for the tests of `build-crops`: discs whose number, place, size and brightness are known."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import tifffile

from cosmic_ray import storage
from cosmic_ray.config import validate
from cosmic_ray.imaging.job import BuildCrops
from cosmic_ray.stores.crops import CropStore


@dataclass(frozen=True)
class Drawn:
    """A field and the truth of it: `image` (H, W) uint16, `labels` (H, W) uint16."""

    image: np.ndarray
    labels: np.ndarray


SHAPE, WHOLE = (150, 190), 14
"""Of a drawn field: pixels, and nuclei off the border."""


def draw(seed: int, radii: tuple[float, float] = (5, 11)) -> Drawn:
    """15 discs on a grid of 38 px, one in a cell and none touching; the first is cut by the left edge."""
    shape = SHAPE
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    labels = np.zeros(shape, np.uint16)
    image = rng.normal(300, 15, shape)
    centres = [(row, column) for row in range(19, shape[0] - 18, 38) for column in range(19, shape[1] - 18, 38)]
    for label, (row, column) in enumerate(centres, start=1):
        column = 0 if label == 1 else column
        radius = rng.uniform(*radii)
        inside = (y - row - rng.uniform(-4, 4)) ** 2 + (x - column - rng.uniform(-4, 4)) ** 2 <= radius**2
        labels[inside] = label
        image[inside] = rng.uniform(2600, 4000) * (1 + 0.06 * rng.standard_normal(inside.sum()))
    return Drawn(np.clip(image, 0, 65535).astype(np.uint16), labels)


def tiff(image: np.ndarray, **options: Any) -> bytes:
    """`image` as a TIFF."""
    out = io.BytesIO()
    tifffile.imwrite(out, image, **options)
    return out.getvalue()


def plate(home: str, fields: int = 6, **options: Any) -> list[Drawn]:
    """Write `fields` drawn fields as `A01_s1.tif`, ... below `home`, and give their truth."""
    drawn = [draw(seed, **options) for seed in range(fields)]
    for seed, one in enumerate(drawn):
        storage.write_bytes(storage.join(home, f"{field_name(seed)}.tif"), tiff(one.image, compression="zlib"))
    return drawn


def field_name(index: int) -> str:
    """`A01_s1`, `A01_s2`, `A02_s1`, ..."""
    return f"A{index // 2 + 1:02}_s{index % 2 + 1}"


NAMES = r"(?P<well>A\d\d)_s(?P<site>\d)"
SMALL: dict[str, Any] = {"recipe": "paper", "crop_px": 32, "rows_per_group": 8, "groups_per_shard": 2, "workers": 0}


def make_job(home: str, out: str, **keys: Any) -> BuildCrops:
    """A small job over the TIFFs below `home`; `keys` replace its own, those of `source` one by one."""
    source = {"uri": home, "names": NAMES, "defaults": {"plate": "P1", "source": "drawn"}} | keys.pop("source", {})
    return validate(BuildCrops, {"out": out, "source": source, **SMALL, **keys})


def build(home: str, out: str, **keys: Any) -> tuple[dict[str, Any], CropStore]:
    """Run a small job; its results and its store."""
    job = make_job(home, out, **keys)
    job.check()
    return job.run(), CropStore.open(out)
