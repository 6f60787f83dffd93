"""`better` on simulated fields that break a global threshold, on fields without nuclei, and on real ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from cosmic_ray.imaging.agreement import Counts, match_objects
from cosmic_ray.imaging.read import read_field
from cosmic_ray.imaging.segment import Segmentation, segment
from cosmic_ray.imaging.segment_better import _contacts, _restored, estimate_diameter, normalise, part, rescale

BETTER, PAPER = Segmentation(), Segmentation(recipe="paper")


def simulated(diameter: float, dimmest: float = 0.25, slope: float = 60, noise: float = 4) -> tuple:
    """A uint8 field 18 x 15 nuclei wide on a bright slope, and its labels: 25 discs, the dimmest at `dimmest`."""
    rng = np.random.default_rng(1)
    shape = (round(15 * diameter), round(18 * diameter))
    y, x = np.mgrid[: shape[0], : shape[1]]
    labels, light, centres = np.zeros(shape, np.int32), np.zeros(shape), []
    while len(centres) < 25:
        at = rng.uniform(0.6 * diameter, np.array(shape) - 0.6 * diameter)
        if all(np.hypot(*(at - other)) > 1.25 * diameter for other in centres):
            centres.append(at)
            disc = (y - at[0]) ** 2 + (x - at[1]) ** 2 < (diameter / 2) ** 2
            labels[disc], light[disc] = len(centres), 140 * rng.uniform(dimmest, 1)
    light = gaussian_filter(light, diameter / 20) + 20 + slope * y / shape[0]
    return np.clip(light + rng.normal(0, noise, shape), 0, 255).astype(np.uint8), labels


@pytest.mark.parametrize("diameter", [10, 20, 60])
def test_finds_dim_nuclei_on_a_slope_at_any_magnification(diameter):
    image, truth = simulated(diameter)
    labels = segment(image, BETTER)
    assert labels.dtype == np.int32 and labels.shape == image.shape
    counts = match_objects(labels, truth, iou=0.7)
    assert counts.recall >= 0.96
    assert counts.precision >= 0.9
    assert counts.f1 > match_objects(segment(image, PAPER), truth, iou=0.7).f1


def test_a_known_diameter_is_used():
    image, truth = simulated(20)
    assert match_objects(segment(image, Segmentation(diameter_px=20)), truth).f1 > 0.9
    assert match_objects(segment(image, Segmentation(diameter_px=150)), truth).f1 < 0.5


def test_brightness_units_change_nothing():
    image, _ = simulated(20)
    labels = segment(image, BETTER)
    np.testing.assert_array_equal(segment(image.astype(np.uint16) * 257, BETTER), labels)
    np.testing.assert_array_equal(segment(image.astype(np.float32), BETTER), labels)


def test_touching_nuclei_are_split_where_a_threshold_is_not():
    y, x = np.mgrid[:200, :260]
    truth = np.zeros((200, 260), np.int32)
    for number, (row, column) in enumerate([(50, 40), (50, 66), (130, 120), (150, 138), (60, 200)], start=1):
        truth[((y - row) / 13) ** 2 + ((x - column) / 13.5) ** 2 < 1] = number
    light = 20 + 100 * gaussian_filter((truth > 0).astype(float), 1.5)
    image = np.clip(light + np.random.default_rng(0).normal(0, 3, light.shape), 0, 255).astype(np.uint8)
    assert match_objects(segment(image, PAPER), truth).hits == 1
    assert match_objects(segment(image, BETTER), truth) == Counts(5, 5, 5)


@pytest.mark.parametrize("shape", [(16, 16), (17, 400), (300, 300)])
def test_fields_without_nuclei_give_hardly_any(shape):
    noise = np.random.default_rng(3).normal(30, 5, shape)
    assert segment(np.clip(noise, 0, 255).astype(np.uint8), BETTER).max() <= 1


def test_one_nucleus_that_fills_the_field():
    y, x = np.mgrid[:96, :96]
    truth = ((y - 48) ** 2 + (x - 48) ** 2 < 40**2).astype(np.int32)
    labels = segment((20 + 150 * truth).astype(np.uint8), Segmentation(diameter_px=80))
    assert match_objects(labels, truth) == Counts(1, 1, 1)


@pytest.mark.parametrize("diameter", [9, 31, 90])
def test_the_diameter_is_guessed_within_a_third(diameter):
    guess, sample = estimate_diameter(simulated(diameter)[0])
    assert not sample
    assert abs(np.log(guess / diameter)) < np.log(4 / 3)


@pytest.mark.parametrize("scale", [0.13, 0.5, 0.8, 1.0, 2.3])
def test_rescaling_moves_nothing(scale):
    y, x = np.mgrid[:303, :251].astype(np.float32)
    small = rescale(2 * y + 3 * x, scale)
    assert small.shape == (round(303 * scale), round(251 * scale))
    ratio = [n / s for n, s in zip((303, 251), small.shape, strict=True)]
    rows, columns = ((np.arange(s) + 0.5) * r - 0.5 for s, r in zip(small.shape, ratio, strict=True))
    inner = (slice(4, -4), slice(4, -4))
    np.testing.assert_allclose(small[inner], (2 * rows[:, None] + 3 * columns)[inner], atol=0.2)


def test_normalising_levels_light():
    image, truth = simulated(16, dimmest=1.0, slope=0)
    y = np.linspace(0.3, 1.0, len(image))[:, None]
    seen = normalise(image * y)
    assert seen.dtype == np.uint8
    means = [seen[truth == number].mean() for number in range(1, 26)]
    assert min(means) > 120 and max(means) < 230
    assert np.median(seen[truth == 0]) < 60


def test_parting_worked_by_hand():
    inside = np.full((30, 40), -100, np.int16)
    inside[5:15, 5:25] = 30
    inside[7:13, 7:13] = inside[7:13, 17:23] = 90
    inside[20:26, 5:11] = 40  # faint: no core, still an object
    inside[20:22, 30:32] = 90  # a speck
    labels = part(inside)
    assert labels.max() == 3
    assert labels[10, 10] != labels[10, 20]
    assert (labels[5:15, 5:25] > 0).all()
    assert (labels[20:26, 5:11] == labels[23, 8]).all() and labels[23, 8] > 0
    assert not labels[20:22, 30:32].any()


@pytest.mark.parametrize(("slope", "middle"), [(0.0, 20.3), (0.31, 15.0), (1.0, 0.0), (-2.7, 71.0)])
def test_borders_of_touching_nuclei_are_no_staircase(slope, middle):
    """Two halves of a plane, found at a sixth of the field's scale: the border stays within a pixel of the line."""
    small, scale = 40, 6
    y, x = np.mgrid[:small, :small]
    objects = np.where(y - slope * x - middle > 0, 2, 1).astype(np.int32)
    labels = _restored(objects, np.full(objects.shape, 100, np.int16), (small * scale, small * scale), 1)
    y, x = (np.mgrid[: small * scale, : small * scale] + 0.5) / scale - 0.5
    beyond = (y - slope * x - middle) * scale / np.hypot(1, slope)
    inner = np.zeros(labels.shape, bool)
    inner[5 * scale : -5 * scale, 5 * scale : -5 * scale] = True
    wrong = inner & (labels != np.where(beyond > 0, 2, 1))
    offset = np.median(beyond[wrong]) if wrong.any() else 0
    assert (inner & (labels == 1)).any() and (inner & (labels == 2)).any()
    assert np.abs(beyond[wrong] - offset).max(initial=0) < 2


def test_only_what_touches_is_redrawn():
    objects = np.zeros((30, 40), np.int32)
    objects[5:15, 5:15], objects[5:15, 15:25], objects[5:15, 27:37], objects[20:28, 5:15] = 3, 1, 4, 2
    objects[10, 15] = 3
    assert _contacts(objects).tolist() == [[1, 3, 5, 14, 15, 17]]
    assert _contacts(np.where(objects == 3, 0, objects)).shape == (0, 6)
    inside = np.where(objects > 0, 100, -100).astype(np.int16)
    labels = _restored(objects, inside, (150, 200), 1)
    alone = _restored(np.where(objects == 3, 1, objects), inside, (150, 200), 1)
    np.testing.assert_array_equal(labels == 4, alone == 3)
    np.testing.assert_array_equal(labels == 2, alone == 2)
    np.testing.assert_array_equal((labels == 1) | (labels == 3), alone == 1)


@pytest.mark.data
@pytest.mark.parametrize(("name", "every", "floor"), [("dsb2018_train_fluo", 45, 0.8), ("coelho2009_U2OS", 12, 0.88)])
def test_real_fields_against_their_masks(data_root: Path, name: str, every: int, floor: float):
    from PIL import Image

    folder = data_root / "images" / name
    better, paper = Counts(), Counts()
    for path in sorted((folder / "images").glob("*.png"))[::every]:
        image, true = read_field(path.read_bytes(), str(path)), np.asarray(Image.open(folder / "labels" / path.name))
        better += match_objects(segment(image, BETTER), true)
        paper += match_objects(segment(image, PAPER), true)
    assert better.true > 100
    assert better.f1 >= floor
    assert better.f1 > paper.f1
