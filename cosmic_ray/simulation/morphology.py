"""From a cell's factors to its nucleus, and from the nucleus to its crop.

u is a factor's level: the mean of the type + z (`paired_spec.FACTORS`).

- size: area = 150 um^2 x exp(0.17 u). elongation: ratio of the axes = 1.05 + 0.3 exp(0.35 u).
- lobes: root mean square deviation of the outline from an ellipse = 0.035 exp(0.35 u) of the radius, exactly.
- light: all light of the nucleus, x exp(0.12 u).
- grain: half-autocorrelation distance of the chromatin = 0.85 um x exp(0.32 u).
- contrast: coefficient of variation of its density = 0.27 exp(0.3 u).
- foci: number of bright foci = 4 + 1.8 u, rounded, not below 0.
"""

from __future__ import annotations

import numpy as np

from cosmic_ray.errors import JobError
from cosmic_ray.simulation.cells import HARMONICS, Nuclei
from cosmic_ray.simulation.chromatin import chromatin_tile, nucleus_density
from cosmic_ray.simulation.keys import keyed
from cosmic_ray.simulation.links import CUT
from cosmic_ray.simulation.optics import blurred
from cosmic_ray.simulation.paired_spec import CROP_MARGIN_PX, FACTORS, PairedImage, PairedSpec
from cosmic_ray.simulation.population import Cells, draw_cells
from cosmic_ray.simulation.shapes import moments, outline, rasterise

_AREA_UM2, _FRAME_PX = 150.0, 8
_WHITE = 4.0
"""255 stands for this multiple of the light density of a nucleus of 150 um^2 and mean brightness."""


def area_um2(u: np.ndarray) -> np.ndarray:
    """Projected area, um^2."""
    return _AREA_UM2 * np.exp(0.17 * u)


def aspect(u: np.ndarray) -> np.ndarray:
    """Ratio of the axes."""
    return 1.05 + 0.3 * np.exp(0.35 * u)


def draw_morphology(cells: Cells, seed: int) -> Nuclei:
    """The nuclei of some cells. What is no factor (direction, bending, nucleoli, height) is keyed by the cell."""
    level = dict(zip(FACTORS, cells.levels.T, strict=True))
    own = [keyed(seed, "morphology", int(number)) for number in cells.number]
    count = len(own)
    shape = np.stack([rng.standard_normal((2, len(HARMONICS))) for rng in own])
    lobes = (shape[:, 0] + 1j * shape[:, 1]) * HARMONICS**-2.0
    rms = np.sqrt((np.abs(lobes) ** 2).sum(axis=1) / 2)

    def same(value: float) -> np.ndarray:
        return np.full(count, value)

    return Nuclei(
        cell=np.arange(count, dtype=np.int32),
        cell_type=np.full(count, ""),
        state=np.full(count, "G1"),
        mitosis=np.full(count, ""),
        phase=same(0.0),
        dna=same(2.0),
        stain=np.exp(0.12 * level["light"]),
        area_um2=area_um2(level["size"]),
        aspect=aspect(level["elongation"]),
        angle=np.array([rng.uniform(0, np.pi) for rng in own]),
        bend=np.array([0.05 * rng.standard_normal() for rng in own]),
        harmonics=lobes * (0.035 * np.exp(0.35 * level["lobes"]) / rms)[:, None],
        flatness=same(5.0),
        grain_um=0.85 * np.exp(0.32 * level["grain"]),
        contrast=0.27 * np.exp(0.3 * level["contrast"]),
        threads=np.zeros(count, bool),
        nucleoli=np.array([rng.poisson(1.2) for rng in own], np.int32),
        nucleolus_um=same(1.1),
        nucleolus_depth=same(0.3),
        foci=np.maximum(np.rint(4 + 1.8 * level["foci"]), 0).astype(np.int32),
        focus_um=same(0.6),
        focus_gain=same(1.6),
        rim=same(0.15),
        depth_um=np.array([0.5 * np.clip(rng.standard_normal(), -2, 2) for rng in own]),
    )  # fmt: skip


def require_room(spec: PairedSpec) -> None:
    """Make sure that the largest, longest nucleus of any type fits into its crop.

    Raises:
        JobError: naming `image.crop_px`, and the pixel size at which it fits.
    """
    means = [one.means for one in spec.cell_types.values()]
    size, long = (np.array([one.get(name, 0.0) for one in means]) + CUT for name in ("size", "elongation"))
    longest = 1.12 * 2 * np.sqrt(area_um2(size) * aspect(long) / np.pi).max()
    room = spec.image.crop_px - 2 * CROP_MARGIN_PX
    if longest > room * spec.image.pixel_size_um:
        raise JobError(
            "image.crop_px",
            spec.image.crop_px,
            f"the longest nuclei measure {longest:.0f} um and do not fit",
            f"choose image.pixel_size_um of {longest / room:.2f} or more, or larger crops",
        )


def draw_images(spec: PairedSpec, seed: int, chunk: int) -> np.ndarray:
    """The images of one chunk of cells: (n, S, S) uint8, in order of the cells' numbers."""
    cells = draw_cells(spec, seed, chunk)
    nuclei, tile = draw_morphology(cells, seed), chromatin_tile(keyed(seed, "tile", chunk))
    stain = [keyed(seed, "stain", batch).standard_normal() for batch in range(spec.batches)]
    brightness = np.exp(spec.image.stain_cv * np.array(stain))[cells.batch]
    own = [keyed(seed, "image", int(number)) for number in cells.number]
    crops = (draw_crop(nuclei, i, spec.image, float(brightness[i]), tile, rng) for i, rng in enumerate(own))
    return np.stack(list(crops))


def draw_crop(
    nuclei: Nuclei, row: int, image: PairedImage, brightness: float, tile: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The image of one nucleus: (S, S) uint8, centred on its centroid, 0 outside its outline, 1..255 inside.

    Args:
        nuclei: of `draw_morphology`.
        row: which of them.
        brightness: of its batch, around 1.
        tile: of `chromatin.chromatin_tile`.
        rng: the cell's own.

    Raises:
        JobError: where the nucleus does not fit.
    """
    shape = outline(nuclei, row)
    middle, pixel = moments(shape), image.pixel_size_um
    patch = rasterise(shape, pixel, (-middle.y / pixel, -middle.x / pixel))
    side = image.crop_px + 2 * _FRAME_PX
    mask, light = np.zeros((side, side), bool), np.zeros((side, side), np.float32)
    start = side // 2 - patch.half
    place, seen = slice(start, start + 2 * patch.half + 1), slice(_FRAME_PX, _FRAME_PX + image.crop_px)
    if start >= 0:
        mask[place, place] = patch.mask
    if mask[seen, seen].sum() < patch.mask.sum():
        raise JobError("image.crop_px", image.crop_px, "a nucleus does not fit", "choose larger crops or pixels")
    photons = image.photons * brightness * nuclei.stain[row]
    light[place, place] = nucleus_density(nuclei, row, shape, patch, pixel, tile, rng) * np.float32(photons)
    dark = image.optics.background_per_um2 * pixel**2
    expected = blurred({abs(float(nuclei.depth_um[row])): light}, image.optics, pixel) + dark
    caught = rng.poisson(expected) + image.read_noise * rng.standard_normal(expected.shape) - dark
    white = _WHITE * image.photons * pixel**2 / _AREA_UM2
    grey = np.clip(np.rint(1 + caught * (254 / white)), 1, 255).astype(np.uint8)
    return np.where(mask, grey, 0).astype(np.uint8)[seen, seen]
