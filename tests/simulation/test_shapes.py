"""Outlines against their pixels, and chromatin against the numbers it was drawn from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import regionprops

from cosmic_ray.simulation.cells import Nuclei, draw_nuclei
from cosmic_ray.simulation.chromatin import chromatin_tile, nucleus_density
from cosmic_ray.simulation.keys import keyed
from cosmic_ray.simulation.shapes import moments, outline, rasterise
from cosmic_ray.simulation.spec import CELL_TYPES, CellCycle, CellType, Optics, Treatment

G1_ONLY = CellCycle(g1=1, s=0, g2=0, m=0)


def one(cell_type: CellType, seed: int = 0, count: int = 1) -> Nuclei:
    rng = keyed(seed, "test")
    return draw_nuclei(rng, {"it": cell_type}, {"it": 1}, count, Treatment(), Optics(), stain_cv=0)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(CELL_TYPES)),
    seed=st.integers(0, 2**32),
    pixel=st.floats(0.1, 0.65),
    shift=st.tuples(st.floats(-0.5, 0.5), st.floats(-0.5, 0.5)),
)
def test_area_of_the_pixels_is_the_outlines(name, seed, pixel, shift):
    nuclei = one(CELL_TYPES[name], seed)
    shape = outline(nuclei, 0)
    about = moments(shape)
    assert about.area == pytest.approx(nuclei.area_um2[0], rel=1e-5)
    patch = rasterise(shape, pixel, shift)
    # A pixel centre is inside or not: each of the perimeter's pixels may err by half, in both directions.
    assert abs(patch.mask.sum() * pixel**2 - about.area) < 0.25 * about.perimeter * pixel
    assert not (patch.mask[0] | patch.mask[-1] | patch.mask[:, 0] | patch.mask[:, -1]).any()


@pytest.mark.parametrize("name", sorted(CELL_TYPES))
def test_moments_are_those_that_skimage_measures(name):
    nuclei = one(CELL_TYPES[name], seed=5, count=8)
    for row in range(8):
        shape, pixel = outline(nuclei, row), 0.05
        patch, about = rasterise(shape, pixel, (0.0, 0.0)), moments(shape)
        seen = regionprops(patch.mask.astype(int))[0]
        assert seen.axis_major_length * pixel == pytest.approx(about.major, rel=2e-3)
        assert seen.axis_minor_length * pixel == pytest.approx(about.minor, rel=2e-3)
        assert seen.eccentricity == pytest.approx(about.eccentricity, abs=5e-3)
        y, x = (np.array(seen.centroid) - patch.half) * pixel
        assert (x, y) == pytest.approx((about.x, about.y), abs=0.01)
        if about.eccentricity > 0.5:  # skimage: between the row axis and the major axis, counter-clockwise
            turn = (np.pi / 2 - seen.orientation - about.angle) % np.pi
            assert min(turn, np.pi - turn) < 0.02


def test_a_disc_is_a_disc():
    disc = replace(one(CellType()), aspect=np.ones(1), bend=np.zeros(1), harmonics=np.zeros((1, 5), complex))
    about = moments(outline(disc, 0))
    assert about.eccentricity < 1e-3
    assert about.major == pytest.approx(2 * np.sqrt(disc.area_um2[0] / np.pi), rel=0.01)


def test_light_is_normalised_and_stays_inside():
    tile = chromatin_tile(keyed(0, "tile"))
    for name, cell_type in CELL_TYPES.items():
        nuclei = one(cell_type, seed=1)
        shape = outline(nuclei, 0)
        patch = rasterise(shape, 0.325, (0.2, -0.3))
        density = nucleus_density(nuclei, 0, shape, patch, 0.325, tile, keyed(0, name))
        assert density.sum() == pytest.approx(1, rel=1e-5)
        assert (density >= 0).all() and not density[~patch.mask].any()


@pytest.mark.parametrize(("grain", "contrast"), [(0.5, 0.15), (1.0, 0.30), (1.6, 0.45)])
def test_chromatin_has_the_grain_and_contrast_it_was_given(grain, contrast):
    """On huge, flat, plain nuclei, the drawn numbers are measured back from the pixels."""
    plain = CellType(area_um2=6000, area_cv=0, aspect=1, irregularity=0, bend=0, flatness=60, grain_um=grain,
                     contrast=contrast, nucleoli=0, rim=0, texture_cv=0, cycle=G1_ONLY)  # fmt: skip
    pixel, lags = 0.125, np.arange(40)
    correlation, spread = np.zeros(len(lags)), []
    for seed in range(6):
        nuclei = one(plain, seed)
        shape = outline(nuclei, 0)
        patch = rasterise(shape, pixel, (0.0, 0.0))
        tile = chromatin_tile(keyed(seed, "tile"))
        density = nucleus_density(nuclei, 0, shape, patch, pixel, tile, keyed(seed, "nucleus"))
        half = int(0.6 * patch.half)
        square = density[patch.half - half : patch.half + half, patch.half - half : patch.half + half]
        spread.append(square.std() / square.mean())
        log = np.log(square) - np.log(square).mean()
        correlation += [np.mean(log[:, lag:] * log[:, : log.shape[1] - lag]) for lag in lags]
    assert np.mean(spread) == pytest.approx(contrast, rel=0.07)
    measured = np.interp(-0.5, -correlation / correlation[0], lags) * pixel
    assert measured == pytest.approx(grain, rel=0.08)


def test_nucleoli_are_dark_and_foci_are_bright():
    tile = chromatin_tile(keyed(0, "tile"))
    base = {"contrast": 0.02, "rim": 0.0, "texture_cv": 0.0, "cycle": G1_ONLY, "flatness": 20.0}

    def extremes(**traits: float) -> tuple[float, float]:
        nuclei = one(CellType(**base, **traits), seed=3)
        shape = outline(nuclei, 0)
        patch = rasterise(shape, 0.2, (0.0, 0.0))
        density = nucleus_density(nuclei, 0, shape, patch, 0.2, tile, keyed(0, "n"))
        inner = density[patch.rho < 0.85] / np.median(density[patch.rho < 0.85])
        return inner.min(), inner.max()

    low, high = extremes(nucleoli=0.0, foci=0.0)
    assert low > 0.9 and high < 1.1
    assert extremes(nucleoli=6.0, nucleolus_depth=0.5)[0] < 0.65
    assert extremes(nucleoli=0.0, foci=12.0, focus_gain=1.0)[1] > 1.7
